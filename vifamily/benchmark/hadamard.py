"""The Walsh-Hadamard transform, forward and backward, against a copy, dense products and a Fourier transform.

Beside it are the ways that are known of writing it in torch: one dense product, and products of balanced Kronecker
factors of at most 16, 32, 64 and 128. The fastest of them in each cell is the bar for the transform in torch: how far
that is from a copy is a property of the processor, of its memory beside its products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vifamily.benchmark._report import Benchmark, Options, Report
from vifamily.benchmark._timing import forward_and_backward, ratios
from vifamily.errors import NotAvailableError
from vifamily.numerics.hadamard import hadamard
from vifamily.numerics.hadamard_kernel import compile_kernel
from vifamily.numerics.hadamard_kernel import hadamard as with_kernel
from vifamily.rng import generator

__all__ = ["BATCHES", "BENCHMARK", "SIZES"]

SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 32, 256, 1024)
_DENSE_LARGEST = 2048
_MOST = 2**24
"""Cells of more numbers are left out."""


class _Copy(torch.autograd.Function):
    """The floor: what any transform costs that makes a new tensor forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clone()


def _kronecker(size: int, largest: int) -> Callable[[Tensor], Tensor]:
    """Balanced factors of at most ``2^largest``, the last along the last axis, the others batched from the left."""
    power = size.bit_length() - 1
    count = -(-power // largest)
    least, more = divmod(power, count)
    factors = [hadamard(torch.eye(2**factor)) for factor in (least,) * (count - more) + (least + 1,) * more]

    def transform(x: Tensor) -> Tensor:
        after = factors[-1].shape[0]
        out = linear(x.reshape(-1, after), factors[-1])
        for factor in reversed(factors[:-1]):
            out = torch.matmul(factor, out.reshape(-1, factor.shape[0], after))
            after *= factor.shape[0]
        return out.reshape(x.shape)

    return transform


def _sides(size: int, batch: int) -> dict[str, Callable[[], object]]:
    source = generator(0, "benchmark/hadamard")
    x = torch.randn(batch, size, generator=source).requires_grad_()
    gradient = torch.randn(batch, size, generator=source)
    spectrum = torch.fft.rfft(gradient)
    sides = {
        "copy": forward_and_backward(lambda v: _Copy.apply(v), x, gradient),  # type: ignore[no-untyped-call]
        "torch": forward_and_backward(hadamard, x, gradient),
        "rfft": forward_and_backward(torch.fft.rfft, x, spectrum),
    }
    for largest in (4, 5, 6, 7):
        if size > 2**largest:
            sides[f"known_{2**largest}"] = forward_and_backward(_kronecker(size, largest), x, gradient)
    try:
        compile_kernel()
        sides["compiled"] = forward_and_backward(lambda v: with_kernel(v, kernel="compiled"), x, gradient)
    except NotAvailableError:
        pass
    if size <= _DENSE_LARGEST:
        matrix = hadamard(torch.eye(size))
        weight = matrix.clone().requires_grad_()
        sides["dense_h"] = forward_and_backward(lambda v: v @ matrix, x, gradient)
        sides["dense_w"] = forward_and_backward(lambda v: v @ weight, x, gradient, (weight,))
    return sides


def _run(options: Options) -> Report:
    """Time every cell; each side is reported as its ratio to a copy."""
    sizes, batches = ((64, 256), (1, 32)) if options.quick else (SIZES, BATCHES)
    cells = [(size, batch) for size in sizes for batch in batches if size * batch <= _MOST]
    rows = ratios("hadamard", cells, _sides, "copy", options)
    for row in rows:
        known = [row.pop(side) for side in list(row) if side.startswith("known_")]
        row["known"] = min([*known, row.get("dense_h", math.inf)])
        row["torch_to_known"] = row["torch"] / row["known"]
    columns = {"D": "size", "batch": "batch", "copy, us": "copy_us", "torch": "torch", "best known in torch": "known",
               "torch to that": "torch_to_known", "compiled": "compiled",
               "dense H": "dense_h", "dense W": "dense_w", "rfft": "rfft"}  # fmt: skip
    return Report(rows, columns)


BENCHMARK = Benchmark("Walsh-Hadamard transform, forward and backward on one thread, as a ratio to a copy.", _run)
"""The benchmark ``hadamard``."""
