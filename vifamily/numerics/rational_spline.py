"""Monotone rational-quadratic splines, with a gradient written out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["rational_spline"]


def rational_spline(x: Tensor, parameters: Tensor, *, bound: float = 5.0, slope: float = 1e-3) -> tuple[Tensor, Tensor]:
    r"""Monotone rational-quadratic spline of each number on ``[-bound, bound]``, the identity outside.

    In bin ``k``, with ``t = (x - x_k) / (x_{k+1} - x_k)``, ``s`` the slope of its chord and ``d`` those at its ends,

    .. math:: y = y_k + (y_{k+1} - y_k) \frac{s t^2 + d_k t (1 - t)}{s + (d_k + d_{k+1} - 2 s) t (1 - t)} .

    It equals ``zuko.transforms.MonotonicRQSTransform``. Its gradient is written out rather than recorded operation by
    operation, which makes a step of training on small batches several times as fast; where it is differentiated twice,
    by ``torch.func`` or inside ``torch.compile``, the recorded operations are used.

    Source: C. Durkan, A. Bekasov, I. Murray and G. Papamakarios (2019), "Neural spline flows", equations 4 and 5.

    Args:
        x: Points, of any shape.
        parameters: ``(*shape, 3 bins - 1)``: unconstrained widths and heights of the bins, and slopes at inner knots.
        bound: Where the spline ends.
        slope: Least slope.

    Returns:
        The images and the logarithms of the derivatives, both of the shape of ``x``.

    Example:
        >>> y, log_slope = rational_spline(torch.tensor([0.5, 7.0]), torch.zeros(2, 11))
        >>> y.tolist(), log_slope.abs().max().item() < 1e-6
        ([0.5, 7.0], True)
    """
    if torch.compiler.is_compiling() or _transformed():
        parts = _evaluate(x, parameters, bound, slope)
        return parts.y, parts.log_slope
    y, log_slope = _Spline.apply(x, parameters, bound, slope)  # type: ignore[no-untyped-call]
    return y, log_slope


def _transformed() -> bool:
    """Whether a transform of torch.func is active, as torch's own autograd functions ask."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


class _Parts(NamedTuple):
    """Images, and what the gradient is made of; all but the shares are of the shape of the points."""

    y: Tensor
    log_slope: Tensor
    inside: Tensor
    k: Tensor
    shares: Tensor
    width: Tensor
    height: Tensor
    t: Tensor
    left: Tensor
    right: Tensor


def _evaluate(x: Tensor, parameters: Tensor, bound: float, slope: float) -> _Parts:
    bins = (parameters.shape[-1] + 1) // 3
    scale = 1 / abs(math.log(slope))
    sizes = parameters[..., : 2 * bins].unflatten(-1, (2, bins))
    # bounded by half the logarithm of the least slope, so that the exponential needs no shift
    weight = (sizes / (1 + 2 * scale * sizes.abs())).exp()
    shares = weight / weight.sum(-1, keepdim=True)
    ends = shares.cumsum(-1)
    inside = x.abs() < bound
    position = (0.5 + x / (2 * bound)).unsqueeze(-1)
    k = (ends[..., 0, :-1] < position).sum(-1, keepdim=True)
    here = k.unsqueeze(-2).expand(*k.shape[:-1], 2, 1)
    size = shares.gather(-1, here).squeeze(-1) * (2 * bound)
    start = ends.gather(-1, here).squeeze(-1) * (2 * bound) - size - bound
    width, height = size.unbind(-1)
    x0, y0 = start.unbind(-1)
    knots = torch.nn.functional.pad(parameters[..., 2 * bins :], (1, 1))
    raw = knots.gather(-1, torch.cat([k, k + 1], -1))
    left, right = (raw / (1 + scale * raw.abs())).exp().unbind(-1)
    t = torch.where(inside, (x - x0) / width, 0.5)
    s, rest = height / width, 1 - t
    both = t * rest
    below = s + (left + right - 2 * s) * both
    y = torch.where(inside, y0 + height * (s * t.square() + left * both) / below, x)
    inner = 2 * s * both + left * rest.square() + right * t.square()
    log_slope = torch.where(inside, (s.square() * inner / below.square()).log(), 0.0)
    return _Parts(y, log_slope, inside, k, shares, width, height, t, left, right)


class _Spline(torch.autograd.Function):
    """The spline with the gradient of both outputs in closed form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, bound: float, slope: float) -> tuple[Tensor, Tensor]:
        parts = _evaluate(x, parameters, bound, slope)
        ctx.bound, ctx.slope = bound, slope
        ctx.save_for_backward(x, parameters, *parts[1:])
        return parts.y, parts.log_slope

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        x, parameters, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            # to be differentiated again: through the recorded operations
            parts = _evaluate(x, parameters, ctx.bound, ctx.slope)
            wanted = [v for v in (x, parameters) if v.requires_grad]
            found = iter(torch.autograd.grad(
                (parts.y, parts.log_slope), wanted, (grad_y, grad_log_slope), create_graph=True
            ))  # fmt: skip
            return (*(next(found) if v.requires_grad else None for v in (x, parameters)), None, None)
        parts = _Parts(grad_y, *saved)
        return (*_gradient(parameters, parts, grad_y, grad_log_slope, ctx.bound, ctx.slope), None, None)


def _gradient(
    parameters: Tensor, parts: _Parts, grad_y: Tensor, grad_log_slope: Tensor, bound: float, slope: float
) -> tuple[Tensor, Tensor]:
    """Gradient in the points and in the parameters."""
    width, height, t, left, right = parts.width, parts.height, parts.t, parts.left, parts.right
    zero = parts.inside.to(t)
    gy, gl = grad_y * zero, grad_log_slope * zero
    s, rest = height / width, 1 - t
    both, turn, square, rest_square = t * rest, 1 - 2 * t, t.square(), rest.square()
    bend = left + right - 2 * s
    below = 1 / (s + bend * both)
    inner = 1 / (2 * s * both + left * rest_square + right * square)
    ratio = (s * square + left * both) * below
    # derivatives of y / height = ratio and of the log slope in t, chord and both end slopes
    derivative = parts.log_slope.exp()
    inner_t = 2 * (s * turn - left * rest + right * t)
    grad_t = gy * derivative * width + gl * (inner_t * inner - 2 * bend * turn * below)
    chord = 1 - 2 * both
    scaled = gy * height * below
    twice = 2 * gl * below
    grad_s = scaled * (square - ratio * chord) + 2 * gl * (1 / s + both * inner) - twice * chord
    grad_left = scaled * both * (1 - ratio) + gl * rest_square * inner - twice * both
    grad_right = gl * square * inner - scaled * both * ratio - twice * both
    per_width = 1 / width
    grad_x0 = -grad_t * per_width
    grad_width = (grad_x0 * t) - grad_s * s * per_width
    grad_height = gy * ratio + grad_s * per_width
    at_start, at_size = torch.stack([grad_x0, gy], -1), torch.stack([grad_width, grad_height], -1)
    to_sizes = _through_shares(parameters, parts, at_start, at_size, bound, slope)
    to_knots = _through_knots(parameters, parts, torch.stack([grad_left, grad_right], -1), slope)
    grad_x = torch.where(parts.inside, -grad_x0, grad_y)
    return grad_x, torch.cat([to_sizes.flatten(-2), to_knots], -1)


def _through_shares(
    parameters: Tensor, parts: _Parts, at_start: Tensor, at_size: Tensor, bound: float, slope: float
) -> Tensor:
    """From the start and the size of the bin to the unconstrained sizes of all bins, ``(*shape, 2, bins)``."""
    shares = parts.shares
    bins = shares.shape[-1]
    number = torch.arange(bins, device=shares.device)
    before, here = (number < parts.k).unsqueeze(-2), (number == parts.k).unsqueeze(-2)
    grad = before * at_start.unsqueeze(-1) + here * at_size.unsqueeze(-1)
    grad = shares * (grad - (grad * shares).sum(-1, keepdim=True))
    sizes = parameters[..., : 2 * bins].unflatten(-1, (2, bins))
    squash = 1 + (2 / abs(math.log(slope))) * sizes.abs()
    out: Tensor = grad * (2 * bound) / squash.square()
    return out


def _through_knots(parameters: Tensor, parts: _Parts, grad: Tensor, slope: float) -> Tensor:
    """From the slopes at both ends of the bin to the unconstrained slopes at inner knots, ``(*shape, bins - 1)``."""
    bins = parts.shares.shape[-1]
    grad = grad * torch.stack([parts.left, parts.right], -1)
    spread = grad.new_zeros(*grad.shape[:-1], bins + 1).scatter_(-1, torch.cat([parts.k, parts.k + 1], -1), grad)
    squash = 1 + parameters[..., 2 * bins :].abs() / abs(math.log(slope))
    out: Tensor = spread[..., 1:-1] / squash.square()
    return out
