"""Colours, axes, limits and smoothing shared by the plots.

Everything is set on the artists themselves: matplotlib's global parameters and pyplot's state are never touched.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from vifamily.errors import DataError, ShapeError

__all__ = ["GREY", "INK", "POSTERIOR", "REFERENCE", "WARNING"]

Array = NDArray[np.float64]

# Okabe and Ito's palette: told apart with every common colour deficiency, and in grey print by their lightness.
POSTERIOR = "#0072B2"
REFERENCE = "#D55E00"
WARNING = "#CC3311"
ACCENT = "#009E73"
INK = "#222222"
GREY = "#767676"
FRAME = "#B8B8B8"
SHADES = LinearSegmentedColormap.from_list("vifamily_target", ["#FFFFFF", "#FBE3D2", "#F2B48C", "#D98A55"])

TICK_SIZE, LABEL_SIZE, TITLE_SIZE = 8.5, 10.0, 11.5
DPI = 150


class NotebookFigure(Figure):
    """A figure that shows itself in a notebook, which knows only figures made through pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=90)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, with a canvas of its own and constrained layout."""
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, *, ticks: int = 4, grid: bool = False) -> None:
    """Give axes thin frames, few ticks and readable labels."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FRAME)
        axes.spines[side].set_linewidth(0.8)
    axes.tick_params(labelsize=TICK_SIZE, colors=INK, length=3, width=0.8, color=FRAME)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(ticks, prune=None))
    if grid:
        axes.grid(visible=True, color="#E8E8E8", linewidth=0.7)
        axes.set_axisbelow(True)


def title(figure: Figure, text: str | None) -> None:
    """Put a title over the whole figure, aligned left."""
    if text:
        figure.suptitle(text, fontsize=TITLE_SIZE, color=INK, x=0.01, ha="left")


def as_matrix(values: ArrayLike, what: str, *, columns: int | None = None) -> Array:
    """Return draws as a float64 matrix ``(draw, quantity)`` without rows that are not finite.

    Raises:
        ShapeError: If the array has another rank, or another number of columns.
        DataError: If fewer than two finite rows are left.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        wanted = "(draw, quantity)" if columns is None else f"(draw, {columns})"
        raise ShapeError(f"{what} must have shape {wanted}, got {array.shape}.")
    array = array[np.isfinite(array).all(axis=1)]
    if array.shape[0] < 2:
        raise DataError(f"{what} must hold at least two finite draws, got {array.shape[0]}.")
    return array


def as_names(names: Sequence[str] | None, count: int) -> list[str]:
    """Return one label per column, ``z[0]``, ``z[1]`` … where none are given."""
    if names is None:
        return [f"z[{i}]" for i in range(count)]
    if len(names) != count:
        raise ShapeError(f"{count} columns need {count} names, got {len(names)}.")
    return [str(name) for name in names]


def limits(draws: Array, reference: Array | None = None) -> tuple[float, float]:
    """Return axis limits that show nearly all of the draws, and never lose the reference.

    The limits are the 0.3 % and 99.7 % quantiles with a margin. Where a reference is given, they cover it, and follow
    the draws out to four times the reference's own width: a fit that went astray then shows as such, and the reference
    does not shrink to a dot.

    Args:
        draws: ``(draw,)``.
        reference: ``(draw,)`` or None.
    """
    low, high = np.quantile(draws, [0.003, 0.997])
    if reference is not None and reference.size:
        ref_low, ref_high = np.quantile(reference, [0.003, 0.997])
        room = 1.5 * max(ref_high - ref_low, 1e-300)
        low = min(ref_low, max(low, ref_low - room))
        high = max(ref_high, min(high, ref_high + room))
    width = high - low
    if not width > 1e-12 * max(abs(low), abs(high), 1e-300):
        width = max(abs(high), 1.0)
        return float(low - 0.5 * width), float(high + 0.5 * width)
    return float(low - 0.08 * width), float(high + 0.08 * width)


def bandwidth(draws: Array) -> float:
    """Return a smoothing width that keeps separate modes apart.

    Silverman's rule with the smallest of three scales: the standard deviation, the interquartile range over 1.349, and
    the shortest interval that holds a tenth of the draws over 0.2513 (all three equal the standard deviation of a
    normal).
    """
    ordered = np.sort(draws)
    count = ordered.size
    inside = max(2, count // 10)
    shortest = float(np.min(ordered[inside - 1 :] - ordered[: count - inside + 1]))
    quartile = float(np.subtract(*np.quantile(ordered, [0.75, 0.25])))
    scales = [s for s in (float(ordered.std()), quartile / 1.349, shortest / 0.2513) if s > 0]
    return 0.9 * min(scales) * count**-0.2 if scales else 0.0


def density(draws: Array, span: tuple[float, float], num: int = 400) -> tuple[Array, Array]:
    """Smoothed density of draws on a grid.

    Args:
        draws: ``(draw,)``.
        span: Limits of the grid; draws outside count towards the total mass, not the picture.
        num: Points of the grid.

    Returns:
        Grid and density, ``(num,)`` each.
    """
    edges = np.linspace(*span, num + 1)
    step = edges[1] - edges[0]
    counts, _ = np.histogram(draws, bins=edges)
    width = float(np.clip(bandwidth(draws) / step, 0.8, num / 6))
    smooth = ndimage.gaussian_filter1d(counts.astype(np.float64), width, mode="constant")
    return 0.5 * (edges[1:] + edges[:-1]), smooth / (draws.size * step)


def density_2d(
    draws: Array, x_span: tuple[float, float], y_span: tuple[float, float], num: int = 90, *, smooth_more: float = 1.15
) -> tuple[Array, Array, Array]:
    """Smoothed density of draws ``(draw, 2)`` on a grid; the density has shape ``(num, num)``, rows along y.

    Draws outside the grid are left out. ``smooth_more`` widens the smoothing of Silverman's rule.
    """
    x_edges, y_edges = np.linspace(*x_span, num + 1), np.linspace(*y_span, num + 1)
    counts, _, _ = np.histogram2d(draws[:, 1], draws[:, 0], bins=[y_edges, x_edges])
    # in two dimensions Silverman's rule has n^(-1/6); a correlated cloud needs less than its marginals suggest
    grow = smooth_more * draws.shape[0] ** (1 / 5 - 1 / 6)
    slack = (
        float(np.sqrt(max(1 - np.corrcoef(draws[:, 0], draws[:, 1]).ravel()[1] ** 2, 0.05)))
        if (draws.std(0) > 0).all()
        else 1.0
    )
    widths = [
        float(np.clip(grow * slack * bandwidth(draws[:, i]) / (edges[1] - edges[0]), 0.9, num / 8))
        for i, edges in ((1, y_edges), (0, x_edges))
    ]
    smooth = ndimage.gaussian_filter(counts, widths, mode="constant")
    return 0.5 * (x_edges[1:] + x_edges[:-1]), 0.5 * (y_edges[1:] + y_edges[:-1]), smooth


def mass_levels(values: Array, masses: Sequence[float]) -> list[float]:
    """Heights above which a density on a regular grid holds the given shares of its mass, ascending and distinct.

    Args:
        values: Non-negative density on a grid, of any shape.
        masses: Shares in (0, 1).
    """
    ordered = np.sort(values.ravel())[::-1]
    total = ordered.sum()
    if not total > 0:
        return []
    cumulative = np.cumsum(ordered) / total
    heights = {float(ordered[min(int(np.searchsorted(cumulative, m)), ordered.size - 1)]) for m in masses}
    return sorted(h for h in heights if 0 < h < ordered[0])


def legend(target: Any, handles: Sequence[Any], *, solid: bool = False, **options: Any) -> None:
    """Add a legend without frame and with readable text to axes or a figure; ``solid`` hides what lies behind it."""
    box = (
        {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.9} if solid else {"frameon": False}
    )
    target.legend(handles=handles, fontsize=LABEL_SIZE, labelcolor=INK, **box, **options)
