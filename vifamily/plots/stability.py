"""How units pull a point apart, and what damping does to the critical alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from vifamily.errors import DataError
from vifamily.plots import _style as style

__all__ = ["stability"]


def stability(
    pull: ArrayLike,
    sweep: Sequence[tuple[float, float]],
    alpha_star: float,
    *,
    alpha: float | None = None,
    chosen: float | None = None,
    title: str | None = None,
) -> Figure:
    """Scores of units along the critical direction, and critical alpha against damping.

    Args:
        pull: Score of each unit along the direction, ``(unit,)``.
        sweep: Pairs of relative damping and critical alpha; the second panel is left out where there are none.
        alpha_star: The critical alpha.
        alpha: An alpha that was asked about, drawn beside it.
        chosen: The relative damping that ``alpha_star`` belongs to.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        DataError: If no score is finite.

    Example:
        >>> figure = stability([-1.0, 1.0, -1.1, 0.9], [(1e-3, 0.3), (1e-2, 0.31)], 0.3)
        >>> figure.axes[0].get_xlabel()
        'score of a unit along the direction'
    """
    values = np.asarray(pull, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        raise DataError("no unit has a finite score, so there is nothing to draw.")
    shown = [(d, a) for d, a in sweep if d > 0 and math.isfinite(a)]
    figure = style.new_figure(8.2 if shown else 4.6, 3.4)
    panels = figure.subplots(1, 2 if shown else 1, squeeze=False)[0]
    _draw_pull(panels[0], values)
    if shown:
        _draw_sweep(panels[1], shown, alpha_star, alpha, chosen)
    style.title(figure, title)
    return figure


def _draw_pull(axes: Axes, values: style.Array) -> None:
    low, high = (float(q) for q in np.quantile(values, [0.002, 0.998]))
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low or 1.0) / float(np.clip(np.sqrt(values.size), 10, 60))
    # zero is an edge, so that no bar holds units of both signs
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    for side, colour in ((values <= 0, style.REFERENCE), (values > 0, style.POSTERIOR)):
        axes.hist(np.clip(values[side], edges[0], edges[-1]), bins=list(edges), color=colour, alpha=0.75)
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_xlabel("score of a unit along the direction", fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel("units", fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes)


def _draw_sweep(
    axes: Axes, sweep: Sequence[tuple[float, float]], alpha_star: float, alpha: float | None, chosen: float | None
) -> None:
    damping, critical = zip(*sorted(sweep), strict=True)
    axes.plot(damping, critical, color=style.POSTERIOR, marker="o", markersize=4, linewidth=1.4)
    handles = [Line2D([], [], color=style.POSTERIOR, marker="o", markersize=4, label="critical alpha")]
    if chosen is not None and chosen > 0 and math.isfinite(alpha_star):
        axes.plot([chosen], [alpha_star], marker="o", markersize=8, color=style.REFERENCE, linestyle="none", zorder=3)
        handles.append(Line2D([], [], color=style.REFERENCE, marker="o", linestyle="none", label="reported"))
    if alpha is not None:
        axes.axhline(alpha, color=style.GREY, linewidth=1.2, linestyle="--")
        handles.append(Line2D([], [], color=style.GREY, linestyle="--", label=f"alpha = {alpha:g}"))
    axes.set_xscale("log")
    axes.set_ylim(0, 1.25 * max(*critical, alpha or 0.0, alpha_star if math.isfinite(alpha_star) else 0.0))
    axes.set_xlabel("damping, relative", fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel("critical alpha", fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes)
    style.legend(axes, handles, loc="best")
