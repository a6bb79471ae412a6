"""One square layer forward and backward: Walsh-Hadamard weights against a linear layer, mean-field ones and peers'.

Peers are timed in a process of their own, against a linear layer in the same process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from vifamily.benchmark._layer_peers import PEER_COLUMNS, peer_ratios
from vifamily.benchmark._report import Benchmark, Options, Report
from vifamily.benchmark._timing import forward_and_backward, ratios
from vifamily.errors import NotAvailableError
from vifamily.numerics.hadamard_kernel import compile_kernel, hadamard
from vifamily.rng import generator

__all__ = ["BATCHES", "BENCHMARK", "SIZES"]

SIZES = (128, 512, 1024, 2048)
BATCHES = (64, 256)


def _sides(size: int, batch: int) -> dict[str, Callable[[], object]]:
    source = generator(0, "benchmark/whvi")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    x, gradient = normal(batch, size).requires_grad_(), normal(batch, size)
    weight = (normal(size, size) * size**-0.5).requires_grad_()
    spread = torch.full((size, size), -3.0).requires_grad_()
    outer, inner, mean = (normal(size).requires_grad_() for _ in range(3))
    scale = torch.full((size,), -3.0).requires_grad_()

    def sampled(v: Tensor) -> Tensor:
        return linear(v, weight + softplus(spread) * normal(size, size))

    def local(v: Tensor) -> Tensor:
        variance = linear(v.square(), softplus(spread).square())
        return linear(v, weight) + (variance + 1e-12).sqrt() * normal(batch, size)

    def product(rows: int, kernel: str) -> Callable[[Tensor], Tensor]:
        def layer(v: Tensor) -> Tensor:
            draw = mean + softplus(scale) * normal(rows, size)
            return outer * hadamard(draw * hadamard(inner * v, kernel=kernel), kernel=kernel)

        return layer

    vectors = (outer, inner, mean, scale)
    sides = {
        "linear": forward_and_backward(lambda v: linear(v, weight), x, gradient, (weight,)),
        "sampled": forward_and_backward(sampled, x, gradient, (weight, spread)),
        "local": forward_and_backward(local, x, gradient, (weight, spread)),
        "shared": forward_and_backward(product(1, "torch"), x, gradient, vectors),
        "per_example": forward_and_backward(product(batch, "torch"), x, gradient, vectors),
    }
    try:
        compile_kernel()
    except NotAvailableError:
        return sides
    sides["shared_compiled"] = forward_and_backward(product(1, "compiled"), x, gradient, vectors)
    sides["per_example_compiled"] = forward_and_backward(product(batch, "compiled"), x, gradient, vectors)
    return sides


def _run(options: Options) -> Report:
    """Time every cell; each side is reported as its ratio to the linear layer."""
    sizes, batches = ((128,), (64,)) if options.quick else (SIZES, BATCHES)
    cells = [(size, batch) for size in sizes for batch in batches]
    rows = ratios("whvi", cells, _sides, "linear", options)
    rounds, seconds = options.repeats or (2 if options.quick else 5), 0.001 if options.quick else 0.005
    peers = peer_ratios("layers", cells, options, rounds=rounds, seconds=seconds)
    rows = [row | peer for row, peer in zip(rows, peers, strict=True)]
    columns = {"D": "size", "batch": "batch", "linear, us": "linear_us", "mean field, sampled": "sampled",
               "mean field, local": "local", "WHVI, one draw": "shared", "WHVI, a draw each": "per_example",
               "one draw, compiled": "shared_compiled", "a draw each, compiled": "per_example_compiled"}  # fmt: skip
    return Report(rows, columns | PEER_COLUMNS)


BENCHMARK = Benchmark("A layer forward and backward on one thread, as a ratio to a linear layer.", _run)
"""The benchmark ``whvi``."""
