"""Test functions that are learned: vector fields with their divergence, for one fit or for several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, ShapeError

__all__ = ["Critic", "Perceptron"]

_MOST_EXACT = 10
"""Coordinates up to which the trace is exact where each takes a pass of its own."""


class Perceptron(nn.Module):
    r"""A vector field ``f(u) = A u + c + net(u)`` with tanh units, and its exact divergence.

    The field that is best against a Gaussian is linear, so the linear part finds it at once and the network is left
    with what is not Gaussian. With one or two hidden layers the trace of the Jacobian is a single form in the slopes of
    the units,

    .. math:: \nabla \cdot f = \operatorname{tr} A
              + \sum_{ij} (1 - h_{2,i}^2) \, W_{2,ij} \, (1 - h_{1,j}^2) \, (W_1 W_3)_{ji},

    whose cost does not grow with the dimension; with more layers a tangent is carried forward for each coordinate, or
    for each probe.

    Args:
        dim: Number of coordinates.
        hidden: Widths of the hidden layers.
        generator: Randomness of the weights.
        dtype: Floating dtype.
        device: Device.
        max_norm: Largest norm of a unit's incoming weights; None for no bound. It bounds the field and its divergence;
            there is no linear part then.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.max_norm = max_norm
        sizes = [dim, *hidden, dim]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
            made = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / math.sqrt(inputs)
            offset = torch.randn(outputs, generator=generator, dtype=torch.float64)
            if outputs == dim and len(self.weights) == len(hidden):
                made, offset = 0.1 * made, torch.zeros_like(offset)
            self.weights.append(nn.Parameter(made.to(device=device, dtype=dtype)))
            self.biases.append(nn.Parameter(offset.to(device=device, dtype=dtype)))
        self.linear: nn.Parameter | None = None
        if max_norm is None:
            self.linear = nn.Parameter(torch.zeros(dim, dim, dtype=dtype, device=device))

    def _layers(self) -> list[Tensor]:
        if self.max_norm is None:
            return list(self.weights)
        # as a factor, so that the bound holds at every step and is differentiated
        return [w * (self.max_norm / w.norm(dim=-1, keepdim=True).clamp_min(self.max_norm)) for w in self.weights]

    def forward(self, u: Tensor) -> Tensor:
        """Return the field, ``(..., draw, dim)``."""
        return self.with_divergence(u, None)[0]

    def with_divergence(self, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the field and its divergence.

        Args:
            u: ``([restart,] draw, dim)``; with a restart axis the parameters have one too.
            probes: ``(draw, probe, dim)`` of entries plus and minus one for an estimate of the trace; None for the
                trace itself.

        Returns:
            ``([restart,] draw, dim)`` and ``([restart,] draw)``.
        """
        weights = self._layers()
        h, slopes = u, []
        for w, b in zip(weights[:-1], list(self.biases)[:-1], strict=True):
            h = torch.tanh(h @ w.mT + b.unsqueeze(-2))
            slopes.append(1 - h.square())
        out = h @ weights[-1].mT + self.biases[-1].unsqueeze(-2)
        if probes is None and len(slopes) <= 2:
            trace = _short_trace(weights, slopes, u)
        else:
            trace = _tangent_trace(weights, slopes, u, probes)
        if self.linear is not None:
            out = out + u @ self.linear.mT
            if probes is None:
                trace = trace + torch.diagonal(self.linear, dim1=-2, dim2=-1).sum(-1, keepdim=True)
            else:
                image = probes @ self.linear.mT.unsqueeze(-3)
                trace = trace + (probes * image).sum((-1, -2)) / probes.shape[-2]
        return out, trace


def _short_trace(weights: list[Tensor], slopes: list[Tensor], u: Tensor) -> Tensor:
    if not slopes:
        return torch.diagonal(weights[0], dim1=-2, dim2=-1).sum(-1, keepdim=True).expand(u.shape[:-1])
    around = weights[0] @ weights[-1]
    if len(slopes) == 1:
        return (slopes[0] * torch.diagonal(around, dim1=-2, dim2=-1).unsqueeze(-2)).sum(-1)
    return ((slopes[0] @ (weights[1] * around.mT).mT) * slopes[1]).sum(-1)


def _tangent_trace(weights: list[Tensor], slopes: list[Tensor], u: Tensor, probes: Tensor | None) -> Tensor:
    count = u.shape[-1] if probes is None else probes.shape[-2]
    directions = torch.eye(count, dtype=u.dtype, device=u.device).unsqueeze(0) if probes is None else probes
    tangent = directions
    for w, slope in zip(weights[:-1], slopes, strict=True):
        tangent = (tangent @ w.mT.unsqueeze(-3)) * slope.unsqueeze(-2)
    along = (directions * (tangent @ weights[-1].mT.unsqueeze(-3))).sum((-1, -2))
    return along if probes is None else along / count


class _Given(nn.Module):
    """A user's module, its divergence by reverse differentiation."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def with_divergence(self, u: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            at = u if u.requires_grad else u.detach().requires_grad_()
            out = self.module(at)
            if not isinstance(out, Tensor) or out.shape != u.shape:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ShapeError(f"a critic must map points {tuple(u.shape)} to a field of that shape, got {got}.")
            if probes is None:
                parts = [_gradient(out[..., i].sum(), at)[..., i] for i in range(u.shape[-1])]
                trace = torch.stack(parts, -1).sum(-1)
            else:
                each = [probes[..., k, :] for k in range(probes.shape[-2])]
                trace = torch.stack([(_gradient((out * v).sum(), at) * v).sum(-1) for v in each]).mean(0)
        return (out, trace) if wanted else (out.detach(), trace.detach())


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    (out,) = torch.autograd.grad(value, at, create_graph=True, allow_unused=True)
    return torch.zeros_like(at) if out is None else out


class Critic(nn.Module):
    """A field in the standardised coordinates of a family, the parameters of each restart apart.

    A posterior whose coordinates differ in size by orders of magnitude would otherwise be met by a network that sees
    only the largest.

    Args:
        make: From a number of coordinates to a module with ``with_divergence``, or to any module that maps points to a
            field of the same shape, draw by draw.
        dim: Number of coordinates.
        shift: The family's shift, ``([restart,] dim)``.
        scale: Its scale, ``([restart,] dim)`` or ``([restart,] dim, dim)``.
        full: Whether the scale is a matrix.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, make: Callable[[int], Any], dim: int, shift: Tensor, scale: Tensor, *, full: bool) -> None:
        super().__init__()
        self.full, self.dim = full, dim
        self.register_buffer("shift", shift.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        restarts = shift.shape[0] if shift.dim() == 2 else None
        made = make(dim)
        if not isinstance(made, nn.Module):
            raise ConfigError(f"critic= must be a function from a number of coordinates to a module, got {made!r:.60}.")
        self.side_by_side = isinstance(made, Perceptron)
        if isinstance(made, Perceptron):
            if restarts is not None:
                for parameter in made.parameters():
                    parameter.data = parameter.data.expand(restarts, *parameter.shape).clone()
            self.nets = nn.ModuleList([made])
            return
        one = _Given(made.to(dtype=shift.dtype, device=shift.device))
        others = [_Given(make(dim).to(dtype=shift.dtype, device=shift.device)) for _ in range((restarts or 1) - 1)]
        for other in others:
            other.load_state_dict(one.state_dict())
        self.nets = nn.ModuleList([one, *others])

    def exact_trace_is_cheap(self) -> bool:
        """Whether the exact divergence costs no more than a few passes."""
        net: Any = self.nets[0]
        return self.dim <= _MOST_EXACT or (self.side_by_side and len(net.weights) <= 3)

    def standard(self, z: Tensor) -> Tensor:
        """Points in standardised coordinates."""
        centred = z - self.shift.unsqueeze(-2)
        if not self.full:
            return centred / self.scale.unsqueeze(-2)
        solved: Tensor = torch.linalg.solve_triangular(self.scale, centred.mT, upper=False)
        return solved.mT

    def standard_score(self, score: Tensor) -> Tensor:
        """Score of the target with respect to the standardised coordinates."""
        return score @ self.scale if self.full else score * self.scale.unsqueeze(-2)

    def forward(self, z: Tensor, probes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Field and divergence at points ``([restart,] draw, dim)``, in standardised coordinates."""
        u = self.standard(z)
        if self.side_by_side or len(self.nets) == 1:
            one: Any = self.nets[0]
            if not self.side_by_side and u.dim() == 3:
                field, trace = one.with_divergence(u[0], probes)
                return field.unsqueeze(0), trace.unsqueeze(0)
            found: tuple[Tensor, Tensor] = one.with_divergence(u, probes)
            return found
        each: list[Any] = [net.with_divergence(u[r], probes) for r, net in enumerate(self.nets)]  # type: ignore[operator]
        return torch.stack([f for f, _ in each]), torch.stack([t for _, t in each])
