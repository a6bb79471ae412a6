"""How many threads small computations run on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["FEWEST_NUMBERS", "few_threads"]

FEWEST_NUMBERS = 100_000
"""Numbers that a step passes over from which more than one thread pays: handing work to a second thread takes tens of
microseconds, and far more where another process holds the core."""


@contextlib.contextmanager
def few_threads(numbers: int) -> Iterator[None]:
    """Run small steps on one thread, and put the number of threads back afterwards.

    Args:
        numbers: Numbers that one step passes over, about.

    Example:
        >>> before = torch.get_num_threads()
        >>> with few_threads(100):
        ...     inside = torch.get_num_threads()
        >>> inside, torch.get_num_threads() == before
        (1, True)
    """
    before = torch.get_num_threads()
    try:
        if numbers < FEWEST_NUMBERS and before > 1:
            torch.set_num_threads(1)
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
