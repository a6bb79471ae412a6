"""CPU time of a fit from several start points against that of a fit from one."""

from __future__ import annotations

import time
import warnings
from typing import Any

from vifamily.benchmark._report import Benchmark, Options, Report, median_and_range
from vifamily.errors import VifamilyError
from vifamily.fit import fit
from vifamily.numerics.threads import few_threads
from vifamily.posterior import Posterior

__all__ = ["BENCHMARK", "PROBLEMS", "RESTARTS"]

RESTARTS = 32
"""Start points of the larger fit."""

PROBLEMS = (
    "eight_schools", "eight_schools(parameterisation=centered)", "correlated_normal", "banana", "diabetes", "ring",
)  # fmt: skip
"""Problems that need no data from outside."""


def _timed(problem: str, family: str, solver: str, restarts: int, seed: int) -> tuple[float, Posterior]:
    with warnings.catch_warnings():
        # the row says how each fit ended
        warnings.simplefilter("ignore")
        start = time.process_time()
        posterior = fit(problem, family, solver=solver, restarts=restarts, seed=seed, progress=False)
        return time.process_time() - start, posterior


def _row(problem: str, family: str, solver: str, many: int, rounds: int) -> dict[str, Any]:
    """Time one cell; the two sides take turns, and each round has a seed of its own."""
    row: dict[str, Any] = {"benchmark": "restarts", "problem": problem, "family": family, "side": f"vifamily {solver}"}
    row |= {"restarts": many, "reason": None}
    pairs: list[dict[str, float]] = []
    try:
        _timed(problem, family, solver, 1, rounds)  # the first fit of a process pays for loading and compiling
        for seed in range(rounds):
            seconds, one = _timed(problem, family, solver, 1, seed)
            all_seconds, best = _timed(problem, family, solver, many, seed)
            pairs.append({
                "ratio": all_seconds / seconds, "one": seconds, "many": all_seconds,
                "steps_one": float(one.record.steps), "steps_many": float(best.record.steps),
                "loss_one": one.record.restart_losses[one.record.best_restart],
                "loss_many": best.record.restart_losses[best.record.best_restart],
            })  # fmt: skip
    except VifamilyError as error:
        return {**row, "reason": f"{type(error).__name__}: {error}"}
    row |= {key: median_and_range([pair[key] for pair in pairs]) for key in pairs[0]}
    return {**row, "ended": f"{one.record.stop_reason}, {best.record.stop_reason}"}


def _run(options: Options) -> Report:
    """Measure every problem with every family."""
    problems = options.problems or (("correlated_normal",) if options.quick else PROBLEMS)
    families = options.families or (("mean_field",) if options.quick else ("mean_field", "full_rank"))
    rounds, many = options.repeats or (1 if options.quick else 3), 4 if options.quick else RESTARTS
    rows = []
    with few_threads(0):
        for problem in problems:
            for family in families:
                for solver in options.solvers or ("auto",):
                    options.say(f"{problem}, {family}, {solver}: {many} restarts")
                    rows.append(_row(problem, family, solver, many, rounds))
    columns = {"problem": "problem", "family": "family", "solver": "side", "restarts": "restarts", "ratio": "ratio",
               "one, s": "one", "all, s": "many", "ended": "ended", "remark": "reason"}  # fmt: skip
    return Report(rows, columns, failed=any(row["reason"] for row in rows))


BENCHMARK = Benchmark("CPU time of 32 restarts over that of one, the same problem, family, solver and seed.", _run)
"""The benchmark ``restarts``."""
