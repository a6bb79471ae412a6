"""What objectives per datum share: units of likelihood (a datum, or a group as one), and the part of the prior."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.objectives._base import weighted_sum
from vifamily.types import Batch, Capability, Draw, FamilyLike, ModelLike

__all__ = ["Unit", "check_order", "check_unit", "density", "prior_part", "unit_log_likelihood", "unit_needs"]

Unit = Literal["datum", "group"]


def check_order(entry: str, name: str, value: Any) -> None:
    """Raise ConfigError unless a power is a finite number from 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 <= value < math.inf):
        raise ConfigError(f"{entry}({name}=...) must be a finite number from 0, got {value!r}.")


def check_unit(name: str, unit: object) -> None:
    """Raise ConfigError unless a unit is one of those that exist."""
    if unit not in get_args(Unit):
        raise ConfigError(f"{name}(unit=...) must be one of {', '.join(map(repr, get_args(Unit)))}, got {unit!r}.")


def unit_needs(unit: str) -> frozenset[Capability]:
    """What a unit needs of a model."""
    return frozenset({Capability.PER_DATUM} | ({Capability.GROUPS} if unit == "group" else set()))


def unit_log_likelihood(model: ModelLike, z: Tensor, batch: Batch | None, unit: str) -> Tensor:
    """Log likelihood of each unit, unscaled, ``(..., draw, dim) -> (..., draw, unit)``.

    Args:
        model: A model with a log likelihood per datum, and with groups for ``unit="group"``.
        z: Points on unconstrained space.
        batch: The data to use, or None for all.
        unit: ``"datum"``, or ``"group"``: the sum over the data of a group.

    Returns:
        One column per datum, or per group in the order of the groups.
    """
    each = model.log_likelihood(z, batch)
    if unit == "datum":
        return each
    group, count = model.groups_of(batch)  # type: ignore[attr-defined]
    out = each.new_zeros(*each.shape[:-1], count)
    return out.scatter_add(-1, group.expand(each.shape), each)


def prior_part(estimator: str, family: FamilyLike, model: ModelLike, draw: Draw) -> Tensor:
    """Divergence of q from the prior, by an estimator's means; for points, which have none, its cross term.

    Args:
        estimator: ``"cross"``, ``"entropy"``, or any other name for the log density at the draws.
        family: The family.
        model: The model.
        draw: Its draws.

    Returns:
        ``(...)``, one number per restart.
    """
    log_prior = model.log_prior(draw.z)
    if estimator == "cross":
        return -weighted_sum(draw.log_weight, log_prior)
    if estimator == "entropy":
        return -weighted_sum(draw.log_weight, log_prior) - family.entropy()
    return weighted_sum(draw.log_weight, density(draw) - log_prior)


def density(draw: Draw) -> Tensor:
    """Log density of draws, or an error that says why there is none."""
    if draw.log_q is None:
        raise NotAvailableError(
            "the divergence from the prior needs the log density of the draws, and the family gave none: resolve the "
            "objective for the family first, objective.resolve(model, family)."
        )
    return draw.log_q
