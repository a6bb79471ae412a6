"""Two-dimensional densities with draws over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from vifamily.errors import ShapeError
from vifamily.plots import _style as style
from vifamily.plots._style import Array

__all__ = ["contour", "grid_over"]

TARGET_MASSES = (0.2, 0.5, 0.8, 0.95, 0.99)


def grid_over(draws: ArrayLike, *, reference: ArrayLike | None = None, num: int = 120) -> tuple[Array, Array, Array]:
    """Return a grid that covers draws, for evaluating a log density on it.

    Args:
        draws: ``(draw, 2)``.
        reference: Draws that must be covered too, ``(draw, 2)``.
        num: Points per axis.

    Returns:
        The axes ``x`` and ``y``, ``(num,)`` each, and the points ``(num * num, 2)``, x running fastest.

    Example:
        >>> import numpy as np
        >>> x, y, points = grid_over(np.random.default_rng(0).normal(size=(100, 2)), num=5)
        >>> points.shape, bool((points[1] == [x[1], y[0]]).all())
        ((25, 2), True)
    """
    matrix = style.as_matrix(draws, "draws", columns=2)
    other = None if reference is None else style.as_matrix(reference, "reference", columns=2)
    spans = [style.limits(matrix[:, i], None if other is None else other[:, i]) for i in range(2)]
    x, y = (np.linspace(*span, num) for span in spans)
    across, up = np.meshgrid(x, y)
    return x, y, np.stack([across.ravel(), up.ravel()], axis=1)


def draw_target(axes: Axes, x: Array, y: Array, log_density: Array, *, masses: Sequence[float] = TARGET_MASSES) -> None:
    """Shade the regions of highest density of a target on a grid that hold the given shares of its mass."""
    finite = np.where(np.isfinite(log_density), log_density, -np.inf)
    height = np.exp(finite - finite.max()) if np.isfinite(finite).any() else np.zeros_like(finite)
    levels = style.mass_levels(height, masses)
    if levels:
        shades = style.SHADES(np.linspace(0.25, 1.0, len(levels)))
        axes.contourf(x, y, height, levels=[*levels, height.max() * 1.001], colors=shades)
        axes.contour(x, y, height, levels=levels, colors=[style.REFERENCE], linewidths=0.5, alpha=0.7)
    axes.set_xlim(float(x[0]), float(x[-1]))
    axes.set_ylim(float(y[0]), float(y[-1]))


def draw_points(axes: Axes, draws: Array, *, most: int = 800) -> None:
    """Scatter at most so many draws; the fewer there are, the larger and darker."""
    shown = draws[:most]
    few = shown.shape[0] <= 50
    axes.plot(
        shown[:, 0], shown[:, 1], "o", color=style.POSTERIOR, markersize=4.5 if few else 2.2,
        alpha=0.9 if few else 0.45, markeredgewidth=0, linestyle="none", rasterized=True,
    )  # fmt: skip


def contour(
    log_density: Callable[[Array], ArrayLike] | ArrayLike,
    draws: ArrayLike,
    *,
    x: ArrayLike | None = None,
    y: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    log_q: Callable[[Array], ArrayLike] | ArrayLike | None = None,
    reference: ArrayLike | None = None,
    label: str = "posterior draws",
    target_label: str = "target density",
    title: str | None = None,
) -> Figure:
    """Contours of a two-dimensional target with draws over it.

    The regions shaded hold 20, 50, 80, 95 and 99 % of the target's mass inside the picture.

    Args:
        log_density: The target's log density up to a constant: a function from points ``(n, 2)`` to ``(n,)``, or values
            ``(len(y), len(x))``.
        draws: ``(draw, 2)``.
        x: Grid along the first coordinate; by default chosen to cover the draws. Needed when ``log_density`` is an
            array.
        y: Grid along the second coordinate.
        names: Labels of the two coordinates.
        log_q: The family's log density in the same form, drawn as lines.
        reference: Draws ``(draw, 2)`` that the picture must cover as well.
        label: What to call the draws.
        target_label: What to call the target.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If the arrays disagree, or values are given without their grid.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(300, 2))
        >>> figure = contour(lambda points: -0.5 * (points**2).sum(axis=1), draws, names=["x", "y"])
        >>> figure.axes[0].get_xlabel()
        'x'
    """
    matrix = style.as_matrix(draws, "draws", columns=2)
    labels = style.as_names(names, 2)
    if (x is None) != (y is None):
        raise ShapeError("give both x and y, or neither.")
    if x is None or y is None:
        if not callable(log_density) or (log_q is not None and not callable(log_q)):
            raise ShapeError("values of a density need their grid: give x= and y=, or pass a function instead.")
        across, up, _ = grid_over(matrix, reference=reference)
    else:
        across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    figure = style.new_figure(5.2, 4.8)
    axes = figure.subplots()
    draw_target(axes, across, up, _on_grid(log_density, across, up, "log_density"))
    draw_points(axes, matrix, most=1500)
    handles: list[Patch | Line2D] = [
        Patch(facecolor=style.SHADES(0.6), edgecolor=style.REFERENCE, linewidth=0.6, label=target_label),
        Line2D([], [], color=style.POSTERIOR, marker="o", markersize=4, linestyle="none", label=label),
    ]
    if log_q is not None:
        values = _on_grid(log_q, across, up, "log_q")
        height = np.exp(values - values.max())
        levels = style.mass_levels(height, (0.5, 0.9))
        if levels:
            axes.contour(across, up, height, levels=levels, colors=[style.INK], linewidths=1.1, linestyles="--")
        handles.append(Line2D([], [], color=style.INK, linewidth=1.1, linestyle="--", label="family density"))
    axes.set_xlabel(labels[0], fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel(labels[1], fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes, ticks=5)
    style.title(figure, title)
    style.legend(figure, handles, loc="outside lower right", ncols=len(handles))
    return figure


def _on_grid(values: Callable[[Array], ArrayLike] | ArrayLike, x: Array, y: Array, what: str) -> Array:
    shape = (y.size, x.size)
    if callable(values):
        across, up = np.meshgrid(x, y)
        out = np.asarray(values(np.stack([across.ravel(), up.ravel()], axis=1)), dtype=np.float64)
        if out.size != across.size:
            raise ShapeError(f"{what} must give one number per point: {across.size} points, {out.size} numbers.")
        return out.reshape(shape)
    out = np.asarray(values, dtype=np.float64)
    if out.shape != shape:
        raise ShapeError(f"{what} must have shape (len(y), len(x)) = {shape}, got {out.shape}.")
    return out
