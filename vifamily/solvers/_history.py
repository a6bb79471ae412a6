"""What a run remembers of its steps: losses, step sizes and the parts of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vifamily.solvers._base import Run
from vifamily.solvers._trail import Trail

__all__ = ["History", "RunWithHistory", "number", "plain"]

_TERM = "term/"


def plain(value: float) -> float | str | None:
    """Write NaN as None and infinity as a word: JSON has neither.

    Example:
        >>> plain(math.nan), plain(math.inf), number(plain(math.inf))
        (None, 'inf', inf)
    """
    return "inf" if value == math.inf else None if math.isnan(value) else value


def number(value: float | str | None) -> float:
    """Read what :func:`plain` wrote."""
    return math.nan if value is None else float(value)


class History:
    """Losses, step sizes and terms of every step, which grow at a cost that does not depend on their number.

    Args:
        restarts: Losses in a row.

    Example:
        >>> history = History(2)
        >>> history.add([3.0, 4.0], 0.1, {"entropy": 1.5})
        >>> history.last_losses, history.last_terms, history.last_step_size
        ((3.0, 4.0), {'entropy': 1.5}, 0.1)
    """

    def __init__(self, restarts: int) -> None:
        self.losses = Trail(restarts)
        self.step_sizes: list[float] = []
        self.terms: dict[str, Trail] = {}

    def add(self, losses: Sequence[float], step_size: float, terms: Mapping[str, float]) -> None:
        """Note a step: the loss of each restart, the step size it was made with, and each term, averaged."""
        self.losses.add(losses)
        self.step_sizes.append(step_size)
        for name, term in terms.items():
            self.terms.setdefault(name, Trail(1)).add([term])

    def extend(self, losses: np.ndarray, step_sizes: Sequence[float], terms: Mapping[str, np.ndarray]) -> None:
        """Note several steps: losses ``(step, restart)``, the size of each, and each term, ``(step, 1)``."""
        self.losses.extend(losses)
        self.step_sizes += step_sizes
        for name, column in terms.items():
            self.terms.setdefault(name, Trail(1)).extend(column)

    @property
    def last_losses(self) -> tuple[float, ...]:
        """Loss of each restart at the last step; NaN before the first."""
        rows = self.losses.rows
        return tuple(rows[-1].tolist()) if len(rows) else (float("nan"),) * rows.shape[1]

    @property
    def last_terms(self) -> dict[str, float]:
        """Every term as it was when last noted."""
        return {name: float(column.rows[-1, 0]) for name, column in self.terms.items()}

    @property
    def last_step_size(self) -> float | None:
        """Size of the last step; None before the first."""
        return self.step_sizes[-1] if self.step_sizes else None

    def tensors(self) -> dict[str, Tensor]:
        """Return everything for a checkpoint."""
        columns = {_TERM + name: column.tensor()[:, 0] for name, column in self.terms.items()}
        sizes = torch.tensor(self.step_sizes, dtype=torch.float64)
        return {"losses": self.losses.tensor(), "step_sizes": sizes, **columns}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`tensors` gave; other tensors of the checkpoint are passed over."""
        self.losses, self.step_sizes = Trail.of(tensors["losses"]), tensors["step_sizes"].tolist()
        columns = {name.removeprefix(_TERM): v for name, v in tensors.items() if name.startswith(_TERM)}
        self.terms = {name: Trail.of(column.unsqueeze(-1)) for name, column in columns.items()}


class RunWithHistory(Run):
    """A run that keeps a :class:`History` and answers from it."""

    history: History

    @property
    def losses(self) -> Tensor:
        """Loss after every step so far, ``(step, restart)``."""
        return self.history.losses.tensor()

    @property
    def step_sizes(self) -> Tensor:
        """Size of every step so far, ``(step,)``; of a line search, its length as a part of the quasi-Newton step."""
        return torch.tensor(self.history.step_sizes, dtype=torch.float64)

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """Parts of the loss of every step so far, each ``(step,)``."""
        return {name: column.tensor()[:, 0] for name, column in self.history.terms.items()}
