"""Pictures of the optimal ROC curve, by scikit-learn's conventions for displays."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from scipy import stats

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE
from vifamily.plots._style import GREY, INK, LABEL_SIZE, POSTERIOR, REFERENCE, TICK_SIZE, dress, new_figure
from vifamily.roc._arc_length import ArcLength, arc_length_from_angles
from vifamily.roc._checks import numbers_of
from vifamily.roc._curves import concave_hull, fitted_curve, polyline_length, staircase
from vifamily.roc._ratio import two_classes

__all__ = ["OptimalRocDisplay"]

Array = NDArray[np.float64]


class OptimalRocDisplay:
    r"""The held-out ROC curve with its concave hull, beside the optimal curve that the fitted angles imply.

    Three curves that should lie on each other where the angles are right and points are many:

    - the staircase of the held-out scores. **Its length is 2 whatever the data** (every step is along an axis), so
      that no arc length can be read off it, nor off ``sklearn.metrics.roc_curve``;
    - its concave hull, which is the curve of the scores with randomised thresholds. Its length errs upwards;
    - the fitted curve, each segment at its angle u. A gap from the hull shows angles that are not calibrated.

    The band is pointwise about the hull, from the binomial errors of both rates, the slope of the curve being the
    fitted ratio (Hsieh and Turnbull 1996). Use points that had no part in the fit: :meth:`from_arc_length` has them.

    Args:
        result: Estimated arc length, with its held-out angles.
        name: Label of the curves.

    Attributes:
        fpr: Rates of false positives of the staircase.
        tpr: Rates of true positives of the staircase.
        hull: Corners of the hull, ``(2, corner)``.
        fitted: Corners of the fitted curve, ``(2, corner)``.
        fitted_angle: Angle of each of its segments.
        hull_length: Length of the hull.
        ax_: Axes of the last plot.
        figure_: Figure of the last plot.
        line_: The staircase in it.

    Example:
        >>> from vifamily.roc import arc_length
        >>> x = np.random.default_rng(0).normal(size=(200, 1))
        >>> display = arc_length(x + 1, x).plot()
        >>> display.ax_.get_xlabel()
        'false positive rate'
    """

    def __init__(self, result: ArcLength, *, name: str | None = None) -> None:
        angles = result.out_of_fold
        self.result, self.name = result, name
        self.fpr, self.tpr = staircase(angles.angle_pos, angles.angle_neg)
        self.hull = np.stack(concave_hull(self.fpr, self.tpr))
        false, true, self.fitted_angle = fitted_curve(angles.angle_pos, angles.angle_neg)
        self.fitted = np.stack([false, true])
        self.hull_length = polyline_length(*self.hull)

    @classmethod
    def from_arc_length(cls, result: ArcLength, *, name: str | None = None) -> OptimalRocDisplay:
        """Make a display of an estimate, from its held-out angles; not yet drawn."""
        return cls(result, name=name)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        level: float = 0.95,
        name: str | None = None,
        ax: Any = None,  # noqa: N803
    ) -> OptimalRocDisplay:
        """Draw the curves of a fitted estimator at points that had no part in its fit.

        Args:
            estimator: A fitted :class:`ArcLengthRatio`, or what has ``angle``.
            X: ``(sample, feature)``.
            y: ``(sample,)``, two labels; the larger one is the positive class.
            level: Level of the intervals.
            name: Label of the curves; by default the class of the estimator.
            ax: Axes to draw on; None for a new figure.

        Raises:
            ConfigError: If the estimator has no angles.
            DataError: If there are not two classes, or a label is unknown to the estimator.
        """
        kind = type(estimator).__name__
        if not hasattr(estimator, "angle"):
            raise ConfigError(f"{kind} has no angles: wrap it, ArcLengthRatio(model={kind}()).")
        known = getattr(estimator, "classes_", None)
        if known is not None and not np.isin(np.unique(y), known).all():
            raise DataError(f"labels must be among {known.tolist()}, got {np.unique(y).tolist()}.")
        label = kind if name is None else name
        return cls.from_predictions(y, estimator.angle(X), level=level, name=label, ax=ax)

    @classmethod
    def from_predictions(
        cls, y_true: Any, y_angle: Any, *, level: float = 0.95, name: str | None = None, ax: Any = None
    ) -> OptimalRocDisplay:
        """Draw the curves of angles at points that had no part in their fit.

        Args:
            y_true: ``(sample,)``, two labels; the larger one is the positive class.
            y_angle: ``(sample,)``, angles in ``[0, pi/2]``.
            level: Level of the intervals.
            name: Label of the curves.
            ax: Axes to draw on; None for a new figure.

        Raises:
            ShapeError: If the lengths differ.
            DataError: If there are not two classes, or an angle is out of its range.
        """
        y, u = np.asarray(y_true), numbers_of(y_angle, "angles")
        if y.ndim != 1 or u.shape != y.shape:
            raise ShapeError(f"one angle for each label is needed, got shapes {u.shape} and {y.shape}.")
        classes = two_classes(y)
        if min((y == c).sum() for c in classes) < 2:
            raise DataError("at least two points of each class are needed: a curve from one has no error.")
        result = arc_length_from_angles(u[y == classes[1]], u[y == classes[0]], level=level)
        return cls(result, name=name).plot(ax)

    def plot(
        self, ax: Any = None, *, name: str | None = None, plot_chance_level: bool = True, plot_band: bool = True
    ) -> OptimalRocDisplay:
        """Draw the curves.

        Args:
            ax: Axes to draw on; None for a new figure, which pyplot does not know of.
            name: Label of the curves.
            plot_chance_level: Draw the diagonal.
            plot_band: Draw the band about the hull.

        Returns:
            The display, with ``ax_``, ``figure_`` and ``line_``.
        """
        if ax is None:
            ax = new_figure(5.2, 5.0).add_subplot()
        if plot_chance_level:
            ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if plot_band:
            grid, low, high = self.band()
            ax.fill_between(grid, low, high, color=POSTERIOR, alpha=0.14, linewidth=0, zorder=1)
        (self.line_,) = ax.plot(self.fpr, self.tpr, color=GREY, linewidth=0.8, label="held out (length 2)", zorder=2)
        ax.plot(*self.hull, color=POSTERIOR, linewidth=1.8, zorder=3, label=f"its hull (length {self.hull_length:.3f})")
        self._draw_fitted(ax)
        self._annotate(ax, self.name if name is None else name)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def band(self, num: int = 201) -> tuple[Array, Array, Array]:
        """Return a grid of rates of false positives, and the lower and upper ends of the band there."""
        grid = np.linspace(0, 1, num)
        height = np.interp(grid, *self.hull)
        segment = np.clip(np.searchsorted(self.fitted[0], grid, side="right") - 1, 0, len(self.fitted_angle) - 1)
        slope = np.tan(np.minimum(self.fitted_angle[segment], RIGHT_ANGLE - 1e-3))
        angles = self.result.out_of_fold
        spread = height * (1 - height) / len(angles.angle_pos)
        spread = spread + slope**2 * grid * (1 - grid) / len(angles.angle_neg)
        half = stats.norm.ppf((1 + self.result.level) / 2) * np.sqrt(spread)
        return grid, np.clip(height - half, 0, 1), np.clip(height + half, 0, 1)

    def _draw_fitted(self, ax: Any) -> None:
        """The fitted curve; a hull of thousands of corners is drawn with a few hundred."""
        keep = np.unique(np.linspace(0, self.fitted.shape[1] - 1, 400).astype(int))
        corners = self.fitted[:, keep].T
        pieces = np.stack([corners[:-1], corners[1:]], axis=1)
        lines = LineCollection(list(pieces), colors=REFERENCE, linewidths=1.4, linestyles="solid", zorder=4)
        lines.set_label("optimal curve, fitted")
        ax.add_collection(lines)

    def _annotate(self, ax: Any, name: str | None) -> None:
        result = self.result
        text = (
            f"arc length {result.value:.3f} ± {result.standard_error:.3f}\n"
            f"AUC {result.auc:.3f} ± {result.auc_standard_error:.3f}, at least {result.auc_lower_bound:.3f}\n"
            f"area over the diagonal {result.surface_area:.3f}"
        )
        ax.text(0.98, 0.30, text, transform=ax.transAxes, ha="right", va="bottom", fontsize=TICK_SIZE, color=INK)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        ax.set_xlabel("false positive rate", fontsize=LABEL_SIZE, color=INK)
        ax.set_ylabel("true positive rate", fontsize=LABEL_SIZE, color=INK)
        if name:
            ax.set_title(name, fontsize=LABEL_SIZE, color=INK, loc="left")
        ax.legend(loc="lower right", frameon=False, fontsize=TICK_SIZE, labelcolor=INK)
        dress(ax)
