"""What a comparison returns: cells, tables, figures and files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from vifamily import plots, report
from vifamily.compare.cells import SCHEMA, Outcome, plain
from vifamily.compare.measure import Target
from vifamily.compare.metrics import shown_measures
from vifamily.compare.pictures import draws_grid
from vifamily.compare.tables import csv_text, html_table, rich_table, summarise

__all__ = ["Comparison"]

WIDE = 185
"""Columns of a terminal from which the table shows standard errors."""

_GRID_ALT = (
    "Grid of pictures, one row per problem and one column per family and objective: posterior draws over the target "
    "density, or over regions that hold a quarter, half, three quarters and nine tenths of the reference draws. "
    "The numbers are in the table above."
)
_GRID_CAPTION = (
    "Draws of the first seed that went well. In more than two dimensions, the two quantities whose means are furthest "
    "off. 'mean off': the largest error of a mean, in reference standard deviations."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A grid of fits on the same targets, seeds and budget; prints as a table.

    Attributes:
        cells: One outcome per problem, family, objective and seed.
        config: What was asked for, as plain data.
        targets: What is known about each problem, by label.
    """

    cells: tuple[Outcome, ...]
    config: Mapping[str, Any]
    targets: Mapping[str, Target] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The cells that failed; those that were not possible are not among them."""
        return tuple(cell for cell in self.cells if cell.status == "failed")

    @property
    def fitted(self) -> tuple[Outcome, ...]:
        """The cells with a result."""
        return tuple(cell for cell in self.cells if cell.status == "ok")

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary per problem, family and objective: figures averaged over seeds, with their errors."""
        return summarise(self.cells)

    def table(self, *, compact: bool = False) -> Table:
        """Return the table for a terminal; ``compact`` leaves out the standard errors."""
        return rich_table(self.rows(), compact=compact)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Show as the table, compact where the terminal is narrow."""
        yield self.table(compact=options.max_width < WIDE)

    def __str__(self) -> str:
        """Return the table as text."""
        buffer = io.StringIO()
        Console(file=buffer, width=200, no_color=True, highlight=False).print(self.table())
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def __repr__(self) -> str:
        """Return the table, which is what an interactive session should show."""
        return str(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the draws as strict JSON data: what is not finite is None."""
        rows = self.rows()
        content = {
            "schema": SCHEMA,
            "config": self.config,
            "measures": {m.name: m.note for m in shown_measures(rows)},
            "problems": {
                label: {
                    "description": target.description,
                    "reference": target.kind,
                    "quantities": target.names,
                    "log_evidence": target.log_evidence,
                }
                for label, target in self.targets.items()
            },
            "summary": rows,
            "cells": [cell.to_dict() for cell in self.cells],
        }
        return {key: plain(value) for key, value in content.items()}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the results as JSON text, and write them where a path is given."""
        text = json.dumps(self.to_dict(), allow_nan=False, indent=1, ensure_ascii=False) + "\n"
        if path is not None:
            report.write_text(path, text)
        return text

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line per cell as CSV text, and write it where a path is given."""
        text = csv_text(self.cells)
        if path is not None:
            report.write_text(path, text)
        return text

    def figure(self) -> Figure | None:
        """Return the grid of pictures, problems down and methods across; None when no fit went well."""
        return draws_grid(self.targets, self.cells)

    def trace(self, problem: str, family: str, objective: str, seed: int | None = None) -> Figure:
        """Return the loss trace of one cell.

        Raises:
            KeyError: If there is no such cell with a trace.
        """
        for cell in self.fitted:
            if cell.place[:3] == (problem, family, objective) and seed in (None, cell.seed) and cell.trace:
                level = self.targets[problem].log_evidence if problem in self.targets else None
                return plots.loss_trace(
                    cell.trace["step"],
                    cell.trace["loss"],
                    cell.trace.get("loss_error"),
                    step_size=cell.trace.get("step_size"),
                    level=None if level is None else -level,
                    title=f"{problem}, {family}, {objective}, seed {cell.seed}",
                )
        raise KeyError(f"no fitted cell {problem!r} x {family!r} x {objective!r} with a trace.")

    def html(self, *, picture: Figure | None = None) -> str:
        """Return the report as one self-contained page; ``picture`` saves drawing the grid a second time."""
        rows = self.rows()
        blocks: list[report.Text | report.Table | report.Picture] = [report.Text(self._summary()), html_table(rows)]
        picture = self.figure() if picture is None else picture
        if picture is not None:
            blocks += [
                report.Text(heading="Pictures"),
                report.Picture(
                    picture,
                    alt=_GRID_ALT,
                    caption=_GRID_CAPTION,
                ),
            ]
        blocks += self._problem_blocks() + self._trouble_blocks()
        settings = json.dumps(plain(self.config), indent=1, ensure_ascii=False)
        blocks.append(report.Text(settings, heading="How this was run", fixed=True))
        return report.html("Comparison of variational approximations", *blocks, subtitle=self._subtitle())

    def _subtitle(self) -> str:
        config = self.config
        words = {"problems": "problem", "families": "family", "objectives": "objective", "seeds": "seed"}
        counts = {axis: len(config.get(axis, ())) for axis in words}
        parts = [f"{count} {words[axis] if count == 1 else axis}" for axis, count in counts.items()]
        return f"{', '.join(parts)}; {len(self.cells)} cells"

    def _summary(self) -> str:
        impossible = len(self.cells) - len(self.fitted) - len(self.failed)
        parts = [f"{len(self.fitted)} of {len(self.cells)} cells were fitted"]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if impossible:
            parts.append(f"{impossible} were not possible")
        return (
            ", ".join(parts)
            + ". For each seed, every method had the same target, the same noise stream and the same budget. "
            "Click a head to sort by it."
        )

    def _problem_blocks(self) -> list[report.Text | report.Table | report.Picture]:
        rows: list[Sequence[report.Cell | str]] = []
        for label, target in self.targets.items():
            count = "-" if target.draws is None else str(len(target.draws))
            evidence = "-" if target.log_evidence is None else f"{target.log_evidence:.4g}"
            rows.append([label, target.description, target.kind, report.Cell(count), report.Cell(evidence)])
        heads = ["problem", "description", "reference", "reference draws", "log evidence"]
        return [report.Text(heading="Problems"), report.Table(heads, rows, caption="What is known")] if rows else []

    def _trouble_blocks(self) -> list[report.Text | report.Table | report.Picture]:
        rows: list[Sequence[report.Cell | str]] = [
            [str(c.problem), c.family, c.objective, report.Cell(str(c.seed), c.seed), c.status, c.reason or ""]
            for c in self.cells
            if c.status != "ok"
        ]
        heads = ["problem", "family", "objective", "seed", "status", "reason"]
        return [report.Text(heading="Without result"), report.Table(heads, rows, caption="Reasons")] if rows else []

    def save(self, out: str | os.PathLike[str]) -> dict[str, Path]:
        """Write ``results.json``, ``results.csv``, ``table.txt``, ``draws.png`` and ``report.html``.

        Args:
            out: The folder; made where it is missing.

        Returns:
            Path of each file by name.

        Raises:
            ConfigError: If the folder cannot be written to.
        """
        folder = Path(out)
        picture = self.figure()
        files = {
            "results.json": report.write_text(folder / "results.json", self.to_json()),
            "results.csv": report.write_text(folder / "results.csv", self.to_csv()),
            "table.txt": report.write_text(folder / "table.txt", f"{self}\n"),
        }
        if picture is not None:
            files["draws.png"] = report.write_bytes(folder / "draws.png", report.png(picture))
        files["report.html"] = report.write_text(folder / "report.html", self.html(picture=picture))
        return files
