"""The rotation toy: training of networks of several widths beside the flow at infinite width, which is one number."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from scipy import integrate, special
from torch import Tensor

from vifamily.ntk import FlowReport, TwoLayerReLU, WidthSweep, compare_flow, layerwise_gram, width_sweep
from vifamily.numerics.exponential_families import VonMises
from vifamily.rng import generator

__all__ = ["BEST_LENGTH", "flow_of", "infinite_width", "least_losses", "sweep"]

NOISE = 0.5
"""Standard deviation of the rotation that is not the angle's."""
MEAN = math.exp(-0.5 * NOISE**2)
"""Length of the posterior mean of (cos, sin) of the angle: the same for every direction observed."""
BEST_LENGTH = float(VonMises().from_mean(torch.tensor([MEAN, 0.0], dtype=torch.float64)).norm())
"""Length of the best natural parameter, of the direction observed."""
_POINTS, _STEP = 32, 1.0
Readout = Literal["zero", "normal"]


def _circle() -> Tensor:
    angle = 2 * math.pi * torch.arange(_POINTS, dtype=torch.float64) / _POINTS
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _loss(outputs: Tensor, x: Tensor) -> Tensor:
    # the length of a natural parameter has no second derivative at zero, where networks start: moved off by a hair
    return VonMises().loss(outputs + 1e-12, MEAN * x)


def infinite_width(times: Tensor) -> Tensor:
    """Length of the natural parameter along gradient flow at infinite width: the outputs are that times x.

    Args:
        times: Ascending, ``(T,)``.

    Example:
        >>> [round(c, 4) for c in infinite_width(torch.tensor([0.0, 100.0, 5000.0])).tolist()], round(BEST_LENGTH, 4)
        ([0.0, 2.8774, 4.5751], 4.5751)
    """

    def slope(_: float, c: Any) -> Any:  # 1/8 is the kernel's eigenvalue of the first harmonic
        return (MEAN - special.i1e(c) / special.i0e(c)) / 8

    at = times.double().numpy()
    found = integrate.solve_ivp(slope, (0.0, float(at[-1])), [0.0], t_eval=at, rtol=1e-10, atol=1e-12)
    return torch.as_tensor(found.y[0].copy())


def least_losses() -> tuple[float, float]:
    """Expected negative log density of the exact posterior, and of the best von Mises laws, by quadrature.

    Example:
        >>> [round(value, 5) for value in least_losses()]
        [0.72579, 0.72768]
    """
    at = np.linspace(-math.pi, math.pi, 4001)[:-1]
    turns = np.arange(-6, 7)[:, None]
    density = np.exp(-0.5 * ((at + 2 * math.pi * turns) / NOISE) ** 2).sum(0) / (NOISE * math.sqrt(2 * math.pi))
    exact = -float((density * np.log(density)).mean() * 2 * math.pi)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return exact, float(_loss(BEST_LENGTH * x, x)[0])


def flow_of(width: int, seed: int, *, time: float, readout: Readout = "zero", records: int = 20) -> FlowReport:
    """Train a network of one width on the exact inclusive divergence over 32 directions, beside its kernel."""
    x = _circle()
    net = TwoLayerReLU(2, width, 2, generator=generator(seed, f"toy/{readout}", width), readout=readout)
    return compare_flow(
        net, x, lambda f: _loss(f, x), time=time, step_size=_STEP, best=BEST_LENGTH * x, records=records,
        route=layerwise_gram,
    )  # fmt: skip


def _figures(report: FlowReport, readout: Readout) -> dict[str, float]:
    """Largest distances along the way, over the length of the best natural parameter."""
    gap = (report.realised - report.linearised).norm(dim=2).max()
    found = {"drift of the kernel": float(report.drift[-1]), "network from linearised": float(gap) / BEST_LENGTH}
    if readout == "zero":  # otherwise outputs do not start at zero, and the flow is not one number
        x, known = _circle(), infinite_width(report.times)
        for name, path in (("network", report.realised), ("linearised", report.linearised)):
            off = ((path * x).sum(2).mean(1) - known).abs().max()
            found[f"{name} from infinite width"] = float(off) / BEST_LENGTH
    return found


def sweep(
    widths: list[int], seeds: list[int], *, time: float, readout: Readout = "zero"
) -> tuple[WidthSweep, float, bool]:
    """Figures of :func:`flow_of` against width, the largest excess loss at the end, and whether every bound held."""
    excess, held = [], []

    def measure(width: int, seed: int) -> dict[str, float]:
        report = flow_of(width, seed, time=time, readout=readout)
        excess.append(float(report.excess or 0.0))
        held.append(report.bound is not None and excess[-1] <= report.bound.bound)
        return _figures(report, readout)

    return width_sweep(measure, widths, seeds), max(excess), all(held)
