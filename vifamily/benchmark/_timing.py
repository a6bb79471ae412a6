"""Time of small pieces of tensor code on one thread, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily.benchmark._report import Options
from vifamily.benchmark.peers._turns import turns
from vifamily.numerics.threads import few_threads

__all__ = ["forward_and_backward", "medians", "ratios"]


def medians(sides: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each side on the thread's own clock; the sides take turns, so that all see the same machine.

    Args:
        sides: What is timed, by name.
        rounds: Turns of each.
        seconds: About how long a turn lasts; at least one call.
    """
    with few_threads(0):
        return turns(sides, rounds=rounds, seconds=seconds)


def forward_and_backward(
    function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, parameters: tuple[Tensor, ...] = ()
) -> Callable[[], object]:
    """A call that evaluates ``function`` and its gradient in ``x`` and the parameters."""
    return lambda: torch.autograd.grad(function(x), (x, *parameters), gradient)


def ratios(
    name: str,
    cells: Iterable[tuple[int, int]],
    sides: Callable[[int, int], Mapping[str, Callable[[], object]]],
    floor: str,
    options: Options,
) -> list[dict[str, Any]]:
    """Time every cell of sizes and batches; each side is reported as its ratio to one of them.

    Args:
        name: Name of the benchmark.
        cells: Pairs of size and batch.
        sides: What is timed in a cell, by name.
        floor: The side that the others are divided by; its own time is given in microseconds.
        options: What is asked of the benchmark: rounds, and the short mode.
    """
    rounds = options.repeats or (2 if options.quick else 5)
    rows: list[dict[str, Any]] = []
    for size, batch in cells:
        options.say(f"size {size}, batch {batch}")
        found = medians(sides(size, batch), rounds=rounds, seconds=0.001 if options.quick else 0.005)
        unit = found.pop(floor)
        row = {"benchmark": name, "size": size, "batch": batch, f"{floor}_us": unit * 1e6}
        rows.append(row | {side: value / unit for side, value in found.items()})
    return rows
