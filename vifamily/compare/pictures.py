"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vifamily import plots
from vifamily.compare.cells import Outcome
from vifamily.compare.measure import Target

__all__ = ["draws_grid"]

MOST_COLUMNS = 12
Array = NDArray[np.float64]


def shown_columns(target: Target, outcomes: Sequence[Outcome]) -> list[int]:
    """Return the one or two quantities to show of a problem: those whose means are furthest off, over all methods."""
    size = len(target.names)
    if size <= 2:
        return list(range(size))
    totals = np.zeros(size)
    for outcome in outcomes:
        for i, name in enumerate(target.names):
            # one method that went astray must not choose the picture alone
            totals[i] += min(abs(outcome.errors.get(name) or 0.0), 3.0)
    return sorted(int(i) for i in np.argsort(-totals, kind="stable")[:2])


def _row(target: Target, chosen: list[int], outcomes: Sequence[Outcome]) -> plots.Row:
    names = [target.names[i] for i in chosen]
    reference = None if target.draws is None else target.draws[:, chosen]
    if target.log_density is None:
        return plots.Row(target.label, names, reference)
    cover = reference
    if cover is None:
        cover = np.concatenate([o.draws for o in outcomes if o.draws is not None])[:, chosen]
    x, y, points = plots.grid_over(cover)
    values = target.log_density(points).reshape(y.size, x.size)
    return plots.Row(target.label, names, reference, x, y, values)


def _note(outcome: Outcome) -> str:
    error, k = outcome.values.get("mean_error"), outcome.values.get("k_hat")
    parts = []
    if isinstance(error, (int, float)):
        parts.append(f"mean off {error:.2f} sd")
    if isinstance(k, (int, float)):
        parts.append(f"k-hat {k:.2f}")
    return ", ".join(parts)


def draws_grid(targets: Mapping[str, Target], outcomes: Sequence[Outcome]) -> Figure | None:
    """Draws of every method (its first seed that went well) over each problem's target.

    Args:
        targets: What is known about each problem, by label.
        outcomes: The cells.

    Returns:
        The figure, or None when there is nothing to show.
    """
    methods = list(dict.fromkeys((o.family, o.objective) for o in outcomes))[:MOST_COLUMNS]
    rows: list[plots.Row] = []
    panels: dict[tuple[int, int], plots.Panel] = {}
    for label in dict.fromkeys(o.problem for o in outcomes):
        own = [o for o in outcomes if o.problem == label]
        fitted = [o for o in own if o.status == "ok" and o.draws is not None]
        target = targets.get(label)
        if target is None or not target.names or not fitted:
            continue
        chosen = shown_columns(target, fitted)
        for column, method in enumerate(methods):
            cells = [o for o in own if (o.family, o.objective) == method]
            best = next((o for o in cells if o.status == "ok" and o.draws is not None), None)
            if best is not None and best.draws is not None and np.isfinite(best.draws[:, chosen]).all(1).sum() >= 2:
                panels[len(rows), column] = plots.Panel(best.draws[:, chosen], _note(best))
            elif cells:
                panels[len(rows), column] = plots.Panel(None, f"{cells[0].status}: {cells[0].reason}")
        rows.append(_row(target, chosen, fitted))
    if not rows:
        return None
    heads = [f"{family}\n{objective}" for family, objective in methods]
    return plots.cell_grid(rows, heads, panels, title="Posterior draws over their targets")
