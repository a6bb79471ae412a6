"""The tangent kernel of a dense network with over a million parameters, by its routes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.benchmark._report import Benchmark, Options, Report, median_and_range
from vifamily.ntk import jacobian_gram, layerwise_gram, ntk_product
from vifamily.rng import generator, scoped

__all__ = ["BENCHMARK"]

_INPUTS, _OUTPUTS = 64, 20
_LARGEST_SECONDS = 1.0
"""What the Gram matrix of the large network may take layer by layer, on two threads."""


def _network(width: int) -> nn.Sequential:
    with scoped(generator(0, "benchmark/ntk", width)):
        layers: list[nn.Module] = []
        for inputs in (_INPUTS, width, width):
            layers += [nn.Linear(inputs, width, dtype=torch.float64), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(width, _OUTPUTS, dtype=torch.float64))


def _routes(net: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    vector = x.new_ones(len(x), _OUTPUTS)
    return {
        "layerwise_gram": lambda: layerwise_gram(net, x),
        "ntk_product": lambda: ntk_product(net, x, vector),
        "jacobian_gram": lambda: jacobian_gram(net, x, chunk=4),
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _run(options: Options) -> Report:
    """Time every route by the clock, on the threads that the process has; the routes take turns."""
    width, rounds = (32, 1) if options.quick else (704, options.repeats or 3)
    net = _network(width)
    x = torch.randn(_INPUTS, _INPUTS, generator=generator(0, "benchmark/ntk/x"), dtype=torch.float64)
    routes = _routes(net, x)
    if not options.quick:
        # its Jacobians alone would take minutes
        del routes["jacobian_gram"]
    found: dict[str, list[float]] = {name: [] for name in routes}
    for turn in range(rounds + 1):
        options.say(f"round {turn} of {rounds}" if turn else "warming up")
        for name, call in routes.items():
            seconds = _seconds(call)
            if turn:
                found[name].append(seconds)
    rows: list[dict[str, Any]] = []
    for name, times in found.items():
        row = {"benchmark": "ntk", "side": name, "inputs": _INPUTS, "outputs": _OUTPUTS}
        row |= {"parameters": sum(p.numel() for p in net.parameters()), "threads": torch.get_num_threads()}
        rows.append(row | {"seconds": median_and_range([*times])})
    columns = {"route": "side", "inputs": "inputs", "outputs": "outputs", "parameters": "parameters",
               "threads": "threads", "seconds": "seconds"}  # fmt: skip
    return Report(rows, columns, failed=min(found["layerwise_gram"]) >= _LARGEST_SECONDS)


BENCHMARK = Benchmark("The tangent kernel of a network with over a million parameters at 64 inputs, 20 outputs.", _run)
"""The benchmark ``ntk``."""
