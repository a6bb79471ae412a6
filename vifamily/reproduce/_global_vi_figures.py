"""Pictures of the reproduction of globally convergent variational inference."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from vifamily.plots import _style as style
from vifamily.reproduce._global_vi_clusters import Clusters
from vifamily.reproduce._global_vi_rotation import DIRECTIONS, Amortised

__all__ = ["clusters_figure", "starts_figure"]

_LOOKS = {
    "inclusive": (style.POSTERIOR, "o", "inclusive KL"),
    "exclusive": (style.REFERENCE, "s", "ELBO"),
    "elbo": (style.REFERENCE, "s", "ELBO"),
    "iwae": (style.ACCENT, "^", "IWAE"),
}


def starts_figure(found: dict[str, Amortised]) -> Figure:
    """Share of wrong angles, and mean inclusive divergence, against the direction of the start."""
    figure = style.new_figure(8.6, 3.2)
    panels = figure.subplots(1, 2)
    start = 360 * torch.arange(DIRECTIONS) / DIRECTIONS
    for name, one in found.items():
        colour, marker, label = _LOOKS[name]
        for axes, value in zip(panels, (100 * one.wrong, one.forward_kl), strict=True):
            axes.plot(start, value, color=colour, marker=marker, markersize=5, linewidth=1.0, label=label)
    panels[0].set_ylabel("angles off by more than 30° (%)", fontsize=style.LABEL_SIZE, color=style.INK)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylabel("mean KL(p || q), nats", fontsize=style.LABEL_SIZE, color=style.INK)
    panels[1].set_yscale("log")
    for axes in panels:
        axes.set_xlabel("direction of the start (degrees)", fontsize=style.LABEL_SIZE, color=style.INK)
        style.dress(axes)
    panels[0].legend(frameon=False, fontsize=style.LABEL_SIZE, labelcolor=style.INK)
    return figure


def clusters_figure(found: dict[str, Clusters]) -> Figure:
    """Errors of the centres of every seed, filled where they came out in order."""
    figure = style.new_figure(5.4, 3.2)
    axes = figure.subplots()
    for row, (name, one) in enumerate(found.items()):
        colour, marker, _ = _LOOKS[name]
        spread = row + torch.linspace(-0.25, 0.25, len(one.distance))
        for ordered in (True, False):
            keep = one.ordered == ordered
            face = colour if ordered else "white"
            axes.plot(
                one.distance[keep], spread[keep], color=colour, marker=marker, markerfacecolor=face, linestyle="none"
            )
    axes.set_yticks(range(len(found)), [_LOOKS[name][2] for name in found])
    axes.set_xscale("log")
    axes.set_xlabel("absolute error summed over centres (filled: in order)", fontsize=style.LABEL_SIZE, color=style.INK)
    style.dress(axes)
    axes.set_yticks(range(len(found)), [_LOOKS[name][2] for name in found])
    return figure
