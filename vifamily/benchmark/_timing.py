"""Time of small pieces of tensor code on one thread, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vifamily.numerics.threads import few_threads

__all__ = ["forward_and_backward", "medians"]


def medians(sides: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each side on the thread's own clock; the sides take turns, so that all see the same machine.

    Args:
        sides: What is timed, by name.
        rounds: Turns of each.
        seconds: About how long a turn lasts; at least one call.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    with few_threads(0):
        counts = {name: max(1, int(seconds / max(_once(side), 1e-6))) for name, side in sides.items()}
        for _ in range(rounds):
            for name, side in sides.items():
                start = time.thread_time()
                for _ in range(counts[name]):
                    side()
                found[name].append((time.thread_time() - start) / counts[name])
    return {name: statistics.median(values) for name, values in found.items()}


def _once(side: Callable[[], object]) -> float:
    side()
    start = time.thread_time()
    side()
    return time.thread_time() - start


def forward_and_backward(
    function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, parameters: tuple[Tensor, ...] = ()
) -> Callable[[], object]:
    """A call that evaluates ``function`` and its gradient in ``x`` and the parameters."""
    return lambda: torch.autograd.grad(function(x), (x, *parameters), gradient)
