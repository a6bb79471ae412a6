"""What is watched to see whether a fit has settled: means and log sds, in units that do not depend on the problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vifamily.types import Capability, Space

__all__ = ["bad_parameter", "has_moments", "meetings", "units", "watched"]

MOST_WATCHED = 400
_MET = 0.1
"""Spread of an ensemble of points, in standardised units, below which its members count as one."""


def has_moments(family: Any) -> bool:
    """Whether means and sds of the family's coordinates are what is watched."""
    latent = getattr(family, "latent", None)
    return latent is not None and latent.dim > 0 and latent.space is Space.REAL


@torch.no_grad()
def watched(family: Any, noise: Tensor, parameters: Tensor) -> Tensor:
    """Means and log sds of each coordinate on fixed noise, for every restart; parameters where there are none.

    Args:
        family: A family, or several stacked.
        noise: ``([restart,] draw, ...)``.
        parameters: Flat parameters ``(restart, number)``.

    Returns:
        ``(quantity,)``: all means, then all log sds.
    """
    if not has_moments(family):
        return parameters[:, :MOST_WATCHED].reshape(-1).clone()
    draw = family(noise)
    z, weight = draw.z[..., :MOST_WATCHED], draw.log_weight.exp().unsqueeze(-1)
    mean = (weight * z).sum(-2)
    variance = (weight * (z - mean.unsqueeze(-2)) ** 2).sum(-2)
    if Capability.FINITE in family.capabilities and Capability.LOG_Q not in family.capabilities:
        # points may meet: how close they then are is no quantity to wait for
        scale = family.coordinate_scale()[..., :MOST_WATCHED]
        variance = torch.maximum(variance, (_MET * scale).square())
    return torch.cat([mean.reshape(-1), 0.5 * variance.clamp_min(1e-300).log().reshape(-1)])


def units(family: Any, row: Tensor) -> Tensor:
    """Unit of each watched quantity: posterior sds for means, one for log sds."""
    if not has_moments(family):
        return torch.ones_like(row)
    half = len(row) // 2
    out = torch.ones_like(row)
    torch.exp(row[half:], out=out[:half])
    return out


def meetings(row: Tensor, restarts: int, tolerance: float) -> tuple[list[int], list[int]]:
    """Which restarts stand at one place.

    Args:
        row: What is watched of all restarts, as :func:`watched` gives it for families with moments.
        restarts: Their number.
        tolerance: Largest distance of means (in sds) and of log sds within one place.

    Returns:
        The first restart at each place, and for each restart the number of its place.
    """
    mean, log_sd = row.reshape(2, restarts, -1)
    kept: list[int] = []
    place: list[int] = []
    for i in range(restarts):
        apart = [
            torch.maximum(((mean[i] - mean[k]) / log_sd[k].exp()).abs(), (log_sd[i] - log_sd[k]).abs()) for k in kept
        ]
        met = [number for number, distance in enumerate(apart) if float(distance.max()) < tolerance]
        place.append(met[0] if met else len(kept))
        if not met:
            kept.append(i)
    return kept, place


def bad_parameter(groups: list[Any], owners: list[Any], packed: list[Tensor]) -> str | None:
    """Name of the first parameter whose gradient is not finite.

    Args:
        groups: Flat parameters.
        owners: The module that each group's parameters come from.
        packed: Gradients laid out as the groups are.
    """
    for group, owner, gradient in zip(groups, owners, packed, strict=True):
        columns = (~torch.isfinite(gradient)).any(0).nonzero()
        if len(columns):
            lookup = {id(p): n for n, p in owner.named_parameters()}
            name: str = group.name_of(int(columns[0]), [lookup.get(id(p), "unknown") for p in group.parameters])
            return name
    return None
