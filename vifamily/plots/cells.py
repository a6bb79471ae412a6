"""A grid of small pictures: problems down, methods across."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from vifamily.errors import ShapeError
from vifamily.plots import _style as style
from vifamily.plots._style import Array
from vifamily.plots.contour import draw_points, draw_target
from vifamily.plots.pairs import draw_marginal

__all__ = ["Panel", "Row", "cell_grid"]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One cell of the grid.

    Attributes:
        draws: ``(draw, 1)`` or ``(draw, 2)``, or None where there is no fit.
        note: A short line under the picture (a figure of merit), or the reason why there is no fit.
    """

    draws: ArrayLike | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """What the cells of one problem share.

    Attributes:
        label: The problem's name.
        names: Labels of the one or two coordinates shown.
        reference: Reference draws ``(draw, 1 or 2)``, or None.
        x: Grid along the first coordinate, where the target's density is known on one.
        y: Grid along the second coordinate.
        log_density: The target's log density there, ``(len(y), len(x))``.
    """

    label: str
    names: Sequence[str]
    reference: ArrayLike | None = None
    x: ArrayLike | None = None
    y: ArrayLike | None = None
    log_density: ArrayLike | None = None


def cell_grid(
    rows: Sequence[Row], columns: Sequence[str], panels: Mapping[tuple[int, int], Panel], *, title: str | None = None
) -> Figure:
    """Draws of every method on every problem, each over its target or its reference draws.

    Args:
        rows: The problems.
        columns: Labels of the methods; a line break separates family and objective.
        panels: What is shown at ``(row, column)``; missing places stay empty.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If a panel has other coordinates than its row.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(100, 2))
        >>> rows = [Row("normal", ["a", "b"], reference=draws)]
        >>> figure = cell_grid(rows, ["mean_field"], {(0, 0): Panel(draws, "error 0.01")})
        >>> figure.axes[0].get_title()
        'mean_field'
    """
    if not rows or not columns:
        raise ShapeError("a grid needs at least one row and one column.")
    side = 1.9 if len(columns) > 4 else 2.3
    figure = style.new_figure(max(side * len(columns) + 0.9, 4.6), side * len(rows) + 0.9)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for r, row in enumerate(rows):
        spans = _row_spans(row, [p.draws for (i, _), p in panels.items() if i == r and p.draws is not None])
        for c, head in enumerate(columns):
            axes = grid[r, c]
            panel = panels.get((r, c))
            _draw_cell(axes, row, panel, spans)
            if r == 0:
                axes.set_title(head, fontsize=style.LABEL_SIZE, color=style.INK)
            if c == 0:
                lines = "\n".join(textwrap.wrap(row.label.replace("_", "_\u200b"), 22)).replace("\u200b", "")
                below = f"\n{row.names[1]}" if len(row.names) == 2 else ""
                axes.set_ylabel(lines + below, fontsize=style.LABEL_SIZE, color=style.INK, visible=True)
            elif axes.axison:
                axes.tick_params(labelleft=False)
    style.title(figure, title)
    style.legend(figure, _grid_handles(rows), loc="outside lower center", ncols=3)
    return figure


def _grid_handles(rows: Sequence[Row]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = []
    two = [row for row in rows if len(row.names) == 2]
    if any(row.log_density is not None for row in two):
        handles.append(
            Patch(facecolor=style.SHADES(0.6), edgecolor=style.REFERENCE, linewidth=0.6, label="target density")
        )
    elif two or any(row.reference is not None for row in rows):
        handles.append(
            Patch(facecolor=style.SHADES(0.6), edgecolor=style.REFERENCE, linewidth=0.6, label="reference draws")
        )
    handles.append(
        Line2D([], [], color=style.POSTERIOR, marker="o", markersize=4, linestyle="none", label="posterior draws")
    )
    return handles


def _matrix(values: ArrayLike, row: Row) -> Array:
    return style.as_matrix(values, f"draws of {row.label!r}", columns=len(row.names))


def _row_spans(row: Row, draws: Sequence[ArrayLike]) -> list[tuple[float, float]]:
    if row.x is not None:
        grids = [np.asarray(g, dtype=np.float64) for g in (row.x, row.y) if g is not None]
        return [(float(g[0]), float(g[-1])) for g in grids]
    reference = None if row.reference is None else _matrix(row.reference, row)
    everything = [_matrix(d, row) for d in draws] or (
        [reference] if reference is not None else [np.zeros((2, len(row.names)))]
    )
    # the median over methods of each limit: one that went astray does not set the scale of its row
    spans = []
    for i in range(len(row.names)):
        each = np.array([style.limits(d[:, i], None if reference is None else reference[:, i]) for d in everything])
        low, high = np.median(each, axis=0)
        spans.append((float(low), float(high)))
    return spans


def _draw_cell(axes: Axes, row: Row, panel: Panel | None, spans: list[tuple[float, float]]) -> None:
    if panel is None or panel.draws is None:
        reason = "\n".join(textwrap.wrap(panel.note, 24)[:7]) if panel is not None else ""
        axes.text(
            0.5,
            0.5,
            reason,
            ha="center",
            va="center",
            transform=axes.transAxes,
            fontsize=style.TICK_SIZE,
            color=style.GREY,
        )
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#E2E2E2")
        return
    draws = _matrix(panel.draws, row)
    reference = None if row.reference is None else _matrix(row.reference, row)
    if len(row.names) == 1:
        draw_marginal(axes, draws[:, 0], None if reference is None else reference[:, 0], spans[0])
    else:
        if row.log_density is not None and row.x is not None and row.y is not None:
            draw_target(axes, *(np.asarray(a, dtype=np.float64) for a in (row.x, row.y, row.log_density)))
        elif reference is not None:
            # draws say little about the far tails, so their regions stop at nine tenths
            x, y, height = style.density_2d(reference, spans[0], spans[1], smooth_more=1.4)
            with np.errstate(divide="ignore"):
                draw_target(axes, x, y, np.log(height), masses=(0.25, 0.5, 0.75, 0.9))
        draw_points(axes, draws, most=250)
        axes.set_xlim(spans[0])
        axes.set_ylim(spans[1])
        style.dress(axes, ticks=3)
    below = f"{row.names[0]}\n{panel.note}" if panel.note else row.names[0]
    axes.set_xlabel(below, fontsize=style.TICK_SIZE, color=style.INK, labelpad=2)
