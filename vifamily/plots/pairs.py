"""Marginals and pairs of quantities, with a reference over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from vifamily.errors import ConfigError
from vifamily.plots import _style as style
from vifamily.plots._style import Array

__all__ = ["marginals", "pairs"]

MASSES = (0.5, 0.9)


def _inputs(
    draws: ArrayLike, names: Sequence[str] | None, reference: ArrayLike | None, max_columns: int
) -> tuple[Array, list[str], Array | None, int]:
    if max_columns < 1:
        raise ConfigError(f"max_columns must be at least 1, got {max_columns}.")
    matrix = style.as_matrix(draws, "draws")
    total = matrix.shape[1]
    labels = style.as_names(names, total)
    other = None if reference is None else style.as_matrix(reference, "reference", columns=total)
    kept = min(total, max_columns)
    return matrix[:, :kept], labels[:kept], None if other is None else other[:, :kept], total


def _handles(label: str, reference_label: str | None) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [Patch(facecolor=style.POSTERIOR, alpha=0.55, label=label)]
    if reference_label is not None:
        handles.append(Line2D([], [], color=style.REFERENCE, linewidth=1.8, label=reference_label))
    return handles


def _shown(title: str | None, kept: int, total: int) -> str | None:
    if kept == total:
        return title
    return f"{title + ', ' if title else ''}first {kept} of {total} quantities"


def draw_marginal(axes: Axes, draws: Array, reference: Array | None, span: tuple[float, float]) -> None:
    """Draw one smoothed marginal, filled, with the reference as a line."""
    grid, height = style.density(draws, span)
    axes.fill_between(grid, height, color=style.POSTERIOR, alpha=0.35, linewidth=0)
    axes.plot(grid, height, color=style.POSTERIOR, linewidth=1.3)
    top = float(height.max())
    if reference is not None:
        grid, height = style.density(reference, span)
        axes.plot(grid, height, color=style.REFERENCE, linewidth=1.6)
        # a family that is far too narrow would flatten the reference to a line at the bottom
        top = min(max(top, float(height.max())), 4 * float(height.max()))
    axes.set_xlim(span)
    axes.set_ylim(0, 1.08 * top if top > 0 else 1.0)
    axes.set_yticks([])
    style.dress(axes)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])


def draw_pair(
    axes: Axes,
    draws: Array,
    reference: Array | None,
    x_span: tuple[float, float],
    y_span: tuple[float, float],
) -> None:
    """Draw the regions that hold half and nine tenths of the draws, filled, with the reference's as lines."""
    x, y, height = style.density_2d(draws, x_span, y_span)
    levels = style.mass_levels(height, MASSES)
    if levels:
        alphas = (0.28, 0.6)[-len(levels) :]
        for i, alpha in enumerate(alphas):
            axes.contourf(x, y, height, levels=[levels[i], height.max() * 1.001], colors=[style.POSTERIOR], alpha=alpha)
    else:
        axes.plot(draws[:, 0], draws[:, 1], ".", color=style.POSTERIOR, markersize=4, alpha=0.6)
    if reference is not None:
        x, y, height = style.density_2d(reference, x_span, y_span)
        levels = style.mass_levels(height, MASSES)
        if levels:
            axes.contour(x, y, height, levels=levels, colors=[style.REFERENCE], linewidths=[1.0, 1.5][-len(levels) :])
    axes.set_xlim(x_span)
    axes.set_ylim(y_span)


def pairs(
    draws: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    reference: ArrayLike | None = None,
    label: str = "posterior",
    reference_label: str = "reference",
    max_columns: int = 8,
    title: str | None = None,
) -> Figure:
    """Every pair of quantities, with their marginals on the diagonal.

    Below the diagonal, the smallest regions that hold 50 % and 90 % of the (smoothed) draws.

    Args:
        draws: ``(draw, quantity)``.
        names: One label per quantity; ``z[0]`` … by default.
        reference: Draws to compare with, ``(draw, quantity)``, shown as lines.
        label: What to call the draws.
        reference_label: What to call the reference.
        max_columns: Quantities shown at most, the first ones.
        title: Written over the figure.

    Returns:
        A figure of its own (not known to pyplot); save it with ``figure.savefig(path)``.

    Raises:
        ShapeError: If the arrays or names disagree.
        DataError: If there are fewer than two finite draws.

    Example:
        >>> import numpy as np
        >>> figure = pairs(np.random.default_rng(0).normal(size=(500, 3)), ["a", "b", "c"])
        >>> sum(axes.get_visible() for axes in figure.axes)
        6
    """
    matrix, labels, other, total = _inputs(draws, names, reference, max_columns)
    size = matrix.shape[1]
    if size == 1:
        return marginals(matrix, labels, reference=other, label=label, reference_label=reference_label, title=title)
    side = max(1.25, min(2.1, 9.5 / size))
    figure = style.new_figure(side * size + 0.8, side * size + 0.8)
    grid = figure.subplots(size, size, squeeze=False)
    spans = [style.limits(matrix[:, i], None if other is None else other[:, i]) for i in range(size)]
    for row in range(size):
        for column in range(size):
            axes = grid[row, column]
            if column > row:
                axes.set_visible(False)
                continue
            if column == row:
                draw_marginal(axes, matrix[:, row], None if other is None else other[:, row], spans[row])
            else:
                chosen = [column, row]
                draw_pair(
                    axes, matrix[:, chosen], None if other is None else other[:, chosen], spans[column], spans[row]
                )
                style.dress(axes, ticks=3)
            _label_edges(axes, row, column, labels)
    style.title(figure, _shown(title, size, total))
    handles = _handles(label, None if other is None else reference_label)
    style.legend(figure, handles, loc="outside upper right" if size < 3 else "upper right")
    return figure


def _label_edges(axes: Axes, row: int, column: int, labels: list[str]) -> None:
    last = len(labels) - 1
    if row == last:
        axes.set_xlabel(labels[column], fontsize=style.LABEL_SIZE, color=style.INK)
    else:
        axes.tick_params(labelbottom=False)
    if column == 0 and row > 0:
        axes.set_ylabel(labels[row], fontsize=style.LABEL_SIZE, color=style.INK)
    elif column < row:
        axes.tick_params(labelleft=False)


def marginals(
    draws: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    reference: ArrayLike | None = None,
    label: str = "posterior",
    reference_label: str = "reference",
    max_columns: int = 24,
    title: str | None = None,
) -> Figure:
    """One smoothed marginal per quantity, four to a row.

    Args:
        draws: ``(draw, quantity)``.
        names: One label per quantity.
        reference: Draws to compare with, ``(draw, quantity)``, shown as lines.
        label: What to call the draws.
        reference_label: What to call the reference.
        max_columns: Quantities shown at most, the first ones.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If the arrays or names disagree.
        DataError: If there are fewer than two finite draws.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> figure = marginals(rng.normal(size=(500, 2)), ["mu", "tau"], reference=rng.normal(size=(400, 2)))
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['mu', 'tau']
    """
    matrix, labels, other, total = _inputs(draws, names, reference, max_columns)
    size = matrix.shape[1]
    across = min(size, 4)
    down = math.ceil(size / across)
    figure = style.new_figure(max(2.3 * across, 4.2) + 0.2, 1.7 * down + 0.9)
    grid = np.atleast_1d(figure.subplots(down, across, squeeze=False)).ravel()
    for i in range(size):
        column = None if other is None else other[:, i]
        draw_marginal(grid[i], matrix[:, i], column, style.limits(matrix[:, i], column))
        grid[i].set_xlabel(labels[i], fontsize=style.LABEL_SIZE, color=style.INK)
    for axes in grid[size:]:
        figure.delaxes(axes)
    style.title(figure, _shown(title, size, total))
    style.legend(
        figure, _handles(label, None if other is None else reference_label), loc="outside lower right", ncols=2
    )
    return figure
