"""Tables of moments and quantiles of posterior draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from vifamily.diagnostics._tables import render, rich_table
from vifamily.errors import ConfigError, ShapeError

__all__ = ["Summary", "summarise"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Moments and quantiles per quantity; prints as a table.

    Attributes:
        names: Names of the quantities.
        mean: ``(quantity,)``.
        sd: ``(quantity,)``.
        probabilities: Probabilities of the quantiles.
        quantiles: ``(probability, quantity)``.
        mcse: Monte-Carlo standard error of the mean, ``(quantity,)``.
        num_draws: Number of draws.
    """

    names: tuple[str, ...]
    mean: Tensor
    sd: Tensor
    probabilities: tuple[float, ...]
    quantiles: Tensor
    mcse: Tensor
    num_draws: int

    def header(self) -> tuple[str, ...]:
        """Return the column names."""
        return ("parameter", "mean", "sd", *(f"{100 * p:g}%" for p in self.probabilities), "mcse")

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells as text, one row per quantity."""
        table = torch.cat([self.mean[None], self.sd[None], self.quantiles, self.mcse[None]])
        return [(name, *(_figure(float(v)) for v in table[:, i])) for i, name in enumerate(self.names)]

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return the table as name to column to number."""
        table = torch.cat([self.mean[None], self.sd[None], self.quantiles, self.mcse[None]])
        keys = self.header()[1:]
        return {
            name: {key: float(v) for key, v in zip(keys, table[:, i], strict=True)} for i, name in enumerate(self.names)
        }

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        return rich_table("Posterior", self.header(), self.rows(), f"{self.num_draws} draws")

    def __str__(self) -> str:
        """Return the table as plain text."""
        return render("Posterior", self.header(), self.rows(), f"{self.num_draws} draws")

    def __repr__(self) -> str:
        """Return the table, which is what an interactive session should show."""
        return str(self)


def _figure(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def summarise(draws: Tensor, names: Sequence[str], *, probabilities: Sequence[float] = (0.05, 0.5, 0.95)) -> Summary:
    """Summarise independent draws.

    Args:
        draws: ``(draw, quantity)``, two draws or more.
        names: One name per quantity.
        probabilities: Probabilities of the quantiles, in [0, 1].

    Returns:
        Mean, standard deviation, quantiles and ``sd / sqrt(draws)``, in the units of each quantity.

    Raises:
        ShapeError: If the shapes disagree.
        ConfigError: If a probability is outside [0, 1].

    Example:
        >>> table = summarise(torch.arange(5.0, dtype=torch.float64)[:, None], ["mu"])
        >>> table.to_dict()["mu"]["50%"]
        2.0
    """
    if draws.dim() != 2 or draws.shape[0] < 2 or len(names) != draws.shape[1]:
        raise ShapeError(
            f"a summary needs draws (draw, quantity) and as many names, got {tuple(draws.shape)} and {len(names)}."
        )
    if any(not 0 <= p <= 1 for p in probabilities):
        raise ConfigError(f"probabilities of quantiles must be in [0, 1], got {tuple(probabilities)}.")
    x = draws.detach().to("cpu", torch.float64)
    levels = torch.tensor(list(probabilities), dtype=torch.float64)
    # torch.quantile refuses more than 16 million numbers; sorting does not
    ordered = x.sort(dim=0).values
    position = levels * (x.shape[0] - 1)
    low, high = position.floor().long(), position.ceil().long()
    quantiles = torch.lerp(ordered[low], ordered[high], (position - low).unsqueeze(1))
    sd = x.std(0)
    return Summary(
        tuple(names), x.mean(0), sd, tuple(map(float, probabilities)), quantiles, sd / math.sqrt(x.shape[0]), x.shape[0]
    )


def as_plain(value: Any) -> Any:
    """Return numbers and tuples as JSON takes them: NaN and infinities as text, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(v) for v in value]
    return value
