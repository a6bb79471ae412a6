"""A rotated pattern: the inclusive and the exclusive divergence on one family, one network and one start each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vifamily.numerics.exponential_families import VonMises
from vifamily.rng import generator

__all__ = ["DIRECTIONS", "Amortised", "amortised", "pointwise"]

DIRECTIONS = 12
"""Starts: the angle that the family points to before training, evenly around the circle."""
SENSORS, NOISE = 24, 0.25
_CENTRES, _HEIGHTS, _SHARPNESS = (0.0, 2.2, 3.9), (1.0, 0.7, 0.85), 8.0
_GRID, _FINE = 120, 360
_WRONG = math.radians(30)
_FAMILY = VonMises()


def _angles(count: int) -> Tensor:
    return 2 * math.pi * torch.arange(count, dtype=torch.float64) / count


def _pattern(theta: Tensor) -> Tensor:
    """What the sensors see without noise, for angles ``(...)``: ``(..., SENSORS)``."""
    at = _angles(SENSORS) - theta.unsqueeze(-1)
    bumps = [h * (_SHARPNESS * ((at - c).cos() - 1)).exp() for c, h in zip(_CENTRES, _HEIGHTS, strict=True)]
    return torch.stack(bumps).sum(0)


def _simulate(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    theta = 2 * math.pi * torch.rand(count, generator=source, dtype=torch.float64)
    noise = torch.randn(count, SENSORS, generator=source, dtype=torch.float64)
    return theta, _pattern(theta) + NOISE * noise


class _Posterior:
    """Exact posteriors of angles on a grid, for observations ``(x, SENSORS)``.

    Sums over the grid are exact to rounding where densities are no narrower than its cells.
    """

    def __init__(self, x: Tensor, points: int) -> None:
        grid = _angles(points)
        self.cell = 2 * math.pi / points
        self.statistics = torch.stack([grid.cos(), grid.sin()], dim=1)
        logs = -0.5 * ((x.unsqueeze(1) - _pattern(grid)) / NOISE).square().sum(-1)
        self.log_joint = logs - logs.logsumexp(1, keepdim=True) - math.log(self.cell)

    @property
    def mean(self) -> Tensor:
        """Posterior mean of the statistics, ``(x, 2)``."""
        return (self.log_joint.exp() * self.cell) @ self.statistics

    def log_q(self, eta: Tensor) -> Tensor:
        """Log densities of the family on the grid, ``(..., x, points)``, for natural parameters ``(..., x, 2)``."""
        return eta @ self.statistics.T - _FAMILY.log_partition(eta).unsqueeze(-1)

    def forward_kl(self, eta: Tensor) -> Tensor:
        """Inclusive divergence, ``(..., x)``."""
        return (self.log_joint.exp() * (self.log_joint - self.log_q(eta))).sum(-1) * self.cell

    def reverse_kl(self, eta: Tensor) -> Tensor:
        """Exclusive divergence, minus the bound up to the log evidence, ``(..., x)``."""
        log_q = self.log_q(eta)
        return (log_q.exp() * (log_q - self.log_joint)).sum(-1) * self.cell


# -- amortised ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Amortised:
    """What came of twelve starts of one objective, each ``(start,)``.

    Attributes:
        forward_kl: Mean inclusive divergence over test observations.
        wrong: Share of test observations whose angle is off by more than thirty degrees.
        median: Median error of the angle, in degrees.
    """

    forward_kl: Tensor
    wrong: Tensor
    median: Tensor


class _Encoders:
    """One-layer ReLU networks side by side, one for each start, in the tangent-kernel parametrisation.

    All share their first weights; output weights start at zero, and an offset points each to its direction.
    """

    def __init__(self, width: int, length: float, seed: int) -> None:
        source = generator(seed, "encoder", width)
        many = DIRECTIONS

        def normal(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=source, dtype=torch.float64).expand(many, *shape).clone()

        turn = _angles(many)
        self.offset = length * torch.stack([turn.cos(), turn.sin()], dim=1).unsqueeze(1)
        self.parameters = [normal(SENSORS, width), normal(1, width), torch.zeros(many, width, 2, dtype=torch.float64)]
        for p in self.parameters:
            p.requires_grad_()
        self.scale = math.sqrt(width)

    def __call__(self, x: Tensor) -> Tensor:
        first, bias, last = self.parameters
        return self.offset + torch.relu(x @ first + bias) @ last / self.scale


def amortised(objective: str, *, length: float, width: int = 256, steps: int = 4000, seed: int = 0) -> Amortised:
    """Train twelve encoders from twelve directions on fresh simulations, by the same steps of Adam for any objective.

    Args:
        objective: ``"inclusive"`` on the simulated angles, or ``"exclusive"``, the negative bound by exact quadrature.
        length: Length of the natural parameter at the start.
        width: Hidden units.
        steps: Steps of Adam, 32 fresh observations each, step size falling linearly from 0.01.
        seed: Root seed.
    """
    nets, source = _Encoders(width, length, seed), generator(seed, "simulations")
    optimiser = torch.optim.Adam(nets.parameters, lr=0.01)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        theta, x = _simulate(32, source)
        eta = nets(x)
        if objective == "inclusive":
            loss = _FAMILY.loss(eta, torch.stack([theta.cos(), theta.sin()], dim=1))
        else:
            loss = _Posterior(x, _GRID).reverse_kl(eta)
        optimiser.zero_grad()
        loss.mean(1).sum().backward()
        optimiser.step()
    theta, x = _simulate(400, generator(seed, "test"))
    with torch.no_grad():
        eta = nets(x)
        forward = _Posterior(x, _FINE).forward_kl(eta).mean(1)
    off = torch.atan2(eta[..., 1], eta[..., 0]) - theta
    error = torch.atan2(off.sin(), off.cos()).abs()
    return Amortised(forward, (error > _WRONG).double().mean(1), torch.rad2deg(error.median(1).values))


# -- one observation at a time -----------------------------------------------------------------------------------------
def pointwise(*, observations: int = 60, steps: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Fit one natural parameter to each observation from twelve directions and three lengths, by both divergences.

    The inclusive one by damped Newton steps; the exclusive one by Adam on its exact gradient, then by the same.

    Returns:
        One row for each divergence and length: the largest value above the best found for its observation, the share of
        starts more than a nat above, how many observations have several optima more than half a nat apart, and the
        largest gradient left.
    """
    _, x = _simulate(observations, generator(seed, "pointwise"))
    posterior = _Posterior(x, _GRID)
    turn = _angles(DIRECTIONS)
    start = torch.stack([turn.cos(), turn.sin()], dim=1).unsqueeze(1).expand(-1, observations, -1)
    ends: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}
    for length in (1e-3, 5.0, 30.0):
        ends["inclusive", length] = _newton(posterior.forward_kl, length * start)
        ends["exclusive", length] = _newton(posterior.reverse_kl, _adam(posterior.reverse_kl, length * start, steps))
    best = {
        kind: torch.stack([value for (name, _), (value, _) in ends.items() if name == kind]).amin((0, 1))
        for kind in ("inclusive", "exclusive")
    }
    return [
        {
            "divergence": kind, "length": length, "spread": float((value - best[kind]).max()),
            "stuck": float((value - best[kind] > 1).double().mean()), "gradient": float(slope.max()),
            "value": float(value.mean()), "several": int((_distinct(value) > 1).sum()),
        }
        for (kind, length), (value, slope) in ends.items()
    ]  # fmt: skip


def _distinct(value: Tensor) -> Tensor:
    """Number of values more than half a nat apart among the starts of each observation."""
    return (value.sort(0).values.diff(dim=0) > 0.5).sum(0) + 1


def _adam(value: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    eta = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([eta], lr=0.3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.3 * (1 - step / steps)
        (eta.grad,) = torch.autograd.grad(value(eta).sum(), eta)
        optimiser.step()
    return eta.detach()


def _newton(value: Callable[[Tensor], Tensor], eta: Tensor, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Descend to an optimum nearby; values and lengths of gradients, ``(start, x)``.

    Newton steps with the absolute eigenvalues of the Hessian, no longer than half of the parameter, halved until the
    value falls enough.
    """
    for _ in range(steps):
        here, slope, bend = _derivatives(value, eta)
        if float(slope.norm(dim=-1).max()) < 1e-9:
            break
        values, vectors = torch.linalg.eigh(bend)
        along = (vectors.transpose(-1, -2) @ slope.unsqueeze(-1)) / values.abs().clamp_min(1e-12).unsqueeze(-1)
        step = (vectors @ along).squeeze(-1)
        longest = 0.5 * (1 + eta.norm(dim=-1, keepdim=True))
        step = step * (longest / step.norm(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)
        size, worse = torch.ones_like(eta[..., :1]), torch.ones_like(here, dtype=torch.bool)
        for _ in range(40):
            # rounding of the value is allowed for, or the last steps would be refused
            allowed = here - 1e-4 * (size * step * slope).sum(-1) + 1e-13 * here.abs()
            worse = ~(value(eta - size * step) <= allowed)
            if not bool(worse.any()):
                break
            size = torch.where(worse.unsqueeze(-1), 0.5 * size, size)
        eta = eta - torch.where(worse.unsqueeze(-1), torch.zeros_like(step), size * step)
    here, slope, _ = _derivatives(value, eta)
    return here, slope.norm(dim=-1)


def _derivatives(value: Callable[[Tensor], Tensor], eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    at = eta.detach().requires_grad_()
    here = value(at)
    (slope,) = torch.autograd.grad(here.sum(), at, create_graph=True)
    rows = [torch.autograd.grad(slope[..., i].sum(), at, retain_graph=True)[0] for i in range(2)]
    return here.detach(), slope.detach(), torch.stack(rows, dim=-2)
