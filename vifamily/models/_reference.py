"""Reference draws of a posterior, checked and mapped to unconstrained space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import DataError, ShapeError, SupportError
from vifamily.supports import Layout

__all__ = ["checked_reference"]


def checked_reference(draws: Any, layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return draws on unconstrained space, ``(draw, dim)``, of the dtype and on the device asked for.

    Args:
        draws: Points ``(draw, dim)``, or named constrained parameters ``(draw, *shape)``.
        layout: The parameters.
        dtype: Floating dtype of the result.
        device: Device of the result.

    Raises:
        ShapeError: If shapes do not fit, or there are fewer than two draws.
        DataError: If the draws are not numbers, or not finite on unconstrained space.
        SupportError: If they lie outside their supports.
        ConfigError: If names are missing or unknown.
    """
    if layout.dim == 0:
        raise ShapeError("a model without global parameters has no posterior that reference draws could be of.")
    if isinstance(draws, Mapping):
        theta = {name: _numbers(value, f"of {name!r} ") for name, value in draws.items()}
        layout.check(theta)
        z = layout.unconstrain(theta)
    else:
        z = _numbers(draws, "")
    if z.dim() != 2 or z.shape[1] != layout.dim or z.shape[0] < 2:
        named = "" if isinstance(draws, Mapping) else ", or named parameters with a draw axis first"
        raise ShapeError(
            f"reference draws must be at least two points of shape (draw, {layout.dim}) on unconstrained space{named}, "
            f"got shape {tuple(z.shape)}."
        )
    z = z.to(device=device, dtype=dtype)
    bad = ~torch.isfinite(z).all(-1)
    if bool(bad.any()):
        raise DataError(
            f"{int(bad.sum())} of {z.shape[0]} reference draws are NaN or infinite on unconstrained space, the first "
            f"at row {int(bad.nonzero()[0, 0])}. Leave them out; a draw on the edge of its support has no place there."
        )
    _check_categories(z, layout)
    return z.contiguous()


def _numbers(value: Any, of: str) -> Tensor:
    """Read numbers as a float64 tensor of their own, without a graph."""
    try:
        found = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise DataError(f"reference draws {of}must be a tensor or numeric arrays: {error}") from error
    if found.is_complex() or found.dtype == torch.bool:
        raise DataError(f"reference draws {of}must be real numbers, got {found.dtype}.")
    return found.to(torch.float64, copy=True)


def _check_categories(z: Tensor, layout: Layout) -> None:
    counts = layout.num_categories
    if counts is None:
        return
    most = torch.tensor(counts, dtype=z.dtype, device=z.device)
    if not bool(((z >= 0) & (z < most) & (z == z.round())).all()):
        raise SupportError(f"reference draws of a discrete model are categories counted from 0, below {counts}.")
