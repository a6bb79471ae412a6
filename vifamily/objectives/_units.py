"""What a log likelihood is given for: a datum, or a group of data taken as one."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.types import Batch, Capability, ModelLike

__all__ = ["Unit", "check_unit", "unit_log_likelihood", "unit_needs"]

Unit = Literal["datum", "group"]


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
