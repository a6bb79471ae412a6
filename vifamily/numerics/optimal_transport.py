"""Optimal transport between weighted point sets with an entropic penalty, by Sinkhorn's iterations in log space."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Transport", "own_transport", "sinkhorn", "sinkhorn_divergence"]

_OVERSTEP = 1.5
_SETTLED = 1e-11


@dataclasses.dataclass(frozen=True)
class Transport:
    """A solved problem of entropic optimal transport.

    Attributes:
        value: Cost of the plan plus the penalty, ``(...)``.
        first: Potential on the first set, ``(..., n)``: the slope of the value in its weights, up to a constant.
        second: Potential on the second set, ``(..., m)``.
        plan: Mass moved between points, ``(..., n, m)``: the slope of the value in the costs.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    plan: Tensor


@torch.no_grad()
def sinkhorn(
    cost: Tensor, first: Tensor, second: Tensor, *, epsilon: float, iterations: int, symmetric: bool = False
) -> Transport:
    r"""Solve entropic optimal transport between two weighted sets.

    .. math:: \min_{P \ge 0} \sum_{ij} P_{ij} C_{ij}
              + \varepsilon \sum_{ij} P_{ij} \log \frac{P_{ij}}{a_i b_j}, \qquad P 1 = a, \quad P^\top 1 = b .

    By alternating updates of the potentials (Cuturi 2013), in log space, so that a small :math:`\varepsilon` does not
    underflow; the penalty is halved from the spread of the costs down to :math:`\varepsilon`, and from there on the
    updates overstep by half (Thibault et al. 2017), which takes far fewer of them. The last update makes the marginal
    of the columns exact. No gradient passes: at the solution the derivative in the costs is the plan, and that in the
    weights the potentials.

    Args:
        cost: ``(..., n, m)``.
        first: Log weights of the rows, ``(..., n)``, normalised.
        second: Log weights of the columns, ``(..., m)``, normalised.
        epsilon: Strength of the penalty, positive, in units of the cost.
        iterations: Most updates of both potentials; fewer are made where they settle.
        symmetric: Both sets are the same and the cost is symmetric: one potential, averaged with its update, which
            converges in a few steps.

    Returns:
        The solution.

    Example:
        >>> import math, torch
        >>> half = torch.full((2,), math.log(0.5), dtype=torch.float64)
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> round(float(sinkhorn(cost, half, half, epsilon=0.01, iterations=20).value), 4)
        0.0069
    """
    f, g = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
    first, second = first.expand_as(f), second.expand_as(g)
    spread, halvings = cost.amax((-1, -2)) - cost.amin((-1, -2)), 0
    # a strong penalty at first: with the weak one alone, far sets take very many steps to find each other
    while halvings < iterations:
        now = (spread * 0.5 ** (halvings + 1)).clamp_min(epsilon).unsqueeze(-1)
        halvings += 1
        if symmetric:
            f = g = 0.5 * (f + _update(cost, g, second, now))
        else:
            f = _update(cost, g, second, now)
            g = _update(cost.mT, f, first, now)
        if not bool((now > epsilon).any()):
            break
    f, g = _scaled(cost, f, g, first, second, epsilon, iterations - halvings, symmetric=symmetric)
    if not symmetric:
        g = _update(cost.mT, f, first, now)
    joint = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon + first.unsqueeze(-1) + second.unsqueeze(-2)
    plan = joint.exp()
    # the dual value; its last term is zero where the plan has mass one
    value = (first.exp() * f).sum(-1) + (second.exp() * g).sum(-1) - epsilon * (plan.sum((-1, -2)) - 1)
    return Transport(value, f, g, plan)


def _update(cost: Tensor, other: Tensor, log_weight: Tensor, epsilon: Tensor) -> Tensor:
    """Potential of the rows that makes their marginal right, given that of the columns."""
    scaled = (other.unsqueeze(-2) - cost) / epsilon.unsqueeze(-1) + log_weight.unsqueeze(-2)
    return -epsilon * torch.logsumexp(scaled, -1)


def _scaled(
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    first: Tensor,
    second: Tensor,
    epsilon: float,
    iterations: int,
    *,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """Go on from potentials that are nearly right by factors on their plan: products of matrices, many times faster."""
    density = ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp()
    a, b, u, v = first.exp(), second.exp(), torch.ones_like(f), torch.ones_like(g)
    # where potentials are large, their rounding is what an update can resolve
    resolution = 8 * torch.finfo(f.dtype).eps * (1 + float(f.abs().amax()) / epsilon)
    for _ in range(iterations):
        # the power is 1 where the total is: half a step for one potential, one and a half for two
        total = (density @ (b * v).unsqueeze(-1)).squeeze(-1) * u
        if symmetric:
            u = v = u * total**-0.5
        else:
            u = u * total**-_OVERSTEP
            v = v * (((density.mT @ (a * u).unsqueeze(-1)).squeeze(-1) * v) ** -_OVERSTEP)
        if float((total - 1).abs().amax()) <= max(_SETTLED, resolution):
            break
    moved = f + epsilon * u.log(), g + epsilon * v.log()
    # a factor out of range (a penalty far too small for the iterations allowed) leaves the potentials as they were
    return moved if all(bool(torch.isfinite(part).all()) for part in moved) else (f, g)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    iterations: int,
    log_weight_x: Tensor | None = None,
    log_weight_y: Tensor | None = None,
    own_y: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sinkhorn divergence between two point sets, with squared distances as costs.

    .. math:: S_\varepsilon(x, y) = \mathrm{OT}_\varepsilon(x, y) - \tfrac12 \mathrm{OT}_\varepsilon(x, x)
              - \tfrac12 \mathrm{OT}_\varepsilon(y, y)

    Zero where the two weighted sets are the same, positive elsewhere (Feydy et al. 2019). It tends to the squared
    Wasserstein distance of order 2 for a small :math:`\varepsilon`, and to the squared distance of the means for a
    large one.

    Args:
        x: ``(..., n, dim)``; a gradient passes to these points and their weights.
        y: ``(m, dim)`` or ``(..., m, dim)``; none passes to these.
        epsilon: Strength of the penalty, in squared units of the coordinates.
        iterations: Most iterations of each problem.
        log_weight_x: Normalised log weights of ``x``, ``(n,)`` or ``(..., n)``; equal ones if None.
        log_weight_y: Normalised log weights of ``y``, likewise.
        own_y: Value of the transport from ``y`` to itself, where it is known; None computes it.

    Returns:
        The divergence, detached, and a surrogate whose gradient is the divergence's at its converged potentials, each
        ``(...)``.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
        >>> value, _ = sinkhorn_divergence(x, x.flip(0) + 2.0, epsilon=0.1, iterations=100)
        >>> round(float(value), 4)
        4.0
    """
    leading = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = x.expand(*leading, *x.shape[-2:]), y.detach()
    a, b = _weights(log_weight_x, x), _weights(log_weight_y, y)
    cost, own_cost = _square(x, y), _square(x, x)
    options = {"epsilon": epsilon, "iterations": iterations}
    across = sinkhorn(cost.detach(), a.detach(), b.detach(), **options)  # type: ignore[arg-type]
    own = sinkhorn(own_cost.detach(), a.detach(), a.detach(), symmetric=True, **options)  # type: ignore[arg-type]
    other = own_transport(y, epsilon=epsilon, iterations=iterations, log_weight=b) if own_y is None else own_y
    value = across.value - 0.5 * (own.value + other)
    moved = (across.plan * cost).sum((-1, -2)) - 0.5 * (own.plan * own_cost).sum((-1, -2))
    weighed = (a.exp() * (across.first - own.first)).sum(-1)
    return value, moved + weighed


def own_transport(y: Tensor, *, epsilon: float, iterations: int, log_weight: Tensor | None = None) -> Tensor:
    """Value of the transport of a weighted set to itself, with squared distances as costs, ``(..., m, dim) -> (...)``.

    Args:
        y: The points.
        epsilon: Strength of the penalty.
        iterations: Most iterations.
        log_weight: Normalised log weights; equal ones if None.

    Returns:
        The value, without gradient.
    """
    b = _weights(log_weight, y).detach()
    return sinkhorn(_square(y, y), b, b, epsilon=epsilon, iterations=iterations, symmetric=True).value


def _weights(log_weight: Tensor | None, points: Tensor) -> Tensor:
    size = points.shape[-2]
    return points.new_full((size,), 1.0 / size).log() if log_weight is None else log_weight
