"""How near the fit as it comes gets to the best of its family on the problems with reference draws."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from vifamily import registry
from vifamily.benchmark._report import Benchmark, Options, Report, median_and_range
from vifamily.diagnostics.moments import moment_errors
from vifamily.errors import ReferenceDataError, VifamilyError
from vifamily.fit import fit
from vifamily.numerics.threads import few_threads
from vifamily.problems._base import Problem
from vifamily.problems._targets import BEST_OF_FAMILY, Errors, best_of_family

__all__ = ["ALLOWED", "BENCHMARK", "DRAWS"]

DRAWS = 100_000
"""Draws behind means and standard deviations: their own error is then 0.003 standard deviations."""
ALLOWED = 0.05
"""How far, in either direction, each of the two errors may lie from that of the best of the family."""


def _errors(problem: Problem, family: str, solver: str, seed: int) -> tuple[Errors, dict[str, Any]]:
    """Fit once, nothing tuned, and measure means and standard deviations from :data:`DRAWS` draws."""
    with warnings.catch_warnings():
        # the row says how each fit ended
        warnings.simplefilter("ignore")
        cpu = time.process_time()
        posterior = fit(problem.model, family, solver=solver, seed=seed, progress=False)
        cpu = time.process_time() - cpu
    with torch.no_grad():
        draws = problem.columns(problem.model.constrain(posterior.draws(DRAWS)))
    reference = problem.reference
    if reference is None:
        raise ReferenceDataError(f"problem {problem.name!r} has no reference draws to compare with.")
    found = moment_errors(draws, reference.mean, reference.sd, reference.names)
    ended = {"seconds": cpu, "steps": float(posterior.record.steps), "stop_reason": posterior.record.stop_reason}
    return Errors(abs(found.worst_mean[1].value), abs(found.worst_sd[1].value)), ended


def _row(spec: str, family: str, solver: str, seeds: int) -> dict[str, Any]:
    """Measure one problem with one family, a fit for each seed."""
    row: dict[str, Any] = {"benchmark": "references", "problem": spec, "family": family, "side": f"vifamily {solver}"}
    row |= {"draws": DRAWS, "reached": False, "reason": None}
    try:
        best, problem = best_of_family(spec, family), registry.build("problems", spec)
        runs = [_errors(problem, family, solver, seed) for seed in range(seeds)]
    except VifamilyError as error:
        return {**row, "reason": f"{type(error).__name__}: {error}"}
    gaps = [max(abs(e.mean - best.mean), abs(e.log_sd - best.log_sd)) for e, _ in runs]
    endings = sorted({ended["stop_reason"] for _, ended in runs})
    return row | {
        "mean_error": median_and_range([e.mean for e, _ in runs]), "best_mean_error": best.mean,
        "log_sd_error": median_and_range([e.log_sd for e, _ in runs]), "best_log_sd_error": best.log_sd,
        "gap": median_and_range(gaps), "stop_reason": ", ".join(endings),
        "seconds": median_and_range([ended["seconds"] for _, ended in runs]),
        "steps": median_and_range([ended["steps"] for _, ended in runs]),
        "reached": max(gaps) <= ALLOWED and endings == ["converged"],
    }  # fmt: skip


def _run(options: Options) -> Report:
    """Measure every problem with every family; fails where a gap is too wide or a fit did not converge."""
    problems = options.problems or (("garch11",) if options.quick else tuple(BEST_OF_FAMILY["mean_field"]))
    families = options.families or tuple(BEST_OF_FAMILY)
    seeds, rows = options.repeats or (1 if options.quick else 3), []
    with few_threads(0):
        for problem in problems:
            for family in families:
                for solver in options.solvers or ("auto",):
                    options.say(f"{problem}, {family}, {solver}")
                    rows.append(_row(problem, family, solver, seeds))
    columns = {"problem": "problem", "family": "family", "solver": "side", "mean error": "mean_error",
               "best": "best_mean_error", "log sd error": "log_sd_error", "best ": "best_log_sd_error", "gap": "gap",
               "CPU, s": "seconds", "steps": "steps", "ended": "stop_reason", "reached": "reached",
               "remark": "reason"}  # fmt: skip
    return Report(rows, columns, failed=not all(row["reached"] for row in rows))


BENCHMARK = Benchmark(
    f"Worst errors of means and sds on the reference posteriors, fits as they come, {DRAWS:,} draws, beside the best "
    "of the family.",
    _run,
)
"""The benchmark ``references``."""
