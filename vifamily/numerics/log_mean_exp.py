"""The logarithm of a mean of exponentials, without overflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vifamily.errors import ShapeError

__all__ = ["log_mean_exp"]


def log_mean_exp(x: Tensor, dim: int = -1, *, keepdim: bool = False) -> Tensor:
    """Compute ``log(mean(exp(x)))`` along one axis.

    Args:
        x: Any shape, at least one axis.
        dim: The axis that is averaged.
        keepdim: Keep the averaged axis with length one.

    Returns:
        ``x`` without the axis ``dim``.

    Raises:
        ShapeError: If the averaged axis is empty: the mean of nothing is undefined.

    Example:
        >>> round(float(log_mean_exp(torch.tensor([1000.0, 1000.0]))), 4)
        1000.0
    """
    size = x.shape[dim] if x.dim() else 0
    if size == 0:
        raise ShapeError(f"log_mean_exp needs at least one number along axis {dim}, got shape {tuple(x.shape)}.")
    return torch.logsumexp(x, dim=dim, keepdim=keepdim) - math.log(size)
