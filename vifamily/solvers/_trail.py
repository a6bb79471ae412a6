"""Rows of numbers that a run leaves behind, one for each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Trail"]


class Trail:
    """A table in float64 that grows by single rows and by blocks of rows, at a cost that does not grow with it.

    Args:
        width: Numbers in a row.

    Example:
        >>> trail = Trail(2)
        >>> trail.add([1.0, 2.0])
        >>> trail.extend(np.zeros((3, 2)))
        >>> len(trail), trail.tensor()[0].tolist()
        (4, [1.0, 2.0])
    """

    def __init__(self, width: int) -> None:
        self._held, self._count = np.empty((16, width)), 0

    def __len__(self) -> int:
        return self._count

    def _room(self, count: int) -> int:
        """Make room for further rows; returns where they begin."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._held):
            larger = np.empty((max(2 * len(self._held), self._count), self._held.shape[1]))
            larger[:first] = self._held[:first]
            self._held = larger
        return first

    def add(self, row: Sequence[float] | np.ndarray) -> None:
        """Append a row."""
        first = self._room(1)
        self._held[first] = row

    def extend(self, rows: np.ndarray) -> None:
        """Append several rows, ``(row, number)``."""
        first = self._room(len(rows))
        self._held[first : self._count] = rows

    @property
    def rows(self) -> np.ndarray:
        """All rows, ``(row, number)``; a view that is valid until the next one is added."""
        return self._held[: self._count]

    def tensor(self) -> Tensor:
        """All rows, ``(row, number)``, as a tensor of their own."""
        return torch.from_numpy(self.rows.copy())

    @classmethod
    def of(cls, rows: Tensor) -> Trail:
        """Begin with rows ``(row, number)``."""
        out = cls(rows.shape[1])
        out.extend(rows.detach().cpu().numpy())
        return out
