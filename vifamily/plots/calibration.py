"""Ranks and probabilities of simulated truths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from vifamily.errors import DataError, ShapeError
from vifamily.numerics.uniformity import ecdf_band
from vifamily.plots import _style as style

__all__ = ["ecdf_difference", "probability_histograms"]

_MOST_PANELS = 16


def ecdf_difference(
    ranks: ArrayLike,
    num_draws: int,
    names: Sequence[str] | None = None,
    *,
    coverage: float = 0.95,
    seed: int = 0,
    title: str | None = None,
) -> Figure:
    """ECDF of ranks less that of uniform ones, in a band that holds the whole of it.

    A line that leaves the band is drawn in a warning colour. A wave that is first up and then down is a posterior that
    is too narrow, first down and then up one that is too wide; an arch is one that is off to one side.

    Args:
        ranks: Whole numbers from 0 to ``num_draws``, ``(simulation, quantity)``.
        num_draws: Draws among which each was ranked.
        names: Labels of the quantities.
        coverage: Probability that the band holds the whole line of one quantity with uniform ranks.
        seed: Seed of the simulation that gives the band.
        title: Written over the figure; with more than sixteen quantities those furthest off are shown, and it says so.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If ranks are no matrix, lie outside their range, or names do not fit.

    References:
        Säilynoja, Bürkner and Vehtari (2022), Graphical test for discrete uniformity and its applications in
        goodness-of-fit evaluation and multiple sample comparison, Statistics and Computing 32.

    Example:
        >>> import numpy as np
        >>> ranks = np.random.default_rng(0).integers(0, 100, size=(50, 2))
        >>> [axes.get_title(loc="left") for axes in ecdf_difference(ranks, 99, ["a", "b"]).axes]
        ['a', 'b']
    """
    values = _matrix(ranks, "ranks")
    if values.min() < 0 or values.max() > num_draws:
        raise ShapeError(f"ranks must lie between 0 and {num_draws}, got {values.min():g} to {values.max():g}.")
    labels = style.as_names(names, values.shape[1])
    band = ecdf_band(len(values), num_draws, coverage=coverage, seed=seed)
    cuts = np.round(band.points * (num_draws + 1))
    lines = (values[:, :, None] < cuts).mean(0) - band.points
    lower, upper = band.lower - band.points, band.upper - band.points
    outside = ((lines < lower - 1e-9) | (lines > upper + 1e-9)).any(1)
    shown, heading = _choose(np.abs(lines).max(1), title)
    figure, grid = _panels(len(shown), heading, "fractional rank", "ECDF less uniform")
    for axes, which in zip(grid, shown, strict=True):
        colour = style.WARNING if outside[which] else style.POSTERIOR
        axes.fill_between(band.points, lower, upper, color=style.GREY, alpha=0.25, linewidth=0)
        axes.plot(band.points, lines[which], color=colour, linewidth=1.4)
        axes.axhline(0.0, color=style.GREY, linewidth=0.8)
        axes.set_title(labels[which], fontsize=style.LABEL_SIZE, color=style.INK, loc="left")
        style.dress(axes)
    handles = [
        Line2D([], [], color=style.POSTERIOR, label="inside"), Line2D([], [], color=style.WARNING, label="outside"),
        Patch(color=style.GREY, alpha=0.25, label=f"{coverage:.0%} of uniform ranks"),
    ]  # fmt: skip
    style.legend(figure, handles, loc="outside lower center", ncol=3)
    return figure


def probability_histograms(
    probability: ArrayLike, names: Sequence[str] | None = None, *, title: str | None = None
) -> Figure:
    """Histograms of probabilities of being below the truth; symmetric about one half where centres are unbiased.

    Args:
        probability: In [0, 1], ``(simulation, quantity)``.
        names: Labels of the quantities.
        title: Written over the figure; with more than sixteen quantities those furthest off are shown, and it says so.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If they are no matrix, lie outside [0, 1], or names do not fit.

    Example:
        >>> import numpy as np
        >>> len(probability_histograms(np.random.default_rng(0).uniform(size=(50, 3))).axes)
        3
    """
    values = _matrix(probability, "probabilities")
    if values.min() < 0 or values.max() > 1:
        raise ShapeError(f"probabilities must lie in [0, 1], got {values.min():g} to {values.max():g}.")
    labels = style.as_names(names, values.shape[1])
    shown, heading = _choose(np.abs(values.mean(0) - 0.5), title)
    figure, grid = _panels(len(shown), heading, "probability below the truth", "fits")
    bins = np.linspace(0, 1, max(6, min(20, len(values) // 8)) + 1)
    for axes, which in zip(grid, shown, strict=True):
        axes.hist(values[:, which], bins=list(bins), color=style.POSTERIOR, alpha=0.8)
        axes.axvline(0.5, color=style.GREY, linewidth=0.8)
        axes.axvline(float(values[:, which].mean()), color=style.REFERENCE, linewidth=1.4)
        axes.set_title(labels[which], fontsize=style.LABEL_SIZE, color=style.INK, loc="left")
        axes.set_xlim(0, 1)
        style.dress(axes)
    style.legend(figure, [Line2D([], [], color=style.REFERENCE, label="mean")], loc="outside lower center")
    return figure


def _matrix(values: ArrayLike, what: str) -> style.Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ShapeError(f"{what} must have shape (simulation, quantity), got {array.shape}.")
    if not np.isfinite(array).all():
        raise DataError(f"{what} hold values that are not finite.")
    return array


def _choose(off: style.Array, title: str | None) -> tuple[list[int], str | None]:
    """Positions of the panels to show, and the title with what is left out."""
    if len(off) <= _MOST_PANELS:
        return list(range(len(off))), title
    furthest = sorted(np.argsort(-off, kind="stable")[:_MOST_PANELS].tolist())
    said = f"the {_MOST_PANELS} of {len(off)} quantities furthest off"
    return furthest, said if title is None else f"{title} ({said})"


def _panels(count: int, title: str | None, x: str, y: str) -> tuple[Figure, list[Axes]]:
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = style.new_figure(1.2 + 2.3 * columns, 1.3 + 1.8 * rows)
    style.title(figure, title)
    grid: list[Axes] = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        figure.delaxes(axes)
    for position, axes in enumerate(grid[:count]):
        if position + columns >= count:  # nothing below
            axes.set_xlabel(x, fontsize=style.LABEL_SIZE, color=style.INK)
            axes.tick_params(labelbottom=True)
        if position % columns == 0:
            axes.set_ylabel(y, fontsize=style.LABEL_SIZE, color=style.INK)
    return figure, grid[:count]
