"""A posterior with several modes: densities on a fixed basis end alike from every seed, mixtures need not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Uniform

from vifamily import rng
from vifamily.fit import fit
from vifamily.models import Simulator

__all__ = ["FAMILIES", "Ends", "ends", "exact_log_density"]

FAMILIES = {
    "B-splines": "natural(kind='spline', basis=14, degree=2)",
    "mixture of normals": "mixture(components=5, of=full_rank)",
}
"""The two families by name: fourteen splines of degree two, and a mixture density network with five components."""
_ENCODER = "vector(hidden=[64, 64])"
_GRID, _OBSERVATIONS = 400, 300


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where a family ends, each ``(seed,)``.

    Attributes:
        divergence: Inclusive divergence from the exact posterior, mean over new observations, in nats.
        steps: Steps taken.
    """

    divergence: Tensor
    steps: Tensor

    @property
    def spread(self) -> float:
        """Largest minus least divergence."""
        return float(self.divergence.max() - self.divergence.min())


def _simulator() -> Simulator:
    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        return torch.sin(2 * theta) + torch.randn(theta.shape, generator=generator)

    return Simulator(Uniform(torch.zeros(1), 2 * math.pi * torch.ones(1)), simulate, batched=True, name="sinusoid")


def exact_log_density(x: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of ``z`` uniform on the circle's length given ``x ~ N(sin 2z, 1)``, on a grid of midpoints.

    Args:
        x: Observations, ``(datum,)``.

    Returns:
        The grid ``(point,)``, and log densities ``(point, datum)``, normalised on it.
    """
    grid = (torch.arange(_GRID, dtype=torch.float64) + 0.5) * 2 * math.pi / _GRID
    joint = -0.5 * (x.double() - torch.sin(2 * grid)[:, None]).square()
    return grid, joint - joint.logsumexp(0) - math.log(2 * math.pi / _GRID)


def _divergence(posterior: Any, simulator: Simulator, x: Tensor) -> float:
    grid, exact = exact_log_density(x[:, 0])
    z = simulator.unconstrained(grid.unsqueeze(-1)).unsqueeze(1).expand(-1, len(x), 1)
    log_jacobian = simulator.layout.constrain_with_jacobian(z.double())[1]
    found = posterior.log_prob(z, x).double() - log_jacobian
    return float((exact.exp() * (exact - found)).sum(0).mean() * 2 * math.pi / _GRID)


def ends(family: str, seeds: list[int], *, steps: int) -> Ends:
    """Fit one family by fresh simulations from several seeds, and measure where it ends.

    Args:
        family: Its spec.
        seeds: Root seeds: of the network's start and of the simulations.
        steps: Most steps of each fit.
    """
    simulator = _simulator()
    new = simulator.simulations(_OBSERVATIONS, seed=rng.split(seeds[0], "sinusoid, new observations")).x
    found, taken = [], []
    for seed in seeds:
        posterior = fit(
            simulator, family, "inclusive_kl(simulations=None)", encoder=_ENCODER, steps=steps, seed=seed,
            progress=False,
        )  # fmt: skip
        found.append(_divergence(posterior, simulator, new))
        taken.append(posterior.record.steps)
    return Ends(torch.tensor(found, dtype=torch.float64), torch.tensor(taken))
