"""Who explains what, and what alpha buys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from vifamily.errors import ShapeError
from vifamily.plots import _style as style

__all__ = ["alpha_curve", "responsibilities"]

_NAMED = 24
"""Most units whose names are written out."""
_COLUMNS = 480
"""Most columns of a map; its axes are about as many dots wide."""


def responsibilities(
    weight: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    unit: str = "unit",
    unit_names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Responsibilities of members for units as a map, units sorted by the members that share them, with usage.

    Args:
        weight: ``(member, unit)``, between 0 and 1.
        names: A name for each member.
        unit: What to call a unit.
        unit_names: A name for each unit, shown where there are at most 24; else the axis counts units.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If the weights are not a matrix, or names do not fit.

    Example:
        >>> figure = responsibilities([[0.9, 0.2, 0.1], [0.1, 0.8, 0.9]], ["a", "b"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['a', 'b']
    """
    map_ = np.asarray(weight, dtype=np.float64)
    if map_.ndim != 2 or not map_.size:
        raise ShapeError(f"responsibilities must have shape (member, unit), got {map_.shape}.")
    labels = [f"member {i}" for i in range(len(map_))] if names is None else [str(name) for name in names]
    if len(labels) != len(map_):
        raise ShapeError(f"{len(map_)} members need {len(map_)} names, got {len(labels)}.")
    if unit_names is not None and len(unit_names) != map_.shape[1]:
        raise ShapeError(f"{map_.shape[1]} units need {map_.shape[1]} names, got {len(unit_names)}.")
    order = _by_sharers(map_)
    shown = [str(unit_names[i]) for i in order] if unit_names is not None and len(order) <= _NAMED else None
    longest = 0 if shown is None else max(map(len, shown))
    figure = style.new_figure(7.0, 1.2 + 0.3 * len(map_) + 0.07 * min(longest, 24))
    left, right = figure.subplots(1, 2, width_ratios=[5, 1])
    image = left.imshow(
        _columns(map_[:, order]),
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-0.5, len(order) - 0.5, len(map_) - 0.5, -0.5),
    )
    left.set_yticks(range(len(labels)), labels)
    left.tick_params(labelsize=style.TICK_SIZE, colors=style.INK, length=0)
    left.set_xlabel(f"{unit}, sorted by member", fontsize=style.LABEL_SIZE, color=style.INK)
    if shown is None:
        left.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        left.tick_params(axis="x", length=2)
    else:
        left.set_xticks(range(len(shown)), [name if len(name) <= 24 else name[:23] + "…" for name in shown])
        left.tick_params(axis="x", rotation=90)
    bar = figure.colorbar(image, ax=left, location="right", fraction=0.03, pad=0.01)
    bar.ax.tick_params(labelsize=style.TICK_SIZE, colors=style.INK, length=2)
    bar.set_label("responsibility", fontsize=style.TICK_SIZE, color=style.INK)
    style.dress(right)
    right.barh(range(len(labels)), map_.mean(1), color=style.POSTERIOR, height=0.7)
    right.axvline(0.1 / len(labels), color=style.WARNING, linewidth=1, linestyle=":")
    right.set_yticks([])
    right.set_ylim(*left.get_ylim())
    right.set_xlim(0, max(1.05 * float(map_.mean(1).max()), 0.2 / len(labels)))
    right.xaxis.set_major_locator(MaxNLocator(nbins=2, min_n_ticks=2))
    right.set_xlabel("usage\n(dotted: dead)", fontsize=style.LABEL_SIZE, color=style.INK)
    style.title(figure, title)
    return figure


def _columns(map_: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over neighbours where there are more units than can be seen: picking some would hide the others."""
    count = map_.shape[1]
    if count <= _COLUMNS:
        return map_
    edges = np.arange(_COLUMNS) * count // _COLUMNS
    return np.add.reduceat(map_, edges, axis=1) / np.diff([*edges, count])


def _by_sharers(map_: NDArray[np.float64]) -> NDArray[np.intp]:
    """An order of units in which those stand together that the same members share, clearest first."""
    most = map_.max(0)
    shares = map_ >= 0.5 * most
    # members from the first on; those that share a unit are looked at before who has a little more of it
    keys = [-most, *(~shares[::-1])]
    return np.lexsort(keys)


def alpha_curve(
    alpha: ArrayLike,
    mixture: ArrayLike,
    member: ArrayLike,
    *,
    mixture_error: ArrayLike | None = None,
    member_error: ArrayLike | None = None,
    chosen: float | None = None,
    title: str | None = None,
) -> Figure:
    """Held-out log score of the mixture and of a member against alpha: what diversity gains and fidelity loses.

    Args:
        alpha: ``(n,)``.
        mixture: Log score per unit of the mixture, ``(n,)``.
        member: Log score per unit of a member, ``(n,)``.
        mixture_error: Standard errors of the first.
        member_error: Standard errors of the second.
        chosen: An alpha to mark.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If the arrays differ in length.

    Example:
        >>> figure = alpha_curve([0.0, 0.5, 1.0], [-2.0, -1.5, -1.4], [-2.0, -2.2, -2.9], chosen=0.5)
        >>> figure.axes[0].get_xlabel()
        'alpha'
    """
    x = np.asarray(alpha, dtype=np.float64)
    curves = [(np.asarray(mixture, dtype=np.float64), mixture_error, style.POSTERIOR, "o", "mixture"),
              (np.asarray(member, dtype=np.float64), member_error, style.REFERENCE, "s", "member")]  # fmt: skip
    if any(values.shape != x.shape for values, *_ in curves):
        raise ShapeError(f"scores must have one value per alpha ({x.shape}), got {[v.shape for v, *_ in curves]}.")
    figure = style.new_figure(5.6, 3.6)
    axes = figure.subplots()
    style.dress(axes, grid=True)
    for values, error, colour, marker, _ in curves:
        yerr = None if error is None else np.asarray(error, dtype=np.float64)
        axes.errorbar(x, values, yerr=yerr, color=colour, marker=marker, markersize=4, linewidth=1.3, capsize=2)
    if chosen is not None:
        axes.axvline(chosen, color=style.GREY, linewidth=1, linestyle=":")
    axes.set_xlabel("alpha", fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel("held-out log score per unit", fontsize=style.LABEL_SIZE, color=style.INK)
    style.legend(axes, [Line2D([], [], color=c, marker=m, markersize=4, label=n) for _, _, c, m, n in curves])
    style.title(figure, title)
    return figure
