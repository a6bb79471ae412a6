"""The paper's mixture of two normal laws: three fits, the squared form, and the blindness to weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vifamily.fit import fit
from vifamily.plots import _style as style
from vifamily.reproduce._operator_vi_programs import SwitchProgram

__all__ = ["FITS", "Fitted", "distance_to_mixture", "mixture_figure", "mixture_fit"]

_DRAWS = 20_000
_START = torch.tensor([2.0], dtype=torch.float64)


def _cumulative(grid: np.ndarray[Any, Any], weight: float) -> np.ndarray[Any, Any]:
    from scipy.special import ndtr

    out: np.ndarray[Any, Any] = weight * ndtr(grid + 3) + (1 - weight) * ndtr(grid - 3)
    return out


def _density(grid: np.ndarray[Any, Any], weight: float) -> np.ndarray[Any, Any]:
    each = [np.exp(-0.5 * (grid - c) ** 2) / np.sqrt(2 * np.pi) for c in (-3, 3)]
    out: np.ndarray[Any, Any] = weight * each[0] + (1 - weight) * each[1]
    return out


def distance_to_mixture(z: Tensor, weight: float) -> float:
    """Wasserstein-1 distance of draws ``(draw,)`` to the mixture with weight ``weight`` on the lower mode.

    Example:
        >>> grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        >>> distance_to_mixture(torch.special.ndtri(grid) + 3, 0.0) < 0.001
        True
    """
    grid = np.linspace(-12, 12, 20_001)
    levels = (np.arange(len(z)) + 0.5) / len(z)
    exact = np.interp(levels, _cumulative(grid, weight), grid)
    return float(np.abs(np.sort(z.numpy()) - exact).mean())


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What came of one fit.

    Attributes:
        name: Its name.
        z: Draws ``(draw,)``.
        distance: Wasserstein-1 distance to the target.
        record: The record of the fit.
    """

    name: str
    z: Tensor
    distance: float
    record: Any

    @property
    def upper(self) -> float:
        """Mass on the positive side."""
        return float((self.z > 0).double().mean())


FITS = {
    "Gaussian, KL": ("full_rank", "elbo", "lbfgs", None),
    "Gaussian, Langevin-Stein": ("full_rank", "operator", "two_player", None),
    "program, Langevin-Stein": (None, "operator", "two_player", None),
    "program, squared form": (
        None, "operator(distance=square)", "two_player(step_size=0.0001, critic_step_size=0.001)", 3000,
    ),
}  # fmt: skip
"""Family (None for the program), objective, solver and most steps of each fit, by name."""


def mixture_fit(name: str, seed: int, weight: float = 0.5) -> Fitted:
    """Fit one of :data:`FITS` through the public ``fit``; the Gaussians start near the upper mode, the programs wide.

    Args:
        name: Which.
        seed: Root seed.
        weight: Weight of the lower mode of the target.
    """
    family, objective, solver, steps = FITS[name]
    chosen: Any = SwitchProgram(seed) if family is None else family
    posterior = fit(
        f"bimodal(weight={weight})", chosen, objective, solver, seed=seed, steps=steps, progress=False,
        init="auto" if family is None else _START,
    )  # fmt: skip
    z = posterior.draws(_DRAWS)[:, 0].cpu().double()
    return Fitted(name, z, distance_to_mixture(z, weight), posterior.record)


def mixture_figure(found: list[Fitted], blind: Fitted, weight: float) -> Figure:
    """Densities of the fits beside the target's, as in the paper's figure, and those of a target of unequal weights."""
    figure = style.new_figure(9.6, 2.7)
    panels = figure.subplots(1, len(found) + 1, sharey=True)
    grid = np.linspace(-7, 7, 600)
    for axes, one, w in zip(panels, [*found, blind], [0.5] * len(found) + [weight], strict=True):
        axes.fill_between(grid, _density(grid, w), color=style.REFERENCE, alpha=0.25, lw=0)
        axes.plot(grid, _density(grid, w), color=style.REFERENCE, lw=1.2)
        at, height = style.density(one.z[:4000].numpy(), (-7.0, 7.0))
        axes.plot(at, height, color=style.POSTERIOR, lw=1.6)
        name = one.name if one is not blind else f"{one.name},\ntarget {weight:g} and {1 - weight:g}"
        axes.set_title(name, fontsize=9)
        axes.set_xlim(-7, 7)
        axes.set_ylim(0, 0.45)
        axes.set_xlabel("z", fontsize=9)
        style.dress(axes)
    panels[0].set_ylabel("density", fontsize=9)
    lines = [axes_line for axes_line in panels[0].lines[:2]]
    figure.legend(lines, ["target", "fit"], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
