"""Time from nothing to the best Gaussian of a family: this package's solvers and the peers, on one judge.

How the comparison is done, and its rules, are in the documentation under "Benchmarks".
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vifamily.benchmark._environments import PEERS, default_folder, install, interpreter
from vifamily.benchmark._judge import Judge, Moments, density_offset, first_time, plain
from vifamily.benchmark._picture import gap_figure
from vifamily.benchmark._report import Benchmark, Options, Report, median_and_range
from vifamily.benchmark._suite import SUITE, entry_named
from vifamily.benchmark._workers import Answer, Run, ask
from vifamily.errors import BenchmarkError, ConfigError, IncompatibleError, ReferenceDataError
from vifamily.fit import fit
from vifamily.rng import generator, split

__all__ = ["BENCHMARK", "SETTINGS", "Case"]

SETTINGS: tuple[dict[str, Any], ...] = (
    {"name": "8 draws, 0.1 to 0.001 in 10,000 steps", "draws": 8, "first": 0.1, "last": 0.001, "steps": 10_000},
    {"name": "8 draws, 0.1 to 0.001 in 1,000 steps", "draws": 8, "first": 0.1, "last": 0.001, "steps": 1000},
    {"name": "1 draw, 0.1 to 0.001 in 3,000 steps", "draws": 1, "first": 0.1, "last": 0.001, "steps": 3000},
    {"name": "64 draws, 0.3 to 0.003 in 1,000 steps", "draws": 64, "first": 0.3, "last": 0.003, "steps": 1000},
)
"""Adam's settings that every peer may try; the fastest counts."""

_NATS, _PART, _ACCURATE, _SAME_DENSITY = 0.1, 0.01, 0.05, 1e-8
_QUICK = ("eight_schools", "logistic_1000_25")
_STEPS = ({"name": "steps", "draws": 1, "first": 0.01, "last": 0.009, "steps": 1_000_000},)


@dataclasses.dataclass
class Case:
    """One problem with one family: its judge, the best bound, and what every side did.

    Attributes:
        problem: Name in the suite.
        family: Name of the family.
        judge: The judge.
        best: Best bound of the family that is known.
        best_from: How it was found.
        best_moments: Moment errors of the Gaussian that has it.
        check_points: Points at which log densities are compared, ``(point, dim)``.
        answers: Of each side, one answer or reason per repeat.
        speeds: Steps per second of each side, one per repeat.
    """

    problem: str
    family: str
    judge: Judge
    best: float
    best_from: str
    best_moments: Moments | None
    check_points: np.ndarray
    answers: dict[str, list[Answer | str]] = dataclasses.field(default_factory=dict)
    speeds: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)


def _case(problem: str, family: str) -> Case:
    """Find the best of the family by a long fit on many fixed draws."""
    entry = entry_named(problem)
    judge = Judge(entry.problem())
    large = (judge.model.num_data or 0) > 20_000  # a second per evaluation on many draws
    how = "lbfgs" if large else "lbfgs(tolerance=0.005, most_draws=65536)"
    posterior = fit(judge.problem, family, "elbo", how, seed=split(0, "benchmark/best") % 2**31, steps=3000)
    with torch.no_grad():
        mean, covariance = posterior.family.moments()
    factor = (
        torch.linalg.cholesky(covariance).numpy() if family == "full_rank" else covariance.diagonal().sqrt().numpy()
    )
    noise = torch.randn(5, len(mean), generator=generator(0, "benchmark/check"), dtype=torch.float64).numpy()
    points = mean.numpy() + (noise * factor if factor.ndim == 1 else noise @ factor.T)
    return Case(problem, family, judge, judge.elbo(mean.numpy(), factor), f"{how}, {posterior.record.stop_reason}",
                judge.moments(mean.numpy(), factor), points)  # fmt: skip


def _sides(options: Options, folder: Path) -> dict[str, tuple[Path | None, str]]:
    """Interpreter and script of each side, in the order of the rounds."""
    own = options.solvers or ("auto", "lbfgs", "adam")
    sides: dict[str, tuple[Path | None, str]] = {f"vifamily {s}": (Path(sys.executable), "vifamily_fit") for s in own}
    wanted = tuple(PEERS) if options.peers is None else options.peers
    for name in wanted:
        if name not in PEERS:
            raise ConfigError(f"there is no peer {name!r} here: choose among {', '.join(PEERS)}, or none.")
    if options.install_peers:
        install(wanted, folder)
    for name in wanted:
        sides[name] = (interpreter(name, folder), PEERS[name].script)
    return sides


def _job(side: str, case: Case, what: str, budget: float, seed: int, clock: str) -> dict[str, Any]:
    settings: list[dict[str, Any]]
    if side.startswith("vifamily "):
        solver = "adam" if what == "steps" else side.removeprefix("vifamily ")
        settings = [{"name": solver, "solver": solver, "compile": True if what == "steps" else None}]
    elif side == "pathfinder":
        settings = [{"name": "defaults"}]
    else:
        settings = list(_STEPS if what == "steps" else SETTINGS)
    return {
        "problem": case.problem, "density": entry_named(case.problem).density, "family": case.family, "what": what,
        "method": side, "dim": case.judge.model.dim, "settings": settings, "budget": budget, "seed": seed,
        "clock": clock,
    }  # fmt: skip


def _measure(case: Case, options: Options, sides: dict[str, Any], repeat: int, budget: float, scratch: Path) -> None:
    """Run every side once, one after the other."""
    ours = case.judge.model.log_joint(torch.from_numpy(case.check_points)).detach().numpy()
    data = {**entry_named(case.problem).arrays(), "check_points": case.check_points}
    for side, (python, script) in sides.items():
        if side == "pathfinder" and case.family == "mean_field":
            continue  # its Gaussian has a covariance
        options.say(f"round {repeat + 1}: {case.problem}, {case.family}, {side}")
        if python is None:
            case.answers.setdefault(side, []).append("not installed: use --install-peers")
            continue
        job = _job(side, case, "target", budget, repeat, options.clock)
        # CPU seconds may take several times as long by the wall, which this limit goes by
        limit = 120 + (10 if options.clock == "cpu" else 2.5) * budget * len(job["settings"])
        try:
            answer = ask(python, script, job, data, limit=limit, folder=scratch)
            off = density_offset(ours, answer.log_density)
            if off > _SAME_DENSITY:
                raise BenchmarkError(f"its log density is another one (off by {off:.2g} beyond a constant)")
            case.answers.setdefault(side, []).append(answer)
        except BenchmarkError as error:
            why = "not written for this peer" if "not written for this peer" in str(error) else str(error)
            case.answers.setdefault(side, []).append(why)
            continue
        small = case.problem in _QUICK and case.family == "mean_field" and side != "pathfinder"
        if small and side in ("vifamily auto", "vifamily adam", *PEERS):
            case.speeds.setdefault(side, []).append(_speed(python, script, side, case, data, scratch, repeat))


def _speed(
    python: Path, script: str, side: str, case: Case, data: dict[str, np.ndarray], scratch: Path, repeat: int
) -> float | None:
    """Steps per CPU second of Adam on the mean-field bound with one draw, warm."""
    try:
        job = _job(side, case, "steps", 2.0, repeat, "wall")
        found = ask(python, script, job, data, limit=120, folder=scratch).runs[0].info.get("steps_per_second")
        return None if found is None else float(found)
    except (BenchmarkError, TypeError, ValueError):
        return None


def _judged(case: Case, run: Run) -> list[float]:
    """Bounds at the points of a run; the best of the case is raised where one is better."""
    values = [case.judge.elbo(m, s, near=case.best) for m, s in zip(run.mean, run.scale, strict=True)]
    if values and max(values) > case.best + 1e-3:
        case.best, case.best_from = max(values), f"a run compared here ({run.setting})"
    return values


def _side_row(case: Case, side: str, judged: dict[tuple[str, int, int], list[float]], clock: int) -> dict[str, Any]:
    """One row: medians over repeats of the fastest setting."""
    answers = case.answers[side]
    row: dict[str, Any] = {"benchmark": "solvers", "problem": case.problem, "family": case.family, "side": side}
    row |= {"best_elbo": plain(case.best), "best_from": case.best_from, "reason": None}
    good = [(i, a) for i, a in enumerate(answers) if isinstance(a, Answer)]
    if not good:
        return {**row, "reason": str(answers[0])}
    measured = []
    for index, answer in good:
        found = [_measures(case, run, judged[side, index, k], clock) for k, run in enumerate(answer.runs)]
        measured.append(min(found, key=lambda m: (m["cold"] is None, m["cold"], -m["final_elbo"])))
    for key in ("cold", "warm", "cold_percent", "evaluations", "steps", "compile_seconds", "total_seconds",
                "mean_error", "log_sd_error", "final_gap", "final_mean_error", "final_log_sd_error"):  # fmt: skip
        row[key] = median_and_range([m[key] for m in measured])
    row["memory_mb"] = median_and_range([answer.memory_mb for _, answer in good])
    row["steps_per_second"] = median_and_range(case.speeds[side]) if side in case.speeds else None
    row["setting"], row["stop_reason"] = measured[0]["setting"], measured[0]["stop_reason"]
    known = [m["accurate"] for m in measured if m["accurate"] is not None]
    row["accurate"] = all(known) if known else None
    row["versions"] = good[0][1].versions
    if row["cold"]["median"] is None:
        row["reason"] = measured[0]["ended"] or f"never stayed within {_NATS} nat of the best"
    return row


def _measures(case: Case, run: Run, values: list[float], clock: int) -> dict[str, Any]:
    """What is read off one run: times to the targets, work, and errors there and at the end."""
    gaps = [case.best - v for v in values]
    times = [float(t) for t in run.points[:, clock]]
    at, at_percent = first_time(times, gaps, _NATS), first_time(times, gaps, _PART * abs(case.best))
    warm = run.info.get("warm")
    setup = run.setup[clock]
    out: dict[str, Any] = {
        "cold": None if at is None else times[at], "cold_percent": None if at_percent is None else times[at_percent],
        "warm": None, "evaluations": None, "steps": None, "mean_error": None, "log_sd_error": None,
        "compile_seconds": setup, "setting": run.setting, "stop_reason": run.info.get("stop_reason"),
        "total_seconds": run.info.get("total_cpu_seconds" if clock else "total_seconds"),
        "final_gap": plain(gaps[-1]) if gaps else None, "final_elbo": values[-1] if values else -np.inf,
        "final_mean_error": None, "final_log_sd_error": None, "accurate": None, "ended": run.info.get("ended"),
    }  # fmt: skip
    if at is not None:
        same = isinstance(warm, list) and len(warm) == len(times)
        out["warm"] = float(warm[at][clock]) if same and warm is not None else times[at] - setup
        out["steps"], out["evaluations"] = float(run.points[at, 2]), float(run.points[at, 3])
        there = case.judge.moments(run.mean[at], run.scale[at])
        if there is not None:
            out["mean_error"], out["log_sd_error"] = plain(there.mean), plain(there.log_sd)
    last = case.judge.moments(run.mean[-1], run.scale[-1]) if gaps and gaps[-1] < 10 else None
    if last is not None and case.best_moments is not None:
        out["final_mean_error"], out["final_log_sd_error"] = plain(last.mean), plain(last.log_sd)
        best = case.best_moments
        out["accurate"] = abs(last.mean - best.mean) <= _ACCURATE and abs(last.log_sd - best.log_sd) <= _ACCURATE
    return out


def _rows(case: Case, clock: int) -> tuple[list[dict[str, Any]], list[tuple[str, np.ndarray, np.ndarray]]]:
    """Rows of a case, and its curves for the picture."""
    judged = {
        (side, i, k): _judged(case, run)
        for side, answers in case.answers.items()
        for i, answer in enumerate(answers)
        if isinstance(answer, Answer)
        for k, run in enumerate(answer.runs)
    }
    rows = [_side_row(case, side, judged, clock) for side in case.answers]
    base = next((row["cold"]["median"] for row in rows if row["side"].startswith("vifamily") and row.get("cold")), None)
    for row in rows:
        own = row["cold"]["median"] if row.get("cold") else None
        row["ratio"] = own / base if own is not None and base else None
    curves = []
    for row in rows:
        answer = next((a for a in case.answers[row["side"]] if isinstance(a, Answer)), None)
        if answer is not None:
            i = case.answers[row["side"]].index(answer)
            k = next((k for k, run in enumerate(answer.runs) if run.setting == row["setting"]), 0)
            gaps = case.best - np.array(judged[row["side"], i, k])
            curves.append((row["side"], answer.runs[k].points[:, clock], gaps))
    return rows, curves


def _cases(options: Options) -> Iterator[Case]:
    problems = options.problems or (_QUICK if options.quick else tuple(SUITE))
    families = options.families or (("mean_field",) if options.quick else ("mean_field", "full_rank"))
    for family in families:
        if family not in ("mean_field", "full_rank"):
            raise ConfigError(f"the peers have the families mean_field and full_rank, not {family!r}.")
    for problem in problems:
        entry_named(problem)
    for problem in problems:
        for family in families:
            try:
                yield _case(problem, family)
            except ReferenceDataError as error:
                options.say(f"left out {problem}: {error}")


def _run(options: Options) -> Report:
    if options.clock not in ("wall", "cpu"):
        raise ConfigError(f"the clock is 'wall' or 'cpu', got {options.clock!r}.")
    folder, clock = options.peers_dir or default_folder(), 0 if options.clock == "wall" else 1
    if options.quick and options.peers is None:
        installed = tuple(name for name in PEERS if interpreter(name, folder) is not None)
        options = dataclasses.replace(options, peers=installed)
    sides = _sides(options, folder)
    repeats = options.repeats or (1 if options.quick else 3)
    budget = options.budget or (5.0 if options.quick else 25.0)
    rows: list[dict[str, Any]] = []
    panels = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in _cases(options):
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            for repeat in range(repeats):
                _measure(case, options, sides, repeat, budget, Path(scratch))
            found, curves = _rows(case, clock)
            machine = {"clock": options.clock, "repeats": repeats, "budget": budget, "load": load}
            rows += [{**row, **machine, "cores": os.cpu_count()} for row in found]
            panels.append((f"{case.problem}, {case.family}", curves))
    if not rows:
        raise IncompatibleError("no problem of the benchmark could be run: their data are not on this machine.")
    columns = {
        "problem": "problem", "family": "family", "side": "side", "s to 0.1 nat": "cold", "warm": "warm",
        "s to 1 %": "cold_percent", "ratio": "ratio", "evaluations": "evaluations", "compile s": "compile_seconds",
        "mean error": "mean_error", "log sd error": "log_sd_error", "best of family": "accurate",
        "steps/s": "steps_per_second", "MB": "memory_mb", "remark": "reason",
    }  # fmt: skip
    failed = any(row["side"].startswith("vifamily") and "cold" not in row for row in rows)
    return Report(rows, columns, gap_figure(panels, options.clock), failed)


BENCHMARK = Benchmark("Time to the best Gaussian of a family, against Pyro, NumPyro, PyMC and blackjax.", _run)
"""The benchmark ``solvers``."""
