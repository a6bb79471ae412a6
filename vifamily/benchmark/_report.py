"""What a benchmark is asked, and what it gives: rows, a table, a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vifamily.report import write_text

__all__ = ["Benchmark", "Options", "Report", "median_and_range"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be asked of a benchmark; None leaves it to the benchmark.

    Attributes:
        problems: Names of problems.
        families: Names of families.
        solvers: Solvers of this package.
        peers: Names of peers; empty for none, None for those installed.
        peers_dir: Folder of the peers' environments.
        install_peers: Whether to create missing environments.
        repeats: Rounds over all sides.
        budget: Most seconds of steps of one run, by the clock.
        clock: ``"wall"`` or ``"cpu"``.
        quick: Two problems, one round, a small budget.
        say: Called with a line on what is being done.
        data: Folder with reference data, where a benchmark needs some.
        tasks: Names of tasks.
        simulations: Number of simulations.
    """

    problems: tuple[str, ...] | None = None
    families: tuple[str, ...] | None = None
    solvers: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    peers_dir: Path | None = None
    install_peers: bool = False
    repeats: int | None = None
    budget: float | None = None
    clock: str = "wall"
    quick: bool = False
    say: Callable[[str], None] = print
    data: Path | None = None
    tasks: tuple[str, ...] | None = None
    simulations: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a benchmark gives.

    Attributes:
        rows: One for each measured side, plain values.
        columns: Heads of the table, each with the key of the row, in order.
        figure: A picture, or None.
        failed: Whether a side of this package failed.
    """

    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]
    figure: Any = None
    failed: bool = False

    def table(self) -> Table:
        """Return the rows as a table."""
        table = Table(show_edge=False)
        for head in self.columns:
            table.add_column(head, overflow="fold")
        for row in self.rows:
            table.add_row(*(_cell(row.get(key)) for key in self.columns.values()))
        return table

    def write_json(self, path: Path) -> Path:
        """Write the rows as a JSON list.

        Raises:
            ConfigError: If the file cannot be written.
        """
        return write_text(path, json.dumps(list(self.rows), indent=1, allow_nan=False) + "\n")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One named benchmark.

    Attributes:
        summary: A sentence on what it measures.
        run: From options to a report.
    """

    summary: str
    run: Callable[[Options], Report]


def median_and_range(values: Sequence[float | None]) -> dict[str, float | None]:
    """Median, least and largest; None where a value is missing, for it then has no median to speak of.

    Example:
        >>> median_and_range([3.0, 1.0, 2.0])
        {'median': 2.0, 'least': 1.0, 'largest': 3.0}
    """
    known = sorted(v for v in values if v is not None and math.isfinite(v))
    if not known or len(known) < len(values):
        return {"median": None, "least": known[0] if known else None, "largest": None}
    middle = len(known) // 2
    median = known[middle] if len(known) % 2 else 0.5 * (known[middle - 1] + known[middle])
    return {"median": median, "least": known[0], "largest": known[-1]}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict) and "median" in value:
        if value["median"] is None:
            return "-"
        same = value["least"] == value["largest"]
        return f"{value['median']:.3g}" + ("" if same else f" ({value['least']:.2g}-{value['largest']:.2g})")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
