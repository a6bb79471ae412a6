"""The figures of merit of a comparison, and the metrics against reference draws that can be asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vifamily.compare.labels import split_specs
from vifamily.diagnostics.arc_length import arc_length
from vifamily.diagnostics.bounds import Estimate
from vifamily.diagnostics.classifier_tests import c2st
from vifamily.errors import ConfigError
from vifamily.rng import generator

__all__ = ["MEASURES", "METRICS", "Measure", "metric_names", "metric_values", "shown_measures"]

FOLDS = 5
CLASSIFIED_DRAWS = 1000
"""Most draws of each side that a classifier is trained on; its time grows faster than the length of the arc."""
Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of merit.

    Attributes:
        name: Its name in files.
        head: Its head in tables.
        note: What it is, with its unit.
        digits: Digits after the point.
        optional: Whether tables leave it out where no cell has it.
    """

    name: str
    head: str
    note: str
    digits: int
    optional: bool = False


MEASURES: tuple[Measure, ...] = (
    Measure(
        "mean_error",
        "mean error, worst",
        "Largest |posterior mean - reference mean| over the quantities, in reference sd.",
        3,
    ),
    Measure("mean_error_rms", "mean error, rms", "Root mean square of the same errors, in reference sd.", 3),
    Measure(
        "log_sd_ratio", "log sd ratio, worst", "log(sd / reference sd) furthest from 0; negative is too narrow.", 3
    ),
    Measure(
        "sliced_wasserstein",
        "sliced Wasserstein",
        "Sliced Wasserstein distance (order 2) to the reference draws, quantities in reference sd.",
        3,
    ),
    Measure(
        "mmd",
        "MMD\u00b2",
        "Squared maximum mean discrepancy to the reference draws (Gaussian kernel, median bandwidth), unbiased: "
        "near 0, or a little below, where the samples agree.",
        4,
    ),
    Measure(
        "arc_length",
        "arc length",
        "Length of the optimal ROC curve between draws and reference draws, cross-fitted with a kernel: 1.414 (the "
        "square root of 2), or a little below, where nothing tells them apart, 2 where they never meet.",
        3,
        optional=True,
    ),
    Measure(
        "c2st",
        "C2ST",
        "Accuracy with which a network tells draws from reference draws, held out: 0.5 where nothing tells them "
        "apart, 1 where they never meet.",
        3,
        optional=True,
    ),
    Measure("elbo", "ELBO", "Evidence lower bound in nats, whatever was optimised; higher is better.", 2),
    Measure("k_hat", "k-hat", "Pareto shape of the importance weights; above its threshold they are not reliable.", 2),
    Measure("seconds", "time / s", "Wall time of the fit.", 1),
    Measure("steps", "steps", "Optimiser steps taken.", 0),
)


def shown_measures(rows: Sequence[Mapping[str, Any]]) -> tuple[Measure, ...]:
    """Return the measures of a table: all but the optional ones that no row has."""
    return tuple(m for m in MEASURES if not m.optional or any(row.get(m.name) is not None for row in rows))


def _arc_length(draws: Array, reference: Array, seed: int) -> Estimate | None:
    # fewer than two points for each fold are no sample to cross-fit
    if min(len(draws), len(reference)) < 2 * FOLDS:
        return None
    return arc_length(draws, reference, generator=generator(seed, "compare/arc_length"), folds=FOLDS)


def _c2st(draws: Array, reference: Array, seed: int) -> Estimate | None:
    size = min(len(draws), len(reference), CLASSIFIED_DRAWS)
    if size < FOLDS:
        return None
    # evenly spaced, for published draws come chain by chain
    x, y = (sample[np.linspace(0, len(sample) - 1, size).astype(int)] for sample in (reference, draws))
    return c2st(x, y, folds=FOLDS, seed=seed)


METRICS: Mapping[str, Callable[[Array, Array, int], Estimate | None]] = {"arc_length": _arc_length, "c2st": _c2st}
"""Metrics that ``compare`` takes by name: from draws, reference draws and a seed to an estimate."""


def metric_names(metrics: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the names of metrics, in the order of the table.

    Args:
        metrics: Names, or one string of them separated by commas; empty, None or ``"none"`` for none of them.

    Raises:
        ConfigError: If a name is not among :data:`METRICS`.

    Example:
        >>> metric_names("c2st, arc_length"), metric_names("none")
        (('arc_length', 'c2st'), ())
    """
    known = ", ".join(METRICS)
    if metrics is None or metrics == "none":
        return ()
    if not isinstance(metrics, (str, Iterable)):
        raise ConfigError(f"metrics must be names among {known}, got {metrics!r}.")
    chosen = [str(name).strip() for name in (split_specs(metrics) if isinstance(metrics, str) else metrics)]
    for name in chosen:
        if name not in METRICS:
            raise ConfigError(f"unknown metric {name!r}. Known metrics: {known}; none for no other than the standard.")
    return tuple(name for name in METRICS if name in chosen)


def metric_values(
    metrics: Sequence[str], draws: Array, reference: Array, seed: int
) -> tuple[dict[str, float | None], list[str]]:
    """Return each metric under its name, its standard error under ``<name>_error``, and remarks on those that failed.

    Args:
        metrics: Names.
        draws: ``(draw, quantity)``, finite.
        reference: ``(other draw, quantity)``.
        seed: Root seed.
    """
    values: dict[str, float | None] = {}
    remarks = []
    for name in metrics:
        try:
            found = METRICS[name](draws, np.asarray(reference, dtype=np.float64), seed)
        except (ValueError, ArithmeticError) as error:  # draws beyond what a classifier can hold: the fit still counts
            remarks.append(f"{name} could not be computed: {' '.join(str(error).split())}")
            found = None
        values |= {name: None, f"{name}_error": None}
        if found is not None:
            values |= {name: found.value, f"{name}_error": found.error}
    return values, remarks
