"""Cross-fitted arc length of the optimal ROC curve of two samples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import stats
from sklearn.base import clone

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.numerics.arctangent_ratio import LONGEST, SHORTEST
from vifamily.roc._ratio import ArcLengthRatio

__all__ = ["ArcLength", "arc_length"]


@dataclasses.dataclass(frozen=True)
class ArcLength:
    """An estimated arc length.

    Attributes:
        value: Cross-fitted estimate; in expectation at most the arc length. May fall a little below ``sqrt(2)``.
        standard_error: From the influence function.
        interval: Two-sided Wald interval, clipped to ``[sqrt(2), 2]``; covers too rarely near equality.
        lower_bound: One-sided lower bound at the same level, clipped likewise.
        level: Level of both.
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    lower_bound: float
    level: float

    def __str__(self) -> str:
        low, high = self.interval
        # the tolerance is that of the optimiser: equal points have a standard error of zero
        near = self.value <= SHORTEST + 2 * self.standard_error + 1e-6
        note = "; near equality, where the interval covers too rarely" if near else ""
        return (
            f"arc length {self.value:.4f} +- {self.standard_error:.4f}, {self.level:.0%} [{low:.4f}, {high:.4f}]{note}"
        )


def arc_length(
    x_pos: Any, x_neg: Any, *, ratio: ArcLengthRatio | None = None, folds: int = 5, level: float = 0.95, seed: int = 0
) -> ArcLength:
    r"""Estimate the arc length of the optimal ROC curve by cross-fitting.

    Each point is judged by an angle fitted without its fold: the mean of :math:`\sin u` over positives plus that of
    :math:`\cos u` over negatives. The error in the length is quadratic in that of u. Derived here.

    Args:
        x_pos: ``(positive, feature)``.
        x_neg: ``(negative, feature)``.
        ratio: Estimator of the angle.
        folds: Number of folds, at least 2.
        level: Level of the interval and of the bound.
        seed: Seed of the folds.

    Raises:
        ConfigError: If ``folds`` or ``level`` cannot be used.
        ShapeError: If the samples are not matrices of equal width.
        DataError: If a value is not finite, or a class has fewer than ``2 * folds`` points.

    Example:
        >>> x = np.linspace(0, 1, 50)[:, None]
        >>> arc_length(x + 9, x).value > 1.95
        True
    """
    if folds < 2 or not 0 < level < 1:
        raise ConfigError(f"folds must be at least 2 and level between 0 and 1, got {folds} and {level}.")
    a, b = np.asarray(x_pos, dtype=float), np.asarray(x_neg, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(f"two matrices of equal width are needed, got shapes {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("the samples hold NaN or infinite values: drop those rows.")
    if min(len(a), len(b)) < 2 * folds:
        raise DataError(f"{2 * folds} points of each class are needed for {folds} folds, got {len(a)} and {len(b)}.")
    rng = np.random.default_rng(seed)
    fold_a, fold_b = (rng.permutation(np.arange(len(x)) % folds) for x in (a, b))
    sine, cosine = np.empty(len(a)), np.empty(len(b))
    for k in range(folds):
        keep_a, keep_b = fold_a != k, fold_b != k
        fitted = clone(ratio if ratio is not None else ArcLengthRatio(random_state=seed))
        fitted.fit(np.concatenate([a[keep_a], b[keep_b]]), np.repeat([1, 0], [keep_a.sum(), keep_b.sum()]))
        sine[~keep_a], cosine[~keep_b] = np.sin(fitted.angle(a[~keep_a])), np.cos(fitted.angle(b[~keep_b]))
    value = float(sine.mean() + cosine.mean())
    error = math.sqrt(sine.var(ddof=1) / len(a) + cosine.var(ddof=1) / len(b))
    two, one = stats.norm.ppf((1 + level) / 2), stats.norm.ppf(level)
    low, high, bound = (float(np.clip(value + z * error, SHORTEST, LONGEST)) for z in (-two, two, -one))
    return ArcLength(value, error, (low, high), bound, level)
