"""When restarts minimised side by side stop waiting for the slow ones, and which of these are given up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vifamily.solvers._quasi_newton import Descent

__all__ = ["PATIENCE", "hopeless", "only_stragglers"]

PATIENCE = 20
"""Evaluations of a level before any restart may be left behind."""
_FEW_LEFT = 0.75
"""Part of the rows that must be at their minimum before the others may be left behind."""
_OUT_OF_REACH = 10.0
"""Gap to the best row, in decreases that a row's last step brought or its next one promises."""


def _hope(descent: Descent) -> np.ndarray:
    """What a row may still gain, generously, ``(row,)``."""
    hope: np.ndarray = _OUT_OF_REACH * np.maximum(descent.decrement, descent.gained)
    return hope


def only_stragglers(descent: Descent, tolerance: float) -> bool:
    """Whether every row that is not at its minimum is far above the best, which is at its own.

    Args:
        descent: The rows.
        tolerance: Smallest gap that matters.
    """
    if descent.done.mean() < _FEW_LEFT or descent.fresh.any():
        return False
    best = int(np.argmin(descent.value))
    far = descent.value - descent.value[best] > np.maximum(_hope(descent), tolerance)
    return bool(descent.done[best]) and bool(far[descent.done == 0].all())


def hopeless(descent: Descent, gaps: Sequence[Sequence[float]]) -> tuple[list[int], float]:
    """The open rows that are worse than the best on several sets of draws by more than chance and hope explain.

    Args:
        descent: The rows.
        gaps: For each set of draws, how much worse than the best row each row is.

    Returns:
        The rows, and the smallest mean gap among them (infinite where there are none).
    """
    table = np.array(gaps)
    mean, error = table.mean(0), table.std(0, ddof=1) / len(table) ** 0.5
    worse = (descent.done == 0) & np.isfinite(table).all(0) & (mean > 3 * error + _hope(descent))
    lost = np.flatnonzero(worse).tolist()
    return lost, float(mean[lost].min()) if lost else float("inf")
