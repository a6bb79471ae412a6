"""Pictures of the benchmarks, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, NullFormatter

from vifamily.plots._style import dress, new_figure

__all__ = ["gap_figure", "scaling_figure"]

_FLOOR = 1e-4
_COLOURS = {
    "vifamily auto": "#0072B2", "vifamily lbfgs": "#56B4E9", "vifamily adam": "#0B3C5D", "numpyro": "#D55E00",
    "blackjax": "#E69F00", "pathfinder": "#CC79A7", "pymc": "#009E73", "pyro": "#767676",
}  # fmt: skip

Curve = tuple[str, np.ndarray, np.ndarray]


def _grid(count: int, width: int = 2) -> tuple[Figure, list[Any]]:
    width = min(width, count)
    height = -(-count // width)
    figure = new_figure(5.2 * width, 3.6 * height + 0.4)
    return figure, [figure.add_subplot(height, width, i + 1) for i in range(count)]


def _logarithmic(axis: Any) -> None:
    """Make both axes logarithmic; labels between powers of ten only where hardly more than one of those is in sight."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    dress(axis)
    for each, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        narrow = np.log10(limits[1] / limits[0]) < 1
        each.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(1.0, 0.5)) if narrow else NullFormatter())


def gap_figure(panels: Sequence[tuple[str, Sequence[Curve]]], clock: str) -> Figure:
    """Gap to the best bound against time, one panel for each problem and family."""
    figure, axes = _grid(max(1, len(panels)))
    named: dict[str, Any] = {}
    for axis, (title, curves) in zip(axes, panels, strict=False):
        for side, seconds, gaps in curves:
            shown = np.isfinite(gaps) & (seconds > 0)
            style = "-" if side.startswith("vifamily") else "--"
            (line,) = axis.plot(seconds[shown], np.maximum(gaps[shown], _FLOOR), style, lw=1.6, marker="o", ms=2.5,
                                color=_COLOURS.get(side))  # fmt: skip
            named.setdefault(side, line)
        axis.axhline(0.1, color="#222222", lw=0.8, ls=":")
        _logarithmic(axis)
        axis.set_title(title, fontsize=10.5)
        axis.set_xlabel(f"{clock} seconds, compilation included", fontsize=9)
        axis.set_ylabel("gap to the best bound (nats)", fontsize=9)
    if named:
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=8.5, frameon=False
        )
    return figure


def scaling_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds against each size, one panel for each curve."""
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure, axes = _grid(max(1, len(curves)))
    for axis, curve in zip(axes, curves, strict=False):
        for side in dict.fromkeys(row["side"] for row in rows):
            points = [
                (row["value"], row["seconds"]["median"])
                for row in rows
                if row["curve"] == curve and row["side"] == side and row["reason"] is None and row["seconds"]["median"]
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.6, color=_COLOURS.get(side), label=side)
        _logarithmic(axis)
        axis.set_xlabel(curve, fontsize=9)
        axis.set_ylabel("seconds to convergence", fontsize=9)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    return figure
