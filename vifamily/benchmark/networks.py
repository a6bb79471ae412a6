"""A whole training step of a network: deterministic, mean field, Walsh-Hadamard, and peers' layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vifamily import registry
from vifamily.benchmark._layer_peers import PEER_COLUMNS, peer_ratios
from vifamily.benchmark._report import Benchmark, Options, Report
from vifamily.benchmark._timing import medians
from vifamily.models import Network
from vifamily.rng import draw_noise, generator, scoped
from vifamily.types import LatentSpec

__all__ = ["BATCHES", "BENCHMARK", "WIDTHS"]

WIDTHS = (128, 512, 1024)
"""Width of the two hidden layers; there are 128 inputs and one output."""
BATCHES = (64, 256)
_INPUTS = 128
_WAYS = {
    "mean_field": ("dense", "elbo(estimator=analytic_kl)"),
    "walsh_hadamard": ("walsh_hadamard", "elbo(estimator=analytic_kl)"),
    "walsh_hadamard_each": ("walsh_hadamard", "elbo(estimator=example)"),
}
"""Weights and objective by side; with `example` every datum has a draw of its own."""


def _net(sizes: list[int]) -> nn.Sequential:
    with scoped(0):
        layers = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return nn.Sequential(layers[0], *(part for layer in layers[1:] for part in (nn.ReLU(), layer)))


def _deterministic(sizes: list[int], x: Tensor, y: Tensor) -> Callable[[], object]:
    net = _net(sizes)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        loss = 0.5 * (net(x) - y).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def _variational(way: str, sizes: list[int], x: Tensor, y: Tensor) -> Callable[[], object]:
    """A step as `fit` takes it with one draw of the weights, or one for each datum, of a batch that is all data."""
    weights, named = _WAYS[way]
    model = Network(_net(sizes), "gaussian", (x, y), weights)
    latent = LatentSpec(model.dim, dtype=x.dtype)
    family = registry.build("families", "mean_field").build(latent, generator=generator(0, "family"))
    objective = registry.build("objectives", named).resolve(model, family)
    points = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam([*family.parameters(), *points], lr=1e-3)
    source, rows = generator(0, "noise"), len(x) if objective.noise_per_datum else 1

    def step() -> None:
        noise = draw_noise(family.noise_spec, (rows,), source, dtype=x.dtype)
        loss = objective.loss(family, model, noise).surrogate
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def _run(options: Options) -> Report:
    """Time every cell; each side is reported as its ratio to a deterministic step."""
    widths, batches = ((16,), (8,)) if options.quick else (WIDTHS, BATCHES)
    rounds, seconds = options.repeats or (2 if options.quick else 5), 0.001 if options.quick else 0.02
    cells = [([_INPUTS, width, width, 1], batch) for width in widths for batch in batches]
    rows = []
    for sizes, batch in cells:
        options.say(f"width {sizes[1]}, batch {batch}")
        source = generator(0, "benchmark/networks")
        x, y = (torch.randn(batch, size, generator=source) for size in (sizes[0], sizes[-1]))
        sides = {"deterministic": _deterministic(sizes, x, y)}
        sides |= {way: _variational(way, sizes, x, y) for way in _WAYS}
        found = medians(sides, rounds=rounds, seconds=seconds)
        unit = found.pop("deterministic")
        row = {"benchmark": "networks", "width": sizes[1], "batch": batch, "deterministic_us": unit * 1e6}
        rows.append(row | {side: value / unit for side, value in found.items()})
    peers = peer_ratios("steps", cells, options, rounds=rounds, seconds=seconds)
    rows = [row | peer for row, peer in zip(rows, peers, strict=True)]
    columns = {"width": "width", "batch": "batch", "deterministic, us": "deterministic_us", "mean field": "mean_field",
               "Walsh-Hadamard, one draw": "walsh_hadamard", "a draw each": "walsh_hadamard_each"}  # fmt: skip
    return Report(rows, columns | PEER_COLUMNS)


BENCHMARK = Benchmark("A training step of a network on one thread, as a ratio to that of a deterministic one.", _run)
"""The benchmark ``networks``."""
