"""Ensembles of a few members under the registered objective: brought to rest, or followed downhill."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from vifamily.families.ensemble import Ensemble
from vifamily.numerics.soft_routing import power_value, route
from vifamily.objectives import RenyiPredictive, unit_log_likelihood
from vifamily.reproduce._soft_specialists_cases import Case
from vifamily.types import LatentSpec

__all__ = ["EnsembleLoss", "Settled", "about", "by_unit", "flow", "mixture_loss", "responsibilities", "settle"]

F64 = torch.float64


class EnsembleLoss:
    """The loss per unit of an equally weighted ensemble of points, with its gradient.

    Args:
        case: The model, with its units.
        alpha: Order of the objective.
        num_members: Number of members.
    """

    def __init__(self, case: Case, alpha: float, num_members: int) -> None:
        self.case, self.num_members, self.dim = case, num_members, len(case.centre)
        self.family = Ensemble(size=num_members).build(LatentSpec(self.dim), generator=torch.Generator())
        self.family.logits.requires_grad = False
        self.objective = RenyiPredictive(alpha, case.unit).resolve(case.model, self.family)
        self.noise = torch.zeros(1, 0, dtype=F64)
        # the priors are so wide that they are constants
        self.constant = -float(case.model.log_prior(case.centre[None]))
        self.num_units = int((case.model.num_groups if case.unit == "group" else case.model.num_data) or 0)

    def __call__(self, points: Tensor) -> tuple[float, Tensor]:
        """Value and gradient, ``(member, dim) -> value, (member, dim)``."""
        with torch.no_grad():
            self.family.points.copy_(points)
        loss = self.objective.loss(self.family, self.case.model, self.noise)
        (slope,) = torch.autograd.grad(loss.surrogate, self.family.points)
        return (float(loss.value) - self.constant) / self.num_units, slope / self.num_units


@dataclasses.dataclass(frozen=True)
class Settled:
    """Members at rest.

    Attributes:
        points: ``(member, dim)``.
        loss: The loss per unit there.
    """

    points: Tensor
    loss: float

    @property
    def covariance(self) -> Tensor:
        """Covariance of the equally weighted members, ``(dim, dim)``."""
        apart = self.points - self.points.mean(0)
        return apart.T @ apart / len(self.points)

    @property
    def variance(self) -> float:
        """Largest eigenvalue of the covariance."""
        return float(torch.linalg.eigvalsh(self.covariance)[-1])


def about(case: Case, *, seed: int, distance: float = 1e-3, num_members: int | None = None) -> Tensor:
    """Members a small distance about the centre of a case, ``(member, dim)``, with the centre as their mean."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_members or case.num_members, len(case.centre))
    apart = torch.randn(size, generator=generator, dtype=F64)
    return case.centre + distance * (apart - apart.mean(0))


def settle(case: Case, alpha: float, points: Tensor, *, most_steps: int = 3000) -> Settled:
    """Minimise the loss over the members by L-BFGS, from given points, as far as the arithmetic goes."""
    loss = EnsembleLoss(case, alpha, len(points))

    def value_and_gradient(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, slope = loss(torch.from_numpy(x).reshape(points.shape))
        # times the number of members: each then moves as it would alone
        return len(points) * value, len(points) * slope.numpy().ravel()

    found = optimize.minimize(
        value_and_gradient, points.numpy().ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": most_steps, "maxfun": 2 * most_steps, "ftol": 0.0, "gtol": 1e-9, "maxcor": 20},
    )  # fmt: skip
    return Settled(torch.from_numpy(found.x).reshape(points.shape), float(found.fun) / len(points))


def flow(case: Case, alpha: float, points: Tensor, *, step: float, steps: int) -> Tensor:
    """Members under gradient descent, each on its own loss: ``(steps + 1, member, dim)``."""
    loss = EnsembleLoss(case, alpha, len(points))
    path = [points]
    for _ in range(steps):
        _, slope = loss(path[-1])
        path.append(path[-1] - step * len(points) * slope)
    return torch.stack(path)


@torch.no_grad()
def by_unit(case: Case, points: Tensor) -> Tensor:
    """Log likelihood of each unit under each member, ``(member, unit)``."""
    return unit_log_likelihood(case.model, points, None, case.unit)


def mixture_loss(log_p: Tensor) -> float:
    """Mean negative log score of the equally weighted mixture of members, ``(member, unit) -> float``."""
    return float(power_value(log_p, log_p.new_zeros(len(log_p)), 1.0).mean())


def responsibilities(log_p: Tensor, alpha: float) -> Tensor:
    """Share of each member in each unit, ``(member, unit)``."""
    return route(log_p, log_p.new_zeros(len(log_p)), alpha).responsibility
