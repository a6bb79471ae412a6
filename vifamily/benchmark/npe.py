"""Neural posterior estimation on the same simulations: time of training and accuracy, beside sbi's.

How the comparison is done, and its rules, are in the documentation under "Benchmarks".
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributions import Distribution, Independent, MultivariateNormal, Uniform

from vifamily.benchmark._environments import NPE_PEERS, default_folder, install, interpreter
from vifamily.benchmark._report import Benchmark, Options, Report, median_and_range
from vifamily.benchmark._workers import ask_and_read, read_files
from vifamily.diagnostics import c2st
from vifamily.errors import BenchmarkError, ConfigError, ReferenceDataError
from vifamily.problems._sbibm_tasks import TASKS, Observation, observations
from vifamily.rng import split

__all__ = ["BENCHMARK", "Measured", "prior_values", "read_measured"]

_OWN = "vifamily"
_FAMILY = "flow(kind='nsf')"
_SIMULATIONS, _QUICK_SIMULATIONS = 10_000, 500
_DRAWS, _QUICK_DRAWS = 2000, 200
_BUDGET = 7200.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side did once.

    Attributes:
        draws: Draws at each observation, ``(observation, draw, dim)``.
        training: Wall and CPU seconds of building and training.
        drawing: Wall and CPU seconds of all draws.
        epochs: Passes over the simulations.
        setting: The setting in words.
        memory_mb: Peak memory of the process.
        versions: Versions of what ran.
        accuracies: Accuracy of the classifier at each observation, once it was judged.
    """

    draws: np.ndarray
    training: tuple[float, float]
    drawing: tuple[float, float]
    epochs: int
    setting: str
    memory_mb: float
    versions: dict[str, str]
    accuracies: tuple[float, ...] = ()


def read_measured(folder: Path, shape: tuple[int, int, int]) -> Measured:
    """Read and check a worker's answer.

    Args:
        folder: Where it is.
        shape: Shape that the draws must have.

    Raises:
        BenchmarkError: If a file is missing or damaged, or shapes or numbers cannot be right.
    """
    content, arrays = read_files(folder)
    try:
        draws = arrays["draws"]
        if draws.dtype != np.float64 or draws.shape != shape or not np.isfinite(draws).all():
            raise BenchmarkError(f"the worker's draws must be finite float64 of shape {shape}, got {draws.shape}.")
        seconds = [tuple(float(v) for v in content[key]) for key in ("training", "drawing")]
        if any(len(pair) != 2 or not all(math.isfinite(v) and v >= 0 for v in pair) for pair in seconds):
            raise BenchmarkError("the worker's times must be two positive numbers each.")
        training, drawing = seconds
        versions = {str(k): str(v) for k, v in dict(content["versions"]).items()}
        return Measured(draws, (training[0], training[1]), (drawing[0], drawing[1]), int(content["epochs"]),
                        str(content["setting"]), float(content["memory_mb"]), versions)  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchmarkError(f"the worker's answer lacks or garbles what it must hold: {error!r}.") from error


def prior_values(prior: Distribution) -> dict[str, Any]:
    """Return a box or a normal prior as plain values, for a worker that has torch only.

    Raises:
        ConfigError: If it is another law.

    Example:
        >>> import torch
        >>> prior_values(Independent(Uniform(-torch.ones(2), torch.ones(2)), 1))
        {'kind': 'box', 'low': [-1.0, -1.0], 'high': [1.0, 1.0]}
    """
    inner = prior.base_dist if isinstance(prior, Independent) else prior
    if isinstance(inner, Uniform):
        return {"kind": "box", "low": inner.low.tolist(), "high": inner.high.tolist()}
    if isinstance(prior, MultivariateNormal):
        return {"kind": "normal", "mean": prior.loc.tolist(), "covariance": prior.covariance_matrix.tolist()}
    raise ConfigError(f"a peer is given a box or a normal prior, not {type(prior).__name__}.")


@dataclasses.dataclass
class _Case:
    """One task: its simulations, its reference posteriors and what every side did, one entry per round."""

    name: str
    job: dict[str, Any]
    data: dict[str, np.ndarray]
    places: Sequence[Observation]
    answers: dict[str, list[Measured | str]] = dataclasses.field(default_factory=dict)


def _case(name: str, folder: Path, simulations: int, draws: int) -> _Case:
    """Simulate once; every side reads these pairs."""
    simulator, places = TASKS[name].make(), observations(folder, name)
    pairs = simulator.simulations(simulations, seed=split(0, f"benchmark/npe/{name}", simulations))
    draws = min(draws, *(len(place.draws) for place in places))
    data = {
        "theta": pairs.theta.numpy(), "x": pairs.x.numpy(),
        "observations": np.stack([place.x.numpy() for place in places]),
    }  # fmt: skip
    job = {
        "task": name,
        "family": _FAMILY,
        "draws": draws,
        "prior": prior_values(next(iter(simulator.prior.parts.values()))),
    }
    return _Case(name, job, data, places)


def _measure(
    case: _Case, sides: dict[str, tuple[Path | None, str]], number: int, options: Options, scratch: Path
) -> None:
    """Let every side run once, one after the other, and judge its draws."""
    shape = (len(case.places), case.job["draws"], case.data["theta"].shape[1])
    for side, (python, script) in sides.items():
        options.say(f"round {number + 1}: {case.name}, {side}")
        found = case.answers.setdefault(side, [])
        if python is None:
            found.append("not installed: use --install-peers")
            continue
        job = {**case.job, "method": side, "seed": number}
        try:
            answer = ask_and_read(
                python, script, job, case.data, limit=options.budget or _BUDGET, folder=scratch,
                read=lambda place: read_measured(place, shape),
            )  # fmt: skip
        except BenchmarkError as error:
            found.append(str(error))
            continue
        wall, cpu = answer.training
        options.say(f"  {wall:.0f} s, {cpu:.0f} of them of the processor, {answer.epochs} epochs; judging")
        judged = tuple(
            c2st(place.draws[: shape[1]], draws, seed=number).value
            for place, draws in zip(case.places, answer.draws, strict=True)
        )
        found.append(dataclasses.replace(answer, accuracies=judged))


def _row(case: _Case, side: str, simulations: int, clock: int) -> dict[str, Any]:
    """One row: medians over rounds."""
    bound = TASKS[case.name].bound if simulations == _SIMULATIONS else None
    row: dict[str, Any] = {
        "benchmark": "npe", "task": case.name, "simulations": simulations, "side": side, "draws": case.job["draws"],
        "observations": [place.number for place in case.places], "bound": bound, "reason": None,
    }  # fmt: skip
    answers = [answer for answer in case.answers[side] if isinstance(answer, Measured)]
    if len(answers) < len(case.answers[side]):
        return {**row, "reason": next(a for a in case.answers[side] if isinstance(a, str))}
    row["seconds"] = median_and_range([answer.training[clock] for answer in answers])
    for key, index in (("wall_seconds", 0), ("cpu_seconds", 1)):
        row[key] = median_and_range([answer.training[index] for answer in answers])
    row["drawing_seconds"] = median_and_range([answer.drawing[clock] for answer in answers])
    row["epochs"] = median_and_range([float(answer.epochs) for answer in answers])
    row["memory_mb"] = median_and_range([answer.memory_mb for answer in answers])
    row["c2st"] = median_and_range([statistics.fmean(answer.accuracies) for answer in answers])
    row["c2st_each"] = [statistics.median(values) for values in zip(*(a.accuracies for a in answers), strict=True)]
    row["within_bound"] = None if bound is None else row["c2st"]["median"] <= bound
    row["setting"], row["versions"] = answers[0].setting, answers[0].versions
    return row


def _rows(case: _Case, simulations: int, clock: int) -> list[dict[str, Any]]:
    rows = [_row(case, side, simulations, clock) for side in case.answers]
    own = next((row["seconds"]["median"] for row in rows if row["side"] == _OWN and row["reason"] is None), None)
    for row in rows:
        row["ratio"] = row["seconds"]["median"] / own if own and row["reason"] is None else None
    return rows


def _folder(options: Options) -> Path:
    if options.data is not None:
        return options.data
    where = os.environ.get("VIFAMILY_REFERENCE_DATA")
    if where is None:
        raise ReferenceDataError("the reference posteriors are not here: give their folder as --data.")
    return Path(where) / "sbibm"


def _sides(options: Options) -> dict[str, tuple[Path | None, str]]:
    folder = options.peers_dir or default_folder()
    wanted = tuple(NPE_PEERS) if options.peers is None else options.peers
    for name in wanted:
        if name not in NPE_PEERS:
            raise ConfigError(f"there is no peer {name!r} here: choose among {', '.join(NPE_PEERS)}, or none.")
    if options.install_peers:
        install(wanted, folder)
    sides: dict[str, tuple[Path | None, str]] = {_OWN: (Path(sys.executable), "vifamily_npe")}
    return {**sides, **{name: (interpreter(name, folder), NPE_PEERS[name].script) for name in wanted}}


def _run(options: Options) -> Report:
    """Measure every task; the sides take turns."""
    if options.clock not in ("wall", "cpu"):
        raise ConfigError(f"the clock is 'wall' or 'cpu', got {options.clock!r}.")
    names = options.tasks or (("two_moons",) if options.quick else tuple(TASKS))
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"there is no task {name!r}: choose among {', '.join(TASKS)}.")
    sides, folder, clock = _sides(options), _folder(options), 0 if options.clock == "wall" else 1
    simulations = options.simulations or (_QUICK_SIMULATIONS if options.quick else _SIMULATIONS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            case = _case(name, folder, simulations, _QUICK_DRAWS if options.quick else _DRAWS)
            rounds = options.repeats or (1 if options.quick else 3)
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            for number in range(rounds):
                _measure(case, sides, number, options, Path(scratch))
            machine = {"clock": options.clock, "repeats": rounds, "threads": 1, "load": load, "cores": os.cpu_count()}
            rows += [{**row, **machine} for row in _rows(case, simulations, clock)]
    columns = {
        "task": "task", "side": "side", "wall s": "wall_seconds", "CPU s": "cpu_seconds", "ratio": "ratio",
        "C2ST": "c2st", "bound": "bound", "epochs": "epochs", "draws s": "drawing_seconds", "reason": "reason",
    }  # fmt: skip
    failed = any(row["side"] == _OWN and (row["reason"] or row.get("within_bound") is False) for row in rows)
    return Report(rows, columns, failed=failed)


BENCHMARK = Benchmark("Neural posterior estimation on the same simulations, beside sbi: time and accuracy.", _run)
"""The benchmark ``npe``."""
