"""Arc lengths of samples too large to hold: sums over blocks, at a fixed angle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from vifamily.errors import ConfigError, DataError
from vifamily.numerics.arctangent_ratio import LONGEST, SHORTEST
from vifamily.roc._checks import check_fraction, one_label_each

__all__ = ["ArcLengthStream"]


class ArcLengthStream:
    r"""Running arc length of points that arrive in blocks, judged by an angle fitted before.

    The fit is fixed, so that nothing but counts, means and squared deviations of :math:`\sin u` at positives and
    :math:`\cos u` at negatives is kept. The expectation of the value is that of the arc length of the score, at most
    the arc length itself, and :meth:`lower_bound` holds whatever the fit. Blocks must have had no part in the fit. For
    a million points and more, fit on some thousands of them and pass the rest here.

    Args:
        ratio: A fitted :class:`ArcLengthRatio` or :class:`AUCBoundClassifier`, or what has ``angle``.

    Raises:
        ConfigError: If the ratio has no angles, or is not fitted.

    Example:
        >>> from vifamily.roc import ArcLengthRatio
        >>> x = np.linspace(0, 1, 60)[:, None]
        >>> stream = ArcLengthStream(ArcLengthRatio(random_state=0).fit(x, x[:, 0] > 0.5))
        >>> for block in np.split(x, 6):
        ...     stream.update(block, block[:, 0] > 0.5)
        >>> stream.num_pos, stream.num_neg, bool(stream.value > 1.8)
        (30, 30, True)
    """

    def __init__(self, ratio: Any) -> None:
        if not hasattr(ratio, "angle"):
            raise ConfigError(f"{type(ratio).__name__} has no angles: fit an ArcLengthRatio.")
        if not hasattr(ratio, "classes_"):
            raise ConfigError(f"{type(ratio).__name__} is not fitted, and a stream does not fit it: call fit first.")
        self.ratio = ratio
        # count, mean, sum of squared deviations of each class
        self._sums = np.zeros((2, 3))

    def update(self, X: Any, y: Any) -> None:  # noqa: N803
        """Take in a block; one class alone will do, and an empty block changes nothing.

        Args:
            X: ``(sample, feature)``.
            y: ``(sample,)``, labels among the two of the fit.

        Raises:
            ShapeError: If there is not one label for each point.
            DataError: If a label is unknown.
            ValueError: If a value is not finite or the width is not that of the fit; nothing is taken in then.
        """
        y = np.asarray(y)
        one_label_each(X, y)
        if len(y) == 0:
            return
        if not np.isin(y, self.ratio.classes_).all():
            raise DataError(f"labels must be among {self.ratio.classes_.tolist()}, got {np.unique(y).tolist()}.")
        u, positive = self.ratio.angle(X), y == self.ratio.classes_[1]
        for row, values in ((0, np.sin(u[positive])), (1, np.cos(u[~positive]))):
            if len(values):
                self._sums[row] = _joined(self._sums[row], values)

    @property
    def num_pos(self) -> int:
        """Positives taken in."""
        return int(self._sums[0, 0])

    @property
    def num_neg(self) -> int:
        """Negatives taken in."""
        return int(self._sums[1, 0])

    @property
    def value(self) -> float:
        """The arc length; NaN while a class has no points."""
        return float(self._sums[:, 1].sum()) if min(self.num_pos, self.num_neg) else math.nan

    @property
    def standard_error(self) -> float:
        """Its standard error; NaN while a class has fewer than two points."""
        if min(self.num_pos, self.num_neg) < 2:
            return math.nan
        count, _, squares = self._sums.T
        return math.sqrt((squares / (count - 1) / count).sum())

    def lower_bound(self, level: float = 0.95) -> float:
        """Return a one-sided lower bound on the arc length, in ``[sqrt(2), 2]``.

        Args:
            level: Its level.

        Raises:
            ConfigError: If the level is not between 0 and 1.
        """
        check_fraction("level", level)
        return float(np.clip(self.value - stats.norm.ppf(level) * self.standard_error, SHORTEST, LONGEST))


def _joined(old: Any, values: Any) -> Any:
    """Count, mean and squared deviations of two parts together (Chan, Golub and LeVeque 1979): nothing cancels."""
    count, mean, squares = len(values), values.mean(), ((values - values.mean()) ** 2).sum()
    total, gap = old[0] + count, mean - old[1]
    return np.array([total, old[1] + gap * count / total, old[2] + squares + gap**2 * old[0] * count / total])
