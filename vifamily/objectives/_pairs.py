"""Means over pairs of draws: what the objectives that compare draws of q with reference draws share."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.objectives._base import Estimator, weighted_sum
from vifamily.types import Capability, Draw, ModelLike

__all__ = ["ESTIMATORS", "between", "reference_within", "standardised", "within"]

_PATH = frozenset({Capability.REPARAMETERISED})

ESTIMATORS = {
    "points": Estimator(
        family=_PATH | {Capability.FINITE}, never_family=frozenset({Capability.LOG_Q}), value_gradient=True
    ),
    "pairs": Estimator(family=_PATH, never_family=frozenset({Capability.WEIGHTED}), value_gradient=True),
}
"""``points``: the family is its points and weights, and sums over all pairs of them are exact. ``pairs``: draws are
independent, and the mean over pairs of different draws is unbiased; strata are not independent, hence the exclusion."""


def standardised(model: ModelLike, draw: Draw, part: Tensor, *, standardise: bool) -> tuple[Tensor, Tensor]:
    """Return draws of q and reference draws, each coordinate in units of its reference standard deviation if asked."""
    if not standardise:
        return draw.z, part
    sd = model.reference_draws.std(0)
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    return draw.z / sd, part / sd


def within(values: Tensor, log_weight: Tensor, estimator: str) -> Tensor:
    """Mean of ``values`` between two draws of q, ``(..., draw, draw) -> (...)``."""
    if estimator == "points":
        weight = log_weight.exp()
        return (weight.unsqueeze(-1) * weight.unsqueeze(-2) * values).sum((-1, -2))
    count = values.shape[-1]
    apart = values.sum((-1, -2)) - values.diagonal(dim1=-2, dim2=-1).sum(-1)
    return apart / (count * (count - 1))


def between(values: Tensor, log_weight: Tensor) -> Tensor:
    """Mean of ``values`` between a draw of q and a reference draw, ``(..., draw, reference) -> (...)``."""
    return weighted_sum(log_weight, values.mean(-1))


def reference_within(values: Tensor) -> float:
    """Mean of ``values`` between two different reference draws."""
    count = values.shape[-1]
    return float((values.sum() - values.diagonal().sum()) / (count * (count - 1)))
