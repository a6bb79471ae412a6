"""The course of a run, thinned to what a plot can show."""

from __future__ import annotations

import math

import numpy as np

from vifamily.solvers import Run

__all__ = ["trace_of"]

_TRACE_POINTS = 2000


def trace_of(run: Run, restart: int) -> dict[str, np.ndarray]:
    """Return loss, its error, step size and terms of a run over at most 2,000 blocks of steps."""
    losses = run.losses[:, min(restart, run.losses.shape[1] - 1)].numpy()
    if losses.size == 0:
        return {name: np.zeros(0) for name in ("step", "loss", "loss_error", "step_size")}
    width = max(1, math.ceil(losses.size / _TRACE_POINTS))
    edges = np.arange(0, losses.size, width)
    counts = np.diff(np.append(edges, losses.size))

    def mean(column: np.ndarray) -> np.ndarray:
        return np.add.reduceat(column, edges) / counts

    loss = mean(losses)
    # error of a short running mean: what a reader of the curve takes for its noise
    smooth = max(1, min(50, losses.size // 4))
    deviation = np.sqrt(np.maximum(_running(losses**2, smooth) - _running(losses, smooth) ** 2, 0) / smooth)
    out = {
        "step": edges + counts,
        "loss": loss,
        "loss_error": mean(deviation),
        "step_size": mean(run.step_sizes.numpy()),
    }
    out.update(
        {f"term:{name}": mean(column.numpy()) for name, column in run.terms.items() if column.numel() == losses.size}
    )
    return out


def _running(column: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window, shorter at the ends."""
    total = np.concatenate([[0.0], np.cumsum(column)])
    at = np.arange(column.size)
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, column.size)
    out: np.ndarray = (total[high] - total[low]) / (high - low)
    return out
