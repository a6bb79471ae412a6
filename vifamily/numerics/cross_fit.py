r"""Cross-fitted arc length and area of the optimal ROC curve of two samples.

Every point is judged by an angle u that was fitted without its fold. The means

.. math:: \hat L = \overline{\sin u(x_i)} + \overline{\cos u(x'_j)}

then have an expectation of at most the arc length, with an error quadratic in that of u, and the usual standard error
of two means (derived from the efficient influence function; see :mod:`vifamily.numerics.arctangent_ratio`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vifamily.numerics.arctangent_ratio import LONGEST, SHORTEST, largest_variance

__all__ = ["FittedAngle", "OutOfFold", "cross_fit", "permuted_values"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class FittedAngle:
    """A function from points to angles that knows how far noise of its fit shortens the length of fresh points.

    Attributes:
        function: From points to their angles.
        shortfall: The expected loss of length by noise; see :mod:`vifamily.numerics.penalised_angle`.
    """

    function: Callable[[Array], Array]
    shortfall: float

    def __call__(self, x: Array) -> Array:
        """Return the angles of points."""
        return self.function(x)


AngleFit = Callable[[Array, Array], Callable[[Array], Array]]
"""From positives and negatives to a function of points that returns their angles: any, or a :class:`FittedAngle`."""


@dataclasses.dataclass(frozen=True)
class OutOfFold:
    """Angles of points that had no part in the fit of the angle.

    Attributes:
        angle_pos: ``(positive,)``, in ``[0, pi/2]``.
        angle_neg: ``(negative,)``.
        fold_pos: Fold of each positive, ``(positive,)``.
        fold_neg: Fold of each negative.
        train_value: Mean over folds of the length at the points of the fit: too long where the fit follows noise.
        shortfall: Mean over folds of how far noise of the fits shortens the length; zero where they do not tell.
    """

    angle_pos: Array
    angle_neg: Array
    fold_pos: Labels
    fold_neg: Labels
    train_value: float = math.nan
    shortfall: float = 0.0

    def length(self) -> tuple[float, float]:
        """Return the arc length, the shortfall added, and its standard error."""
        value, error = length_of(self.angle_pos, self.angle_neg)
        return max(min(value + self.shortfall, LONGEST), value), error

    def auc(self) -> tuple[float, float]:
        """Return the area of the score and its standard error (DeLong et al. 1988).

        Pairs are compared within a fold only: across folds the score of one point has seen the other.
        """
        wins_pos, wins_neg = np.empty(len(self.angle_pos)), np.empty(len(self.angle_neg))
        for k in np.unique(self.fold_pos):
            in_pos, in_neg = self.fold_pos == k, self.fold_neg == k
            a, b = self.angle_pos[in_pos], self.angle_neg[in_neg]
            ranks = stats.rankdata(np.concatenate([a, b]))
            wins_pos[in_pos] = (ranks[: len(a)] - stats.rankdata(a)) / len(b)
            wins_neg[in_neg] = 1 - (ranks[len(a) :] - stats.rankdata(b)) / len(a)
        error = math.sqrt(wins_pos.var(ddof=1) / len(wins_pos) + wins_neg.var(ddof=1) / len(wins_neg))
        return float(wins_pos.mean()), error

    def length_bound(self, level: float) -> float:
        """Return a one-sided lower bound on the arc length at a level, in ``[sqrt(2), 2]``."""
        # without the shortfall: the bound is to hold whatever the fit is
        value, error = length_of(self.angle_pos, self.angle_neg)
        most = max(LONGEST * self._most_certain(level), SHORTEST)
        quantile = float(stats.norm.ppf(level))
        low = value - quantile * error
        if quantile > 0:
            # near 2 the error falls with the length: a value that is too high has an error that is too small
            low = min(low, _score_ends(value, error, quantile**2, self._size())[0])
        return float(np.clip(low, SHORTEST, most))

    def length_interval(self, level: float) -> tuple[float, float]:
        """Return the two-sided score interval of the arc length at a level, in ``[sqrt(2), 2]``.

        The lengths within so many standard errors of the value, with the error that there would be at each of them: its
        square changes from that of the value by as much as the largest variance does. So it is not empty near equality,
        where the plain error vanishes, and it is skewed as the error is. The lower end is never above the plain one.
        """
        value, error = self.length()
        quantile = float(stats.norm.ppf((1 + level) / 2))
        low, high = _score_ends(value, error, quantile**2, self._size())
        most = max(LONGEST * self._most_certain((1 + level) / 2), SHORTEST)
        return float(np.clip(min(low, value - quantile * error), SHORTEST, most)), high

    def auc_bound(self, level: float) -> float:
        """Return a one-sided lower bound on the maximal area at a level, in ``[1/2, 1]``."""
        value, error = self.auc()
        most = max(self._most_certain(level), 0.5)
        return float(np.clip(value - stats.norm.ppf(level) * error, 0.5, most))

    def _size(self) -> float:
        return 2 / (1 / len(self.angle_pos) + 1 / len(self.angle_neg))

    def _most_certain(self, level: float) -> float:
        """The exact lower bound of a rate at which as many independent trials as there are pairs did not fail once.

        Samples that are told apart without error have a standard error of zero; this keeps the bounds honest there.
        """
        return float((1 - level) ** (1 / min(len(self.angle_pos), len(self.angle_neg))))


def length_of(angle_pos: Array, angle_neg: Array) -> tuple[float, float]:
    """Arc length from angles, and its standard error."""
    sine, cosine = np.sin(angle_pos), np.cos(angle_neg)
    error = math.sqrt(sine.var(ddof=1) / len(sine) + cosine.var(ddof=1) / len(cosine))
    return float(sine.mean() + cosine.mean()), error


def _score_ends(value: float, error: float, square: float, size: float) -> tuple[float, float]:
    """The ends of the lengths L with ``(L - value)^2`` at most a quantile's square times the variance at L."""
    middle = float(np.clip(value, SHORTEST, LONGEST))
    ends = []
    for end in (SHORTEST, LONGEST):
        at = end
        for _ in range(100):
            variance = error**2 + (largest_variance(at) - largest_variance(middle)) / size
            off = (at - middle) ** 2 - square * variance
            slope = 2 * (at - middle) - square * (8 / at**3 - at) / size
            # the difference is convex in L: Newton's steps come from outside and never pass the end
            if off <= 1e-14 or slope == 0:
                break
            at = float(np.clip(at - off / slope, SHORTEST, LONGEST))
        ends.append(at)
    return ends[0], ends[1]


def cross_fit(x_pos: Array, x_neg: Array, fit: AngleFit, folds: int, source: np.random.Generator) -> OutOfFold:
    """Angles of every point from fits without its fold.

    Args:
        x_pos: ``(positive, feature)``.
        x_neg: ``(negative, feature)``.
        fit: Fits the angle.
        folds: Number of folds; each holds as even a part of each class as can be.
        source: Randomness of the folds.
    """
    fold_pos, fold_neg = (source.permutation(np.arange(len(x)) % folds) for x in (x_pos, x_neg))
    angle_pos, angle_neg = np.empty(len(x_pos)), np.empty(len(x_neg))
    train, shortfall = [], []
    for k in range(folds):
        out_pos, out_neg = fold_pos == k, fold_neg == k
        angle = fit(x_pos[~out_pos], x_neg[~out_neg])
        angle_pos[out_pos], angle_neg[out_neg] = angle(x_pos[out_pos]), angle(x_neg[out_neg])
        train.append(np.sin(angle(x_pos[~out_pos])).mean() + np.cos(angle(x_neg[~out_neg])).mean())
        shortfall.append(angle.shortfall if isinstance(angle, FittedAngle) else 0.0)
    return OutOfFold(angle_pos, angle_neg, fold_pos, fold_neg, float(np.mean(train)), float(np.mean(shortfall)))


def permuted_values(
    x_pos: Array, x_neg: Array, fit: AngleFit, folds: int, count: int, source: np.random.Generator
) -> Array:
    """Cross-fitted lengths, fits included, after the labels of the pooled sample were permuted, ``(count,)``."""
    pooled, out = np.concatenate([x_pos, x_neg]), np.empty(count)
    for b in range(count):
        order = source.permutation(len(pooled))
        mixed = pooled[order]
        out[b] = cross_fit(mixed[: len(x_pos)], mixed[len(x_pos) :], fit, folds, source).length()[0]
    return out
