"""Fisher gap: how far the scores of a posterior and of its approximation are apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vifamily.diagnostics.bounds import Estimate
from vifamily.errors import ConfigError, DataError, ShapeError

__all__ = ["fisher_gap"]


def fisher_gap(z: Tensor, score_p: Tensor, score_q: Tensor, *, weight: str = "covariance") -> Estimate:
    r"""Mean squared difference of two scores over draws of q.

    :math:`\mathbb{E}_q |s_p(z) - s_q(z)|^2_W` with ``W`` the covariance of the draws, or the identity. It is zero where
    q is the posterior. With the covariance it does not depend on units, is about 1 for each coordinate whose scale is
    off by a factor of 1.4 (a normal law with variance v where the posterior has 1 gives :math:`(v - 1)^2`), and tends
    to the number of coordinates as q shrinks to a point: compare it with that. It cannot see the weights of separate
    modes, nor modes that no draw has reached.

    Args:
        z: Draws of q, ``(draw, dim)``, two or more.
        score_p: Gradient of the log joint at them, alike.
        score_q: Gradient of the log density of q at them, alike.
        weight: ``"covariance"`` or ``"identity"``.

    Returns:
        The gap and its standard error over draws, that of the covariance left out.

    Raises:
        ShapeError: If the shapes disagree or there are fewer than two draws.
        DataError: If a value is not finite.
        ConfigError: If the weight is neither.

    Example:
        >>> z = 2 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> gap = fisher_gap(z, -z, -z / 4)  # variance 4 in place of 1
        >>> abs(gap.value - 9.0) < 5 * gap.error + 0.5
        True
    """
    if weight not in ("covariance", "identity"):
        raise ConfigError(f"weight is 'covariance' or 'identity', got {weight!r}.")
    if z.dim() != 2 or z.shape[0] < 2 or score_p.shape != z.shape or score_q.shape != z.shape:
        raise ShapeError(
            "a Fisher gap needs draws and two scores (draw, dim), two draws or more, got "
            f"{tuple(z.shape)}, {tuple(score_p.shape)} and {tuple(score_q.shape)}."
        )
    points, p, q = (t.detach().to("cpu", torch.float64) for t in (z, score_p, score_q))
    if not all(bool(t.isfinite().all()) for t in (points, p, q)):
        raise DataError("draws or scores hold NaN or infinite values.")
    apart = p - q
    centred = points - points.mean(0)
    projected = apart if weight == "identity" else apart @ (centred.mT @ centred) / (points.shape[0] - 1)
    square = (apart * projected).sum(1)
    return Estimate(float(square.mean()), float(square.std()) / math.sqrt(square.shape[0]))
