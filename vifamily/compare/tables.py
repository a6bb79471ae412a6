"""Tables of a comparison: one row per problem, family and objective, figures averaged over seeds."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from vifamily import report
from vifamily.compare.cells import Outcome
from vifamily.compare.metrics import MEASURES, Measure, shown_measures

__all__ = ["csv_text", "figure_text", "html_table", "rich_table", "summarise"]

AXES = ("problem", "family", "objective")


def summarise(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Average each figure over the seeds.

    Args:
        outcomes: The cells.

    Returns:
        One plain dictionary per problem, family and objective, in the order of the cells. Each figure has its mean
        under its own name and its standard error across seeds under ``<name>_error`` (None with fewer than two seeds).
    """
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.place[:3], []).append(outcome)
    return [_row(place, members) for place, members in groups.items()]


def _row(place: tuple[str, str, str], members: Sequence[Outcome]) -> dict[str, Any]:
    fitted = [m for m in members if m.status == "ok"]
    row: dict[str, Any] = dict(zip(AXES, place, strict=True))
    row |= {"seeds": len(members), "fitted": len(fitted)}
    if fitted:
        row["status"] = "ok" if len(fitted) == len(members) else "partly failed"
    else:
        row["status"] = "failed" if any(m.status == "failed" for m in members) else "not possible"
    reasons = list(dict.fromkeys(m.reason for m in members if m.reason))
    row["reason"] = " | ".join(reasons) or None
    for measure in MEASURES:
        values = [float(v) for m in fitted if isinstance(v := m.values.get(measure.name), (int, float))]
        row[measure.name], row[f"{measure.name}_error"] = mean_and_error(values)
    stops = Counter(str(m.values.get("stop_reason")) for m in fitted)
    row["stop_reason"] = ", ".join(k if len(stops) == 1 else f"{k} {n}" for k, n in stops.most_common()) or None
    thresholds = [v for m in fitted if isinstance(v := m.values.get("k_hat_threshold"), float)]
    row["k_hat_threshold"] = min(thresholds) if thresholds else None
    return row


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and its standard error from the spread of the values."""
    size = len(values)
    if not size:
        return None, None
    mean = math.fsum(values) / size
    if size < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (size - 1) / size)


def figure_text(value: float | None, error: float | None, digits: int) -> str:
    """Write a figure with its error to so many digits after the point; very large ones with three significant digits.

    Example:
        >>> figure_text(0.20312, 0.0123, 3), figure_text(1834.2, None, 0), figure_text(None, None, 2)
        ('0.203 ± 0.012', '1834', '-')
    """
    if value is None:
        return "-"

    def write(number: float) -> str:
        return f"{number:.3g}" if abs(number) >= 1e6 else f"{number:.{digits}f}"

    return write(value) if error is None else f"{write(value)} ± {write(error)}"


def _tone(row: Mapping[str, Any], measure: Measure) -> str:
    if measure.name == "k_hat" and row["k_hat"] is not None and row["k_hat_threshold"] is not None:
        return "bad" if row["k_hat"] > row["k_hat_threshold"] else "good"
    return ""


def _text(row: Mapping[str, Any], measure: Measure) -> str:
    text = figure_text(row[measure.name], row[f"{measure.name}_error"], measure.digits)
    # colour alone must not carry the meaning
    return text + " !" if _tone(row, measure) == "bad" else text


def _outcome_text(row: Mapping[str, Any]) -> str:
    if row["status"] == "ok":
        return str(row["stop_reason"] or "")
    if row["status"] == "partly failed":
        return f"{row['stop_reason']}; {row['seeds'] - row['fitted']} of {row['seeds']} failed: {row['reason']}"
    return f"{row['status']}: {row['reason']}"


def rich_table(rows: Sequence[Mapping[str, Any]], *, compact: bool = False) -> Table:
    """Return the table for a terminal: one block per problem, one line per family and objective.

    k-hat above its threshold carries an exclamation mark.

    Args:
        rows: From :func:`summarise`.
        compact: Leave out the standard errors, for terminals narrower than 185 columns.
    """
    measures = shown_measures(rows)
    table = Table(header_style="bold", pad_edge=False, box=None)
    table.add_column("problem\n  family, objective", no_wrap=True)
    for measure in measures:
        head = measure.head.replace(", ", "\n").replace(" W", "\nW")
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("stop", overflow="fold", min_width=9)
    before = None
    for row in rows:
        if row["problem"] != before:
            if before is not None:
                table.add_row()
            table.add_row(f"[bold]{_bare(row['problem'])}[/]")
            before = row["problem"]
        figures = []
        for measure in measures:
            tone = {"bad": "red", "good": "green"}.get(_tone(row, measure))
            shown = {**row, f"{measure.name}_error": None} if compact else row
            text = _text(shown, measure) if row["fitted"] else "-"
            figures.append(f"[{tone}]{text}[/]" if tone else text)
        table.add_row(f"  {_bare(row['family'])}, {_bare(row['objective'])}", *figures, _bare(_outcome_text(row)))
    return table


def _bare(text: Any) -> str:
    return str(text).replace("[", r"\[")


def html_table(rows: Sequence[Mapping[str, Any]]) -> report.Table:
    """Return the table for the HTML report."""
    body, measures = [], shown_measures(rows)
    for row in rows:
        cells: list[report.Cell | str] = [str(row[axis]) for axis in AXES]
        cells += [
            report.Cell(_text(row, m) if row["fitted"] else "-", row[m.name] if row["fitted"] else None, _tone(row, m))
            for m in measures
        ]
        tone = {"ok": "", "not possible": "quiet"}.get(row["status"], "bad")
        body.append([*cells, report.Cell(_outcome_text(row), tone=tone)])
    heads = [*AXES, *(m.head for m in measures), "stop"]
    notes = ["", "", "", *(m.note for m in measures), "Why the fit ended, or why there is none."]
    seeds = max((row["seeds"] for row in rows), default=0)
    spread = f"Means over {seeds} seeds ± standard error across seeds. " if seeds > 1 else "One seed. "
    return report.Table(heads, body, caption=spread + "An exclamation mark: k-hat above its threshold.", notes=notes)


def csv_text(outcomes: Sequence[Outcome]) -> str:
    """Return one line per cell, all figures in columns of their own; empty where there is none."""
    first = [m.name for m in shown_measures([outcome.values for outcome in outcomes])]
    rest = dict.fromkeys(name for outcome in outcomes for name in outcome.values if name not in first)
    heads = [*AXES, "seed", "status", *first, *rest, "reason"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, heads, restval="", lineterminator="\n")
    writer.writeheader()
    for outcome in outcomes:
        line: dict[str, Any] = dict(zip((*AXES, "seed"), outcome.place, strict=True))
        line |= {"status": outcome.status, "reason": outcome.reason or ""}
        line |= {name: "" if value is None else value for name, value in outcome.values.items()}
        writer.writerow(line)
    return buffer.getvalue()
