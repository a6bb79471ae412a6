"""Two-sample permutation test by the arc length, with an exact level."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vifamily.errors import ConfigError
from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE
from vifamily.rng import check_seed
from vifamily.roc._arc_length import angle_fit, two_samples
from vifamily.roc._checks import check_fraction, check_whole
from vifamily.roc._ratio import ArcLengthRatio

__all__ = ["ArcLengthTest", "arc_length_test"]

Array = NDArray[np.float64]
_STATISTICS = {"arc_length": "arc length", "auc": "AUC", "accuracy": "balanced accuracy"}


@dataclasses.dataclass(frozen=True)
class ArcLengthTest:
    """The outcome of a two-sample test.

    Attributes:
        statistic: Its value on the held-out points; ``sqrt(2)`` or less is what equal distributions give as an arc
            length, 1/2 as an area or accuracy.
        p_value: Share of labellings, the one observed among them, whose statistic is at least as large.
        kind: ``"arc_length"``, ``"auc"`` or ``"accuracy"``.
        num_held_out: Held-out positives and negatives.
        null: Statistics of the permuted labels, ``(permutation,)``.
    """

    statistic: float
    p_value: float
    kind: str
    num_held_out: tuple[int, int]
    null: Array = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        return (
            f"{_STATISTICS[self.kind]} {self.statistic:.4f} on {sum(self.num_held_out)} held-out points, "
            f"p = {self.p_value:.3g} from {len(self.null)} permutations"
        )


def arc_length_test(
    x: Any,
    y: Any,
    *,
    ratio: ArcLengthRatio | None = None,
    statistic: str = "arc_length",
    num_permutations: int = 999,
    split: float = 0.5,
    seed: int = 0,
) -> ArcLengthTest:
    r"""Test whether two samples come from one distribution.

    The angle is fitted to a part of both samples; its held-out arc length is compared with that of permuted labels of
    the held-out points alone. Given the fit, these labels are exchangeable where the distributions are equal, so that

    .. math:: p = \frac{1 + \#\{b : T_b \ge T\}}{1 + B}

    has an exact level for any number of points, any estimator and any B, at the cost of one fit. Derived here.

    Args:
        x: ``(positive, feature)``.
        y: ``(negative, feature)``.
        ratio: Estimator of the angle; by default the kernel.
        statistic: ``"arc_length"``; for comparison ``"auc"`` or ``"accuracy"`` (the classifier two-sample test) of the
            same score.
        num_permutations: B. The smallest p-value is ``1 / (B + 1)``.
        split: Part of each sample that the angle is fitted to.
        seed: Seed of the split and of the permutations, and of a ratio that has none.

    Raises:
        ConfigError: If a setting cannot be used.
        ShapeError: If the samples are not matrices of equal width.
        DataError: If a value is not a finite real number, or a sample has fewer than four points.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 1))
        >>> arc_length_test(x + 1, x, num_permutations=99).p_value
        0.01
    """
    if statistic not in _STATISTICS:
        raise ConfigError(f"statistic must be one of {', '.join(_STATISTICS)}, got {statistic!r}.")
    check_whole("num_permutations", num_permutations)
    check_fraction("split", split)
    a, b = two_samples(x, y, 4, "to fit on some and judge by others")
    source = np.random.default_rng(check_seed(seed))
    a, b = (s[source.permutation(len(s))] for s in (a, b))
    cut_a, cut_b = (int(np.clip(round(split * len(s)), 2, len(s) - 2)) for s in (a, b))
    angle = angle_fit(ratio, seed)(a[:cut_a], b[:cut_b])
    held = angle(np.concatenate([a[cut_a:], b[cut_b:]]))
    share, constant = _shares(held, len(a) - cut_a, statistic)
    total = share[: len(a) - cut_a].sum()
    null = np.array([share[source.permutation(len(held))[: len(a) - cut_a]].sum() for _ in range(num_permutations)])
    # sums of the same numbers in another order are the same sum
    as_large = (null >= total - 1e-10 * max(1.0, np.abs(share).sum())).sum()
    p_value = float((1 + as_large) / (1 + num_permutations))
    sizes = len(a) - cut_a, len(b) - cut_b
    return ArcLengthTest(float(total + constant), p_value, statistic, sizes, null + constant)


def _shares(angle: Array, positives: int, statistic: str) -> tuple[Array, float]:
    """What each point adds to the statistic when it is a positive, and the rest; every statistic here is such a sum."""
    negatives = len(angle) - positives
    if statistic == "auc":
        ranks = stats.rankdata(angle)
        return ranks / (positives * negatives), -(positives + 1) / (2 * negatives)
    if statistic == "accuracy":
        called = np.where(angle == RIGHT_ANGLE / 2, 0.5, (angle > RIGHT_ANGLE / 2).astype(float))
        up, down = 0.5 * called, 0.5 * (1 - called)
    else:
        up, down = np.sin(angle), np.cos(angle)
    return up / positives - down / negatives, float(down.sum() / negatives)
