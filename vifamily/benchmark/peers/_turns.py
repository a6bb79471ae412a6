"""Time of small pieces of code on one thread, side by side; needs nothing but Python, for the peers' interpreters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["turns"]


def turns(sides: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of each side on the thread's own clock; the sides take turns, so that all see the same machine.

    A turn begins with a call that is not timed, so that no side pays for what the one before left in caches and memory.

    Args:
        sides: What is timed, by name.
        rounds: Turns of each.
        seconds: About how long a turn lasts; at least one call.

    Example:
        >>> turns({"nothing": lambda: None}, rounds=2, seconds=1e-5)["nothing"] >= 0
        True
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    counts = {name: max(1, int(seconds / max(_once(side), 1e-6))) for name, side in sides.items()}
    for _ in range(rounds):
        for name, side in sides.items():
            side()
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
