"""Cross-fitted arc length of the optimal ROC curve of two samples."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.base import clone

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.numerics.arctangent_ratio import LONGEST, RIGHT_ANGLE, SHORTEST, auc_range
from vifamily.numerics.cross_fit import AngleFit, FittedAngle, OutOfFold, cross_fit, length_of, permuted_values
from vifamily.rng import check_seed
from vifamily.roc._checks import check_fraction, check_whole, numbers_of
from vifamily.roc._ratio import ArcLengthRatio

if TYPE_CHECKING:
    from vifamily.roc._display import OptimalRocDisplay

__all__ = ["ArcLength", "arc_length", "arc_length_from_angles"]

Array = NDArray[np.float64]
_LARGEST = 1e305
_ROUNDING = 1e-9
_INTERVALS = ("auto", "score", "wald", "permutation", "bootstrap")


@dataclasses.dataclass(frozen=True)
class ArcLength:
    """An estimated arc length, and what follows from it on the area.

    Attributes:
        value: Cross-fitted estimate, noise of the kernel's fits made up for. May fall a little below ``sqrt(2)``.
        standard_error: From the influence function.
        interval: Two-sided interval, clipped to ``[sqrt(2), 2]``.
        interval_kind: ``"score"``, ``"wald"``, ``"permutation"`` or ``"bootstrap"``.
        lower_bound: One-sided lower bound at the same level, clipped likewise; from the held-out length alone, which is
            in expectation at most the arc length.
        auc: Held-out area under the ROC curve of the fitted score.
        auc_standard_error: Its standard error.
        auc_lower_bound: One-sided lower bound on the maximal AUC; see :attr:`certificate`. 1/2 unless the bound of the
            length is above ``sqrt(2)``, where folds share points.
        surface_area: Area between the optimal ROC curve and the diagonal, ``auc - 1/2``.
        level: Level of the interval and of both bounds.
        train_value: The length at the points of the fits, biased either way; for comparison alone.
        folds: Number of folds.
        out_of_fold: Angles of the points.
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    interval_kind: str
    lower_bound: float
    auc: float
    auc_standard_error: float
    auc_lower_bound: float
    surface_area: float
    level: float
    train_value: float
    folds: int
    out_of_fold: OutOfFold = dataclasses.field(repr=False, compare=False)

    @property
    def clipped(self) -> float:
        """The value within ``[sqrt(2), 2]``, where every arc length lies."""
        return float(np.clip(self.value, SHORTEST, LONGEST))

    @property
    def normalised(self) -> float:
        """The clipped value from 0 (equal) to 1 (told apart without error)."""
        return (self.clipped - SHORTEST) / (LONGEST - SHORTEST)

    @property
    def distance(self) -> float:
        """``sqrt(L - sqrt(2))`` of the clipped value, a metric between distributions."""
        return math.sqrt(self.clipped - SHORTEST)

    @property
    def auc_range(self) -> tuple[float, float]:
        """The least and the largest maximal AUC that go with the clipped value, whatever the distributions."""
        return auc_range(self.clipped)

    @property
    def near_equality(self) -> bool:
        """Whether the value is within two standard errors of that of equal distributions."""
        # the tolerance is that of the optimiser: equal points have a standard error of zero
        return self.value <= SHORTEST + 2 * self.standard_error + 1e-6

    @property
    def certificate(self) -> str:
        """Why :attr:`auc_lower_bound` is a bound, in a sentence."""
        return (
            f"no score has an AUC above the maximal one; this score, fitted on other points, has {self.auc:.4f} +- "
            f"{self.auc_standard_error:.4f} on {len(self.out_of_fold.angle_pos)} positives and "
            f"{len(self.out_of_fold.angle_neg)} negatives, so at level {self.level:.0%} the maximal AUC is at least "
            f"{self.auc_lower_bound:.4f}."
        )

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"arc length {self.value:.4f} +- {self.standard_error:.4f}, {self.level:.0%} [{low:.4f}, {high:.4f}] "
            f"({self.interval_kind}), at least {self.lower_bound:.4f}",
            f"maximal AUC at least {self.auc_lower_bound:.4f} (held out {self.auc:.4f} +- "
            f"{self.auc_standard_error:.4f}), area over the diagonal {self.surface_area:.4f}",
        ]
        if self.near_equality:
            lines.append("near equality: arc_length_test has an exact level, and so tells whether they differ")
        if self.train_value - self.value > 3 * self.standard_error + 0.01 * (LONGEST - SHORTEST):
            lines.append(
                f"the fits follow noise: at their own points the length is {self.train_value:.4f}; a stronger penalty, "
                "or fewer features, brings the estimate up"
            )
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> OptimalRocDisplay:
        """Draw the ROC curves; see :class:`OptimalRocDisplay`."""
        from vifamily.roc._display import OptimalRocDisplay

        return OptimalRocDisplay.from_arc_length(self).plot(ax)


def arc_length(
    x_pos: Any,
    x_neg: Any,
    *,
    ratio: ArcLengthRatio | None = None,
    folds: int = 5,
    level: float = 0.95,
    interval: str = "auto",
    num_permutations: int = 99,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> ArcLength:
    r"""Estimate the arc length of the optimal ROC curve by cross-fitting, with bounds.

    Each point is judged by an angle fitted without its fold: the mean of :math:`\sin u` over positives plus that of
    :math:`\cos u` over negatives. The error in the length is quadratic in that of u. Derived here, as is all of the
    inference; the length and its variational form are the source's.

    Noise of a fit shortens that. The kernel's is estimated and added to the value; what its penalty hides is not. Other
    models are taken as they are, so that their values err downwards. The one-sided bounds take nothing added.

    A ``"score"`` interval goes by the standard error that there would be at each length, which vanishes at both ends of
    the range, and keeps its level near equality, where a ``"wald"`` interval covers too rarely. ``"permutation"``
    widens that of Wald to hold the interval that comes of refitting on permuted labels, whose level is exact at
    equality. ``"bootstrap"`` resamples the held-out angles within classes, without refits, and is no better there than
    Wald's. ``"auto"`` is the score interval, and permutations for models other than the kernel near equality.

    Args:
        x_pos: ``(positive, feature)``.
        x_neg: ``(negative, feature)``.
        ratio: Estimator of the angle; by default the kernel.
        folds: Number of folds, at least 2.
        level: Level of the interval and of the bounds.
        interval: ``"auto"``, ``"score"``, ``"wald"``, ``"permutation"`` or ``"bootstrap"``.
        num_permutations: Refits (times ``folds``) of a permutation interval.
        num_bootstrap: Resamples of a bootstrap interval.
        seed: Seed of folds, permutations and resamples, and of a ratio that has none.

    Raises:
        ConfigError: If a setting cannot be used.
        ShapeError: If the samples are not matrices of equal width.
        DataError: If a value is not a finite real number, or a class has fewer than ``2 * folds`` points.

    Source: Liu (2022), "Estimating the arc length of the optimal ROC curve and lower bounding the maximal AUC"; length
    as a divergence also in Bantis et al. (2021), Statistics in Medicine.

    Example:
        >>> x = np.linspace(0, 1, 50)[:, None]
        >>> arc_length(x + 9, x).value > 1.95
        True
    """
    check_whole("folds", folds, 2)
    check_fraction("level", level)
    check_whole("num_permutations", num_permutations, 0)
    check_whole("num_bootstrap", num_bootstrap)
    if interval not in _INTERVALS:
        raise ConfigError(f"interval must be one of {', '.join(_INTERVALS)}, got {interval!r}.")
    tail = math.floor((num_permutations + 1) * (1 - level) / 2 + 1e-9)
    check_ratio(ratio)
    other = ratio is not None and ratio.model != "kernel"
    if (interval == "permutation" or (interval == "auto" and other)) and tail < 1:
        raise ConfigError(
            f"{num_permutations} permutations are too few for level {level}: take at least "
            f"{math.ceil(2 / (1 - level)) - 1}, or interval='wald'."
        )
    a, b = two_samples(x_pos, x_neg, 2 * folds, f"for {folds} folds")
    source, fit = np.random.default_rng(check_seed(seed)), angle_fit(ratio, seed)
    found = summarise(cross_fit(a, b, fit, folds, source), level, folds)
    wald = _wald(found)
    if interval == "permutation" or (interval == "auto" and other and found.near_equality):
        off = np.sort(permuted_values(a, b, fit, folds, num_permutations, source)) - SHORTEST
        # at equality the value is one more of them: whatever is subtracted is of its law
        ends = found.value - off[-tail], found.value - off[tail - 1]
        kind, ends = "permutation", (min(wald[0], ends[0]), max(wald[1], ends[1]))
    elif interval == "bootstrap":
        drawn = _resampled(found.out_of_fold, num_bootstrap, source)
        kind, ends = interval, _not_closed(found, *np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist())
    elif interval == "wald":
        kind, ends = interval, wald
    else:
        return found
    inside = float(np.clip(ends[0], SHORTEST, LONGEST)), float(np.clip(ends[1], SHORTEST, LONGEST))
    return dataclasses.replace(found, interval=inside, interval_kind=kind)


def arc_length_from_angles(angle_pos: Any, angle_neg: Any, *, level: float = 0.95) -> ArcLength:
    """Estimate the arc length from angles of a model of your own, at points that had no part in its fit.

    Args:
        angle_pos: ``(positive,)``, the arctangent of the density ratio at positives, in ``[0, pi/2]``.
        angle_neg: ``(negative,)``, at negatives.
        level: Level of the interval and of the bounds.

    Raises:
        ConfigError: If the level is not between 0 and 1.
        ShapeError: If they are not vectors of at least two angles.
        DataError: If an angle is outside ``[0, pi/2]``.

    Example:
        >>> round(arc_length_from_angles([0.8, 1.2, 1.3], [0.1, 0.2, 0.9]).auc, 4)
        0.8889
    """
    check_fraction("level", level)
    a, b = (numbers_of(angles, "angles") for angles in (angle_pos, angle_neg))
    if a.ndim != 1 or b.ndim != 1 or min(len(a), len(b)) < 2:
        raise ShapeError(f"two vectors of at least two angles are needed, got shapes {a.shape} and {b.shape}.")
    for angles in (a, b):
        if not ((angles >= 0) & (angles <= RIGHT_ANGLE + 1e-12)).all():
            raise DataError("an angle lies between 0 and pi/2: pass arctan(p / q), and no NaN.")
    folds = np.zeros(len(a), dtype=np.int64), np.zeros(len(b), dtype=np.int64)
    return summarise(OutOfFold(a, b, *folds), level, 1)


def two_samples(x_pos: Any, x_neg: Any, fewest: int, why: str) -> tuple[Array, Array]:
    """Two samples as finite matrices of equal width.

    Raises:
        ShapeError: If they are not matrices of equal width.
        DataError: If a value is not a finite real number, or a class has fewer than ``fewest`` points.
    """
    a, b = (numbers_of(x, "the samples") for x in (x_pos, x_neg))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        advice = " For one feature pass x[:, None]." if a.ndim == b.ndim == 1 else ""
        raise ShapeError(f"two matrices of equal width are needed, got shapes {a.shape} and {b.shape}.{advice}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError("the samples hold NaN or infinite values: drop those rows.")
    if max(np.abs(x).max(initial=0.0) for x in (a, b)) > _LARGEST:
        raise DataError(f"the samples hold values beyond {_LARGEST:.0e}, which overflow: change their unit.")
    if min(len(a), len(b)) < fewest:
        raise DataError(f"{fewest} points of each class are needed {why}, got {len(a)} and {len(b)}.")
    return a, b


def check_ratio(ratio: Any) -> None:
    """See that a ratio is an estimator of the angle, or None.

    Raises:
        ConfigError: If it is not.
    """
    if ratio is not None and not isinstance(ratio, ArcLengthRatio):
        raise ConfigError(
            f"ratio must be an ArcLengthRatio, got {ratio!r}: wrap a classifier, ratio=ArcLengthRatio(classifier)."
        )


def angle_fit(ratio: ArcLengthRatio | None, seed: int) -> AngleFit:
    """A fit of the angle by clones of an estimator.

    Raises:
        ConfigError: If it is no :class:`ArcLengthRatio`.
    """
    check_ratio(ratio)
    template = clone(ratio) if ratio is not None else ArcLengthRatio()
    if template.random_state is None:
        template.set_params(random_state=int(seed) % 2**31)

    def fit(a: Array, b: Array) -> Any:
        fitted = clone(template).fit(np.concatenate([a, b]), np.repeat([1, 0], [len(a), len(b)]))
        return FittedAngle(fitted.angle, fitted.shortfall_)

    return fit


def summarise(angles: OutOfFold, level: float, folds: int) -> ArcLength:
    """The result with a score interval."""
    (value, error), (area, area_error) = angles.length(), angles.auc()
    # fits that share points make the area vary more than its error says where there is nothing to find: it is trusted
    # only once the length, whose bound holds there, is above that of equal distributions
    certified = folds == 1 or angles.length_bound(level) > SHORTEST
    area_bound = angles.auc_bound(level) if certified else 0.5
    return ArcLength(
        value, error, angles.length_interval(level), "score", angles.length_bound(level), area, area_error, area_bound,
        area - 0.5, level, angles.train_value, folds, angles,
    )  # fmt: skip


def _wald(found: ArcLength) -> tuple[float, float]:
    width = float(stats.norm.ppf((1 + found.level) / 2)) * found.standard_error
    return _not_closed(found, found.value - width, found.value + width)


def _not_closed(found: ArcLength, low: float, high: float) -> tuple[float, float]:
    """Told apart without error, the standard error is rounding: the bound of as many trials without a failure stays."""
    return (min(low, found.interval[0]) if found.standard_error < _ROUNDING else low), high


def _resampled(angles: OutOfFold, count: int, source: np.random.Generator) -> Array:
    sine, cosine = np.sin(angles.angle_pos), np.cos(angles.angle_neg)
    means = [sum(x[source.integers(len(x), size=len(x))].mean() for x in (sine, cosine)) for _ in range(count)]
    return np.array(means) + angles.length()[0] - length_of(angles.angle_pos, angles.angle_neg)[0]
