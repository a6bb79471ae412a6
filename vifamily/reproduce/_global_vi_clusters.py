"""Label switching: centres of clusters that are named in order by the prior, found by three objectives."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vifamily.rng import generator

__all__ = ["OBJECTIVES", "Clusters", "clusters"]

OBJECTIVES = ("inclusive", "elbo", "iwae")
_OFFSETS = torch.tensor([-20.0, -10.0, 0.0, 10.0, 20.0], dtype=torch.float64)
_SHIFT_SD, _CENTRE_SD, _POINT_SD, _Q_SD = 100.0, 0.5, 0.1, 1.0
_TRUE_SHIFT, _POINTS, _QUANTILES, _SCALE, _BATCH = 100.0, 100, 40, 100.0, 16


@dataclasses.dataclass(frozen=True)
class Clusters:
    """What came of one objective over seeds, each ``(seed,)``.

    Attributes:
        ordered: Whether the five centres found ascend, as the true ones do.
        distance: Sum over centres of the absolute error.
        shift: The shift found; 100 is true.
    """

    ordered: Tensor
    distance: Tensor
    shift: Tensor


def _points(centres: Tensor, source: torch.Generator) -> Tensor:
    """Data sets ``(..., points)`` about centres ``(..., 5)``."""
    shape = (*centres.shape[:-1], _POINTS)
    which = torch.randint(len(_OFFSETS), shape, generator=source)
    return centres.gather(-1, which) + _POINT_SD * torch.randn(shape, generator=source, dtype=torch.float64)


def _simulate(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shift and centres, ``(count, 6)``, and data sets ``(count, points)``."""
    shift = _SHIFT_SD * torch.randn(count, 1, generator=source, dtype=torch.float64)
    centres = shift + _OFFSETS + _CENTRE_SD * torch.randn(count, len(_OFFSETS), generator=source, dtype=torch.float64)
    return torch.cat([shift, centres], dim=1), _points(centres, source)


def _features(x: Tensor) -> Tensor:
    """Quantiles of the data sets in units of the prior's scale, ``(..., quantiles)``."""
    order = ((torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES * x.shape[-1]).long()
    return x.sort(-1).values[..., order] / _SCALE


def _log_joint(theta: Tensor, x: Tensor) -> Tensor:
    """Log p(shift, centres, data) up to a constant: ``theta`` ``(draw, seed, 6)``, data ``(seed, points)``."""
    shift, centres = theta[..., :1], theta[..., 1:]
    prior = -0.5 * (shift[..., 0] / _SHIFT_SD).square()
    prior = prior - 0.5 * ((centres - shift - _OFFSETS) / _CENTRE_SD).square().sum(-1)
    each = -0.5 * ((x.unsqueeze(-1) - centres.unsqueeze(-2)) / _POINT_SD).square()
    return prior + (each.logsumexp(-1) - math.log(len(_OFFSETS))).sum(-1)


class _Encoders:
    """One-layer networks from quantiles to six means, one for each seed, with random starts."""

    def __init__(self, seeds: list[int], width: int) -> None:
        sizes = [(_QUANTILES, width), (1, width), (width, 1 + len(_OFFSETS))]
        found = []
        for i, shape in enumerate(sizes):
            sources = [generator(seed, "clusters/start", i) for seed in seeds]
            found.append(torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in sources]))
        self.parameters = [p.requires_grad_() for p in found]
        self.scale = math.sqrt(width)

    def __call__(self, x: Tensor) -> Tensor:
        """Means ``(seed, data set, 6)`` for features ``(seed, data set, quantiles)``."""
        first, bias, last = self.parameters
        hidden = torch.relu(x @ first / math.sqrt(_QUANTILES) + bias)
        return _SCALE * (hidden @ last) / self.scale


def _bound(objective: str, mean: Tensor, x: Tensor, draws: int, source: torch.Generator) -> Tensor:
    """Negative bound for each seed, ``(seed,)``: plain, or importance weighted."""
    noise = torch.randn(draws, *mean.shape, generator=source, dtype=torch.float64)
    log_weight = _log_joint(mean + _Q_SD * noise, x) + 0.5 * noise.square().sum(-1)
    if objective == "elbo":
        return -log_weight.mean(0)
    return math.log(draws) - log_weight.logsumexp(0)


def clusters(
    objective: str, seeds: list[int], *, steps: int = 3000, width: int = 128, rate: float = 0.01, draws: int = 10
) -> Clusters:
    """Fit encoders of all seeds side by side by one objective, and look at the data set of each seed.

    The inclusive divergence sees fresh simulations, the bounds the one data set; steps and starts are the same.

    Args:
        objective: One of :data:`OBJECTIVES`.
        seeds: Seeds of data set, start and noise.
        steps: Steps of Adam, step size falling linearly to zero.
        width: Hidden units.
        rate: First step size.
        draws: Draws of the bounds.
    """
    centres = torch.stack([_true_centres(seed) for seed in seeds])
    x = torch.cat([_points(c.unsqueeze(0), generator(s, "clusters/data")) for c, s in zip(centres, seeds, strict=True)])
    observed = _features(x).unsqueeze(1)
    nets, source = _Encoders(seeds, width), generator(seeds[0], "clusters/noise")
    optimiser = torch.optim.Adam(nets.parameters, lr=rate)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        if objective == "inclusive":
            theta, simulated = (v.unflatten(0, (len(seeds), -1)) for v in _simulate(_BATCH * len(seeds), source))
            found = nets(_features(simulated))
            loss = 0.5 * ((found - theta) / _Q_SD).square().sum(-1).mean(1)
        else:
            loss = _bound(objective, nets(observed).squeeze(1), x, draws, source)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    with torch.no_grad():
        found = nets(observed).squeeze(1)
    order = (found[:, 1:].diff(dim=1) > 0).all(1)
    return Clusters(order, (found[:, 1:] - centres).abs().sum(1), found[:, 0])


def _true_centres(seed: int) -> Tensor:
    noise = torch.randn(len(_OFFSETS), generator=generator(seed, "clusters/centres"), dtype=torch.float64)
    return _TRUE_SHIFT + _OFFSETS + _CENTRE_SD * noise
