"""Pictures: spread against alpha, responsibilities of two groups, hysteresis, transients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from vifamily.diagnostics import stability
from vifamily.plots import _style as style
from vifamily.reproduce._report import Options
from vifamily.reproduce._soft_specialists_behaviour import Branch
from vifamily.reproduce._soft_specialists_cases import (
    Case,
    contradictory_groups,
    flipped_labels,
    location,
    normal_quantiles,
    random_groups,
    shared_sign,
)  # fmt: skip
from vifamily.reproduce._soft_specialists_fit import about, by_unit, responsibilities, settle

__all__ = ["hysteresis_figure", "responsibility_figure", "spread_figure", "transient_figure"]

F64 = torch.float64
_SIDES = LinearSegmentedColormap.from_list("sides", [style.REFERENCE, "#BBBBBB", style.POSTERIOR])
_PALE = "#F6CFAF"
_SHADES = (style.POSTERIOR, style.ACCENT, style.REFERENCE)


def _label(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x, fontsize=style.LABEL_SIZE, color=style.INK)
    axes.set_ylabel(y, fontsize=style.LABEL_SIZE, color=style.INK)
    if title:
        axes.set_title(title, fontsize=style.LABEL_SIZE, color=style.INK)


def spread_figure(options: Options) -> tuple[Figure, list[dict[str, Any]]]:
    """Sd of the members against alpha, from collapsed starts, with the predicted threshold."""
    cases = [
        Case("location, variance 2", location(normal_quantiles(400, 2.0)[:, None]), torch.zeros(1, dtype=F64), 0.5),
        contradictory_groups(1.0),
        shared_sign(8, seed=options.seed, num_sequences=200 if options.quick else 500),
        flipped_labels(0.125, seed=options.seed, size=500 if options.quick else 2000),
    ]
    figure = style.new_figure(8.6, 5.6)
    rows = []
    for axes, case in zip(figure.subplots(2, 2).ravel(), cases, strict=True):
        critical = stability(case.model, case.centre, units=case.unit, sweep=()).alpha_star
        factors = torch.cat([torch.linspace(0.3, 0.95, 5), torch.linspace(1.02, 2.0, 6 if options.quick else 12)])
        alphas = sorted({min(float(f) * critical, 1.0) for f in factors})
        found = [settle(case, a, about(case, seed=options.seed)).variance ** 0.5 for a in alphas]
        rows += [{"case": case.name, "alpha": a, "sd": s} for a, s in zip(alphas, found, strict=True)]
        axes.plot(alphas, found, color=style.POSTERIOR, marker="o", markersize=4, linewidth=1.4)
        axes.axvline(critical, color=style.REFERENCE, linestyle="--", linewidth=1.4)
        if case.name.startswith("location"):
            fine = torch.linspace(critical, max(alphas), 200)
            axes.plot(fine, (2 - 1 / fine).clamp(min=0).sqrt(), color=_PALE, linewidth=6, zorder=0)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=-0.03 * max(found))
        _label(axes, "alpha", "sd of the members", case.name)
        style.dress(axes)
    handles = [
        Line2D([], [], color=style.POSTERIOR, marker="o", markersize=4, label="eight members (four on sequences)"),
        Line2D([], [], color=style.REFERENCE, linestyle="--", label="alpha* from V and J"),
        Line2D([], [], color=_PALE, linewidth=6, label="square root of (variance - 1 / alpha)"),
    ]
    style.legend(figure, handles, loc="outside lower center", ncols=3)
    return figure, rows


def responsibility_figure(options: Options) -> Figure:
    """Two groups with opposite slopes, coloured by who is responsible, at three alphas."""
    case = random_groups(2.0, 400, seed=options.seed)
    critical = stability(case.model, case.centre, sweep=()).alpha_star
    x, y = case.model.source.whole()
    figure = style.new_figure(9.2, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    shown: Any = None
    for axes, alpha in zip(panels, (0.05, 0.1, 0.8), strict=True):
        settled = settle(case, alpha, about(case, seed=options.seed))
        order = settled.points.ravel().argsort()
        weight = responsibilities(by_unit(case, settled.points), alpha)
        middle = settled.points.ravel().mean()
        upper = weight[settled.points.ravel() > middle].sum(0) if settled.variance > 1e-6 else torch.full_like(x, 0.5)
        shown = axes.scatter(x, y, c=upper, cmap=_SIDES, vmin=0, vmax=1, s=9, linewidths=0, alpha=0.85)
        ends = 1.05 * float(x.abs().max()) * torch.tensor([-1.0, 1.0], dtype=F64)
        for slope in settled.points.ravel()[order]:
            axes.plot(ends, slope * ends, color=style.INK, linewidth=1.0, alpha=0.7)
        _label(axes, "x", "y" if axes is panels[0] else "", f"alpha = {alpha:g}")
        axes.set_xlim(float(ends[0]), float(ends[1]))
        style.dress(axes)
    bar = figure.colorbar(shown, ax=panels, shrink=0.85, pad=0.01)
    bar.set_label("responsibility of the members with positive slope", fontsize=style.TICK_SIZE, color=style.INK)
    bar.ax.tick_params(labelsize=style.TICK_SIZE)
    style.title(figure, f"Two groups, slopes 2 and -2, alpha* = {critical:.3f}; the lines are the eight members")
    return figure


def hysteresis_figure(branches: Sequence[Branch]) -> Figure:
    """Variance of the members from both starts, and what the spread state gains."""
    figure = style.new_figure(8.8, 3.6)
    left, right = figure.subplots(1, 2)
    handles = [
        Line2D([], [], color=style.GREY, marker="x", linestyle="-", label="collapsed start"),
        Line2D([], [], color=style.INK, linestyle="--", label="alpha*"),
    ]
    for colour, size in zip(_SHADES, sorted({b.num_members for b in branches}), strict=False):
        some = sorted((b for b in branches if b.num_members == size), key=lambda b: b.alpha)
        alphas = [b.alpha for b in some]
        left.plot(alphas, [b.from_apart for b in some], color=colour, marker="o", markersize=4, linewidth=1.3)
        left.plot(alphas, [b.from_together for b in some], color=colour, marker="x", markersize=5, linewidth=0.9)
        near = [b for b in some if b.alpha < 0.6]
        right.plot(
            [b.alpha for b in near], [b.gain for b in near], color=colour, marker="o", markersize=4, linewidth=1.3
        )
        handles.insert(-2, Line2D([], [], color=colour, marker="o", markersize=4, label=f"spread start, M = {size}"))
    for axes in (left, right):
        axes.axvline(0.5, color=style.INK, linestyle="--", linewidth=1)
        style.dress(axes)
    right.axhline(0, color=style.FRAME, linewidth=0.8)
    _label(left, "alpha", "variance of the members", "Where members end")
    _label(right, "alpha", "nats per datum", "What the spread state gains")
    style.legend(figure, handles, loc="outside lower center", ncols=len(handles))
    return figure


def transient_figure(path: Tensor, *, step: float = 0.02) -> Figure:
    """Distance to the optimum and spread of the members along gradient descent."""
    apart = path.squeeze(-1).std(1, unbiased=False)
    middle = path.squeeze(-1).mean(1).abs()
    time = step * torch.arange(len(path))
    figure = style.new_figure(5.6, 3.6)
    axes = figure.subplots()
    axes.plot(time, apart, color=style.POSTERIOR, linewidth=1.6)
    axes.plot(time, middle.clamp(min=1e-8), color=style.GREY, linewidth=1.2, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(1e-7, 20)
    _label(axes, "time (steps times step size)", "sds of the data", "Members diverge at first though alpha < alpha*")
    style.dress(axes)
    handles = [
        Line2D([], [], color=style.POSTERIOR, label="sd of the members"),
        Line2D([], [], color=style.GREY, linestyle="--", label="distance of their mean to the optimum"),
    ]
    style.legend(axes, handles, loc="upper right")
    return figure
