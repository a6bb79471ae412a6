"""What the reports of this package share: how they print, and the checks of Gram matrices."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from vifamily.diagnostics._tables import render, rich_table
from vifamily.errors import DataError, ShapeError

__all__ = ["Printed", "checked_gram", "eigensystem"]


class Printed:
    """A frozen result that prints: a table of figures, then sentences on what holds and what fails."""

    heading: str
    notes: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        raise NotImplementedError

    def note(self) -> str:
        """Return the notes as one text."""
        return "\n".join(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: _plain(value) for name, value in found.items()}

    def table(self) -> Table:
        """Return the figures as a table for a rich console."""
        return rich_table(self.heading, ("figure", "value"), self.rows(), self.note())

    def __str__(self) -> str:
        """Return the figures as plain text."""
        return render(self.heading, ("figure", "value"), self.rows(), self.note())

    def __repr__(self) -> str:
        """Return the table, which is what an interactive session should show."""
        return str(self)


def _plain(value: Any) -> Any:
    if isinstance(value, Printed):
        return value.to_dict()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def checked_gram(gram: Tensor, inputs: int | None = None) -> Tensor:
    """Return the symmetric part of a Gram matrix.

    Raises:
        ShapeError: If it is not square, or its rows are no multiple of the inputs.
        DataError: If it is not finite or not symmetric.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.numel():
        raise ShapeError(f"a Gram matrix must be square, (inputs * outputs) on each side, got {tuple(gram.shape)}.")
    if inputs is not None and (inputs < 1 or len(gram) % inputs):
        raise ShapeError(
            f"a Gram matrix over {inputs} inputs must have a multiple of {inputs} rows, one for each output, "
            f"got {len(gram)}."
        )
    if not bool(gram.isfinite().all()):
        raise DataError("the Gram matrix has entries that are not finite: a weight or an input is not.")
    if float((gram - gram.T).abs().max()) > gram.diagonal().abs().max() * torch.finfo(gram.dtype).eps ** 0.5:
        raise DataError("the Gram matrix is not symmetric: rows and columns must be the same inputs, in one order.")
    return 0.5 * (gram + gram.T)


def eigensystem(gram: Tensor, tolerance: float | None) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues from the largest, eigenvectors in columns, and the largest value that counts as zero.

    Raises:
        DataError: If an eigenvalue is negative by more than rounding.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    largest = max(float(values[0]), 0.0)
    # rounding of the entries moves eigenvalues by about the size of the matrix times the unit roundoff
    share = 8 * len(gram) * torch.finfo(gram.dtype).eps if tolerance is None else tolerance
    if float(values[-1]) < -max(share, torch.finfo(gram.dtype).eps ** 0.5) * largest or largest == 0.0 > values[-1]:
        raise DataError(
            f"the smallest eigenvalue is {float(values[-1]):.3g} beside a largest of {largest:.3g}: a Gram matrix of a "
            "kernel has none below zero. Was something else than a kernel passed?"
        )
    return values, vectors, share * largest
