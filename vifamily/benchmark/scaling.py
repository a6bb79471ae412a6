"""Time and evaluations of a fit to convergence against the number of data, dimensions, draws and restarts."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vifamily.benchmark._picture import scaling_figure
from vifamily.benchmark._report import Benchmark, Options, Report, median_and_range
from vifamily.benchmark._suite import entry_named
from vifamily.benchmark._workers import ask
from vifamily.errors import BenchmarkError

__all__ = ["BENCHMARK", "CURVES"]

CURVES: dict[str, tuple[int, ...]] = {
    "data": (1000, 3000, 10_000, 30_000, 100_000),
    "dim": (5, 10, 20, 50, 100),
    "draws": (16, 64, 256, 1024),
    "restarts": (1, 2, 4, 8, 16, 32),
}
"""Values at which each curve is measured; what does not vary is 1,000 data, 25 dimensions, one restart."""


def _job(curve: str, value: int, solver: str, family: str, budget: float, seed: int) -> dict[str, Any]:
    problem = {"data": f"logistic_{value}_25", "dim": f"logistic_1000_{value}"}.get(curve, "logistic_1000_25")
    setting = {"name": f"{curve} {value}", "solver": solver}
    if curve in ("draws", "restarts"):
        setting[curve] = value  # type: ignore[assignment]
    dim = int(problem.rsplit("_", 1)[1])
    return {"problem": problem, "family": family, "what": "fit", "dim": dim, "settings": [setting], "budget": budget,
            "seed": seed, "clock": "wall"}  # fmt: skip


def _run(options: Options) -> Report:
    """Measure every curve for each solver, each fit in a process of its own."""
    repeats = options.repeats or (1 if options.quick else 3)
    solvers = options.solvers or ("auto",)
    family, budget = (options.families or ("mean_field",))[0], options.budget or (5.0 if options.quick else 100.0)
    clock = "total_seconds" if options.clock == "wall" else "total_cpu_seconds"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for solver in solvers:
            for curve, values in CURVES.items():
                first: float | None = None
                for value in values[:2] if options.quick else values:
                    options.say(f"{solver}, {family}: {curve} {value}")
                    row = _row(curve, value, solver, family, budget, repeats, clock, Path(scratch))
                    median = row["seconds"]["median"] if row["reason"] is None else None
                    first = first if first is not None else median
                    row["ratio"] = median / first if median is not None and first else None
                    rows.append(row)
    columns = {"solver": "side", "family": "family", "curve": "curve", "value": "value", "seconds": "seconds",
               "ratio": "ratio", "evaluations": "evaluations", "MB": "memory_mb", "ended": "stop_reason",
               "remark": "reason"}  # fmt: skip
    return Report(rows, columns, scaling_figure(rows), any(row["reason"] for row in rows))


def _row(
    curve: str, value: int, solver: str, family: str, budget: float, repeats: int, clock: str, scratch: Path
) -> dict[str, Any]:
    row: dict[str, Any] = {"benchmark": "scaling", "side": f"vifamily {solver}", "family": family, "curve": curve}
    row |= {"value": value, "reason": None}
    infos, memory = [], []
    try:
        for repeat in range(repeats):
            job = _job(curve, value, solver, family, budget, repeat)
            data = {"check_points": np.zeros((1, job["dim"]))}
            entry_named(job["problem"])
            answer = ask(Path(sys.executable), "vifamily_fit", job, data, limit=120 + 3 * budget, folder=scratch)
            infos.append(answer.runs[0].info)
            memory.append(answer.memory_mb)
    except BenchmarkError as error:
        return {**row, "reason": str(error)}
    row["seconds"] = median_and_range([float(info[clock]) for info in infos])
    row["evaluations"] = median_and_range([float(info["evaluations"]) for info in infos])
    return {**row, "memory_mb": median_and_range(list(memory)), "stop_reason": str(infos[0]["stop_reason"])}


BENCHMARK = Benchmark("Time of a fit to convergence against data, dimensions, draws and restarts.", _run)
"""The benchmark ``scaling``."""
