"""Every objective and family on the same targets, noise and budget."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vifamily import registry
from vifamily.compare.alpha import AlphaChoice, AlphaRow, choose_alpha
from vifamily.compare.cells import Cell, Outcome, plain
from vifamily.compare.cluster import client_of
from vifamily.compare.grid import run_grid
from vifamily.compare.labels import Item, items, split_specs
from vifamily.compare.measure import Target, as_problem, fingerprint, fit_cell, fit_cells, target_of
from vifamily.compare.metrics import MEASURES, METRICS, metric_names
from vifamily.compare.reporting import Report, reporter
from vifamily.compare.result import Comparison
from vifamily.errors import ConfigError, SpecError, VifamilyError
from vifamily.rng import check_seed

__all__ = [
    "DEFAULTS",
    "MEASURES",
    "METRICS",
    "AlphaChoice",
    "AlphaRow",
    "Cell",
    "Comparison",
    "Outcome",
    "Target",
    "choose_alpha",
    "compare",
    "split_specs",
]

DEFAULTS: dict[str, Any] = {
    "problems": ("banana", "correlated_normal", "eight_schools"),
    "families": ("mean_field", "full_rank", "flow(kind=maf)"),
    "objectives": ("elbo", "renyi(alpha=0.5)"),
    "seeds": 1,
    "steps": 1000,
    "metrics": ("arc_length",),
}
"""What ``vifamily compare`` runs when nothing is named: cut off at a number of steps, to be done in about a minute."""


def compare(
    problems: Any = DEFAULTS["problems"],
    families: Any = ("mean_field", "full_rank"),
    objectives: Any = ("elbo",),
    *,
    seeds: int | Iterable[int] = 3,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    steps: int | None = None,
    time_limit: float | None = None,
    draws: int | None = None,
    solver: str = "adam",
    metrics: str | Iterable[str] | None = DEFAULTS["metrics"],
    progress: bool | Report | None = None,
    resume: bool = True,
    vectorise: bool = True,
    cluster: Any = None,
) -> Comparison:
    """Fit every combination of problem, family, objective and seed, and measure each against what is known.

    For each seed, all methods get the same target, the same root seed (so the same noise stream and start), the same
    draws per step and the same budget. A cell that fails, or that cannot be, is reported with its reason; the others go
    on.

    Args:
        problems: Names such as ``"eight_schools"``, problems, or models (then without reference). A string may list
            several, separated by commas.
        families: Specs such as ``"low_rank(rank=2)"``, or entries, guides and modules as ``fit`` takes them.
        objectives: Specs such as ``"renyi(alpha=0.5)"``, or entries.
        seeds: How many seeds, counted from 0, or the seeds themselves.
        out: Folder for the files of :meth:`Comparison.save` and for finished cells (``cells/``). A run that was killed
            goes on from there; a cell whose configuration or problem changed is computed anew. None keeps nothing.
        jobs: Cells at once, each in a process with one thread; None for one per core. 1 stays in this process. A
            ``joblib.parallel_config`` around the call chooses another backend.
        steps: Most steps of each fit; None leaves it to the stopping rule.
        time_limit: Most seconds of each fit.
        draws: Draws per step; None takes the largest default among the objectives, for all of them.
        solver: A solver's spec.
        metrics: Metrics against reference draws beside the standard ones, by name: ``"arc_length"`` (a fraction of a
            second for each cell) and ``"c2st"`` (seconds to a minute, more with more quantities); None for neither.
        progress: True for a progress line, None for one on a terminal only, or a function called with each outcome, the
            number done and the number of cells.
        resume: Take finished cells from ``out``.
        vectorise: Step the seeds of a cell side by side in one program where that can be (``adam``, all data, no
            ``time_limit``); each gets what it gets alone, up to rounding, and ``seconds`` is its share of the time.
            False fits them one by one.
        cluster: A ``dask.distributed`` client or cluster, or a scheduler's address: its workers run the cells. None
            runs them here, or on the cluster of ``joblib.parallel_config(backend="dask")`` around the call.

    Returns:
        The comparison: prints as a table, and gives figures, JSON, CSV and an HTML page.

    Raises:
        UnknownNameError: If a name is not registered.
        SpecError: If a spec cannot be read or its arguments do not fit.
        ConfigError: If an axis is empty or names something twice, a number is out of range, a metric is not known, or
            ``out`` cannot be written to.
        MissingExtraError: If ``cluster`` is given and ``dask.distributed`` is not installed.

    Example:
        >>> result = compare("banana", "mean_field", "elbo", seeds=1, steps=30, jobs=1)
        >>> [(cell.status, cell.values["steps"]) for cell in result.cells]
        [('ok', 30)]
    """
    axes = {
        kind: items(kind, value)
        for kind, value in (("problems", problems), ("families", families), ("objectives", objectives))
    }
    numbers, chosen_metrics = _seeds(seeds), metric_names(metrics)
    settings = _settings(axes["objectives"], steps=steps, time_limit=time_limit, draws=draws, solver=solver)
    folder = None if out is None else Path(out)
    cells, targets, broken = _cells(axes, numbers, settings, chosen_metrics)
    config: dict[str, Any] = {kind: [item.label for item in chosen] for kind, chosen in axes.items()}
    versions = _versions()
    config |= {"seeds": numbers, **settings, "metrics": chosen_metrics, "versions": versions}
    with reporter(progress, len(cells)) as report, _client(cluster) as client:
        outcomes = run_grid(
            cells,
            _Runner(broken),
            folder=None if folder is None else folder / "cells",
            versions=versions,
            jobs=jobs,
            resume=resume,
            vectorise=vectorise,
            client=client,
            report=report,
        )
    comparison = Comparison(tuple(outcomes), plain(config), targets)
    if folder is not None:
        comparison.save(folder)
    return comparison


@dataclasses.dataclass(frozen=True)
class _Runner:
    """Fits a cell, or says why its problem could not be built."""

    broken: Mapping[str, str]

    def __call__(self, cell: Cell) -> Outcome:
        if cell.problem in self.broken:
            raise VifamilyError(self.broken[cell.problem])
        return fit_cell(cell)

    def together(self, cells: Sequence[Cell]) -> Sequence[Callable[[Cell], Outcome]]:
        """Begin cells that differ in their seed alone, and return what finishes each."""
        return [self] * len(cells) if cells[0].problem in self.broken else fit_cells(cells)


@contextlib.contextmanager
def _client(cluster: Any) -> Iterator[Any]:
    client, ours = client_of(cluster)
    try:
        yield client
    finally:
        if ours:
            client.close()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("vifamily", "torch", "zuko", "pyro-ppl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source folder without installing it
            found[name] = "not installed"
    return found


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    if isinstance(seeds, (int, np.integer)) and not isinstance(seeds, bool):
        if seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {seeds}.")
        return list(range(int(seeds)))
    if isinstance(seeds, (str, bool)) or not isinstance(seeds, Iterable):
        raise ConfigError(f"seeds must be a number of seeds or a list of them, got {seeds!r}.")
    out = [check_seed(seed) for seed in seeds]
    if not out or len(set(out)) != len(out):
        raise ConfigError(f"seeds must be distinct and at least one, got {out}.")
    return out


def _settings(objectives: Sequence[Item], *, steps: Any, time_limit: Any, draws: Any, solver: str) -> dict[str, Any]:
    for name, value in (("steps", steps), ("draws", draws)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
            raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    if time_limit is not None and not (isinstance(time_limit, (int, float)) and time_limit > 0):
        raise ConfigError(f"time_limit must be a positive number of seconds, got {time_limit!r}.")
    registry.build("solvers", solver)
    if draws is None:
        built = [registry.build("objectives", item.label) if item.given is None else item.given for item in objectives]
        draws = max(max(getattr(o, "default_draws", 1), getattr(o, "min_draws", 1)) for o in built)
    return {"solver": solver, "draws": int(draws), "steps": steps, "time_limit": time_limit}


def _cells(
    axes: Mapping[str, Sequence[Item]], seeds: Sequence[int], settings: Mapping[str, Any], metrics: tuple[str, ...]
) -> tuple[list[Cell], dict[str, Target], dict[str, str]]:
    cells: list[Cell] = []
    targets: dict[str, Target] = {}
    broken: dict[str, str] = {}
    for problem in axes["problems"]:
        mark = ""
        try:
            built = as_problem(problem.label if problem.given is None else problem.given)
            mark = fingerprint(built)
            targets[problem.label] = target_of(problem.label, built)
        except (ConfigError, SpecError):
            raise
        except Exception as error:  # data that are not there, a model that raises: those cells say so
            broken[problem.label] = " ".join(str(error).split()) or type(error).__name__
        for family in axes["families"]:
            for objective in axes["objectives"]:
                chosen = {"problem": problem, "family": family, "objective": objective}
                given = {axis: item.given for axis, item in chosen.items() if item.given is not None}
                # a problem given as an object is pinned down by its fingerprint
                resumable = family.resumable and objective.resumable and (problem.resumable or bool(mark))
                cells += [
                    Cell(problem.label, family.label, objective.label, seed, settings, mark, given, resumable, metrics)
                    for seed in seeds
                ]
    return cells, targets, broken
