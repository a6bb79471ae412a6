"""Parameters of a module as one matrix, one row per restart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["FlatParameters"]


class FlatParameters:
    """Lays parameters side by side in one tensor ``(restart, size)`` of which they become views.

    One tensor makes the optimiser, the average, the finiteness check and the checkpoint one operation each, which
    is most of the cost of a small fit's step.

    Args:
        parameters: Parameters to lay out; with ``restarts > 1`` each has a leading restart axis.
        restarts: Number of rows.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], restarts: int) -> None:
        self.parameters: list[nn.Parameter] = [p for p in parameters if p.requires_grad]
        self.rows = restarts
        columns = [p.detach().reshape(restarts, -1) for p in self.parameters]
        self.value: Tensor = torch.cat(columns, dim=1).clone() if columns else torch.zeros(restarts, 0)
        self.sizes = [c.shape[1] for c in columns]
        self._bind()

    def _bind(self) -> None:
        start = 0
        for parameter, size in zip(self.parameters, self.sizes, strict=True):
            view = self.value[:, start : start + size]
            shape = parameter.shape if self.rows == 1 else parameter.shape[1:]
            parameter.data = (
                view.view(parameter.shape) if self.rows == 1 else view.unflatten(1, shape) if shape else view[:, 0]
            )
            start += size

    def gather(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Lay gradients out as the parameters are; a missing one is zero."""
        parts = [
            self.value.new_zeros(self.rows, size) if g is None else g.reshape(self.rows, size)
            for g, size in zip(gradients, self.sizes, strict=True)
        ]
        return torch.cat(parts, dim=1) if len(parts) != 1 else parts[0]

    def set(self, value: Tensor) -> None:
        """Overwrite all parameters."""
        self.value.copy_(value)

    def name_of(self, column: int, names: Sequence[str]) -> str:
        """Return the name of the parameter that holds a column."""
        for name, size in zip(names, self.sizes, strict=True):
            if column < size:
                return name
            column -= size
        return "unknown"
