"""Tangent kernels: their spectrum, what they predict of training, and how they move."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from vifamily.errors import DataError, ShapeError
from vifamily.plots import _style as style

__all__ = ["function_flow", "kernel_spectrum", "power_laws"]

_COLOURS = (style.POSTERIOR, style.REFERENCE, style.ACCENT, style.GREY)
_DASHES = ("-", "--", ":", "-.")


def kernel_spectrum(eigenvalues: ArrayLike, *, zeros: int = 0, title: str | None = None) -> Figure:
    """Eigenvalues of a kernel by rank, on a logarithmic scale, with those that are zero to rounding marked.

    Args:
        eigenvalues: From the largest, ``(n,)``.
        zeros: How many of the last count as zero.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        DataError: If no eigenvalue is positive.

    Example:
        >>> kernel_spectrum([1.0, 0.1, 0.0], zeros=1).axes[0].get_xlabel()
        'rank'
    """
    values = np.asarray(eigenvalues, dtype=np.float64).ravel()
    kept = values[: len(values) - zeros]
    if not kept.size or not kept[0] > 0:
        raise DataError("no eigenvalue is positive, so there is nothing to draw.")
    figure = style.new_figure(5.0, 3.4)
    axes = figure.subplots()
    rank = np.arange(1, len(values) + 1)
    axes.plot(rank[: len(kept)], kept, color=style.POSTERIOR, marker="o", markersize=4, linewidth=1.0)
    handles = [Line2D([], [], color=style.POSTERIOR, marker="o", markersize=4, label="eigenvalue")]
    if zeros:
        # drawn at the foot of the picture: their own values are rounding
        foot = np.full(zeros, kept[-1] / 10)
        axes.plot(rank[len(kept) :], foot, color=style.WARNING, marker="x", markersize=4, linestyle="none")
        label = f"zero to rounding ({zeros})"
        handles.append(Line2D([], [], color=style.WARNING, marker="x", linestyle="none", label=label))
    axes.set_yscale("log")
    _name(axes, "rank", "eigenvalue / inputs")
    style.legend(axes, handles, loc="best")
    style.title(figure, title)
    return figure


def function_flow(
    time: ArrayLike,
    losses: Mapping[str, ArrayLike],
    gaps: Mapping[str, ArrayLike] | None = None,
    *,
    best: float | None = None,
    drift: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Losses over time of training, predicted and realised; how far apart their outputs are, and the kernel's drift.

    Args:
        time: Times ``(n,)``, the first of which may be zero.
        losses: Mean loss by name, ``(n,)`` each.
        gaps: Distances from the prediction by name, ``(n,)`` each.
        best: The least loss, drawn as a line.
        drift: Relative drift of the kernel, ``(n,)``, drawn beside the gaps.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If lengths differ.

    Example:
        >>> figure = function_flow([0, 1, 2], {"predicted": [1.0, 0.5, 0.2], "realised": [1.0, 0.5, 0.3]})
        >>> figure.axes[0].get_ylabel()
        'mean loss'
    """
    at = np.asarray(time, dtype=np.float64)
    second = dict(gaps or {}) | ({} if drift is None else {"drift of the kernel": drift})
    for name, line in (*losses.items(), *second.items()):
        if np.shape(line) != at.shape:
            raise ShapeError(f"{name} must have the shape of the times, {at.shape}, got {np.shape(line)}.")
    figure = style.new_figure(8.6 if second else 4.8, 3.4)
    panels = figure.subplots(1, 2 if second else 1, squeeze=False)[0]
    _lines(panels[0], at, losses)
    if best is not None:
        panels[0].axhline(best, color=style.GREY, linewidth=1.0, linestyle=":", label="least")
    _name(panels[0], "time", "mean loss")
    panels[0].legend(frameon=False, fontsize=style.LABEL_SIZE, labelcolor=style.INK)
    if second:
        _lines(panels[1], at, second)
        _name(panels[1], "time", "relative to the way made")
        panels[1].set_ylim(bottom=0.0)
        panels[1].legend(frameon=False, fontsize=style.LABEL_SIZE, labelcolor=style.INK)
    style.title(figure, title)
    return figure


def power_laws(
    width: ArrayLike,
    values: Mapping[str, ArrayLike],
    slopes: Mapping[str, float] | None = None,
    *,
    axis: str = "relative size",
    title: str | None = None,
) -> Figure:
    """What falls with width, on logarithmic axes: every seed as a dot, means joined, with a line of slope minus one.

    Args:
        width: Widths ``(n,)``.
        values: By name, ``(n, seed)`` each.
        slopes: Slope on logarithmic axes, by name, written in the legend.
        axis: What the vertical axis shows.
        title: Written over the figure.

    Returns:
        A figure of its own.

    Raises:
        ShapeError: If a set of values has another number of widths.
        DataError: If none is positive.

    Example:
        >>> power_laws([64, 256], {"drift": [[1.0, 1.2], [0.3, 0.25]]}, {"drift": -1.0}).axes[0].get_xlabel()
        'width'
    """
    at = np.asarray(width, dtype=np.float64)
    figure = style.new_figure(5.4, 3.8)
    axes = figure.subplots()
    top = 0.0
    for i, (name, given) in enumerate(values.items()):
        each = np.asarray(given, dtype=np.float64).reshape(len(np.asarray(given)), -1)
        if len(each) != len(at):
            raise ShapeError(f"{name} must have a row for each of {len(at)} widths, got {len(each)}.")
        colour, slope = _COLOURS[i % len(_COLOURS)], (slopes or {}).get(name)
        label = name if slope is None else f"{name}, slope {slope:.2f}"
        axes.plot(np.repeat(at, each.shape[1]), each.ravel(), color=colour, marker=".", linestyle="none", alpha=0.5)
        axes.plot(at, each.mean(1), color=colour, linewidth=1.5, marker="o", markersize=4, label=label)
        top = max(top, float(np.nanmax(each[0])))
    if not top > 0:
        raise DataError("no value is positive, so there is nothing to draw on logarithmic axes.")
    axes.plot(at, top * at[0] / at, color=style.GREY, linewidth=1.0, linestyle="--", label="slope -1")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _name(axes, "width", axis)
    axes.legend(frameon=False, fontsize=style.LABEL_SIZE, labelcolor=style.INK)
    style.title(figure, title)
    return figure


def _lines(axes: Axes, at: style.Array, lines: Mapping[str, ArrayLike]) -> None:
    for i, (name, line) in enumerate(lines.items()):
        # dashes on top of a full line keep both in sight where they agree
        dash = _DASHES[i % len(_DASHES)]
        axes.plot(at, np.asarray(line, dtype=np.float64), color=_COLOURS[i % len(_COLOURS)], linestyle=dash, label=name)


def _name(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel(y, fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes)
