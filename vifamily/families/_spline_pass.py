"""One pass of points through the layers of a neural spline flow, without an object for each transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vifamily.families._foreign import load
from vifamily.numerics.rational_spline import rational_spline

__all__ = ["is_spline_stack", "spline_pass"]


def is_spline_stack(layers: nn.Module) -> bool:
    """Whether the layers are zuko's autoregressive rational-quadratic splines with networks, and nothing else."""
    spline = load("zuko.transforms").MonotonicRQSTransform
    parts: Any = getattr(layers, "transforms", None) or ()
    kinds = [getattr(getattr(part, "univariate", None), "func", None) for part in parts if hasattr(part, "hyper")]
    return bool(kinds) and len(kinds) == len(parts) and all(kind is spline for kind in kinds)


def spline_pass(layers: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Map points to the base law.

    Args:
        layers: Layers for which :func:`is_spline_stack` is true.
        x: ``(..., dim)``.
        context: ``(datum, context)``, or None.

    Returns:
        The images ``(..., dim)`` and the log determinant ``(...)``.
    """
    if context is not None:
        context = context.expand(*x.shape[:-1], context.shape[-1])
    total = torch.zeros_like(x[..., 0])
    for layer in layers.transforms:
        # the networks of a single coordinate see the context alone
        alone = context is not None and not hasattr(layer, "passes")
        given = context if alone else x if context is None else torch.cat([x, context], -1)
        parameters = layer.hyper(given).unflatten(-1, (-1, layer.total))
        x, log_slope = rational_spline(x, parameters, **layer.univariate.keywords)
        total = total + log_slope.sum(-1)
    return x, total
