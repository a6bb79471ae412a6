"""Runs the cells of a comparison: in parallel, resumable, and past the failure of any one of them."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import PicklingError
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from vifamily.compare.cells import Cell, Outcome, load, store
from vifamily.compare.cluster import run_on
from vifamily.errors import ConfigError, IncompatibleError, VifamilyError

__all__ = ["Runner", "run_grid"]

Runner = Callable[[Cell], Outcome]
Report = Callable[[Outcome, int, int], None]
Place = tuple[str, str, str, int]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one torch thread, so that a result does not depend on how many cells run beside it; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, VifamilyError) else f"{type(error).__name__}: {text}"


def attempt(cell: Cell, runner: Runner, folder: Path | None, key: str) -> Outcome:
    """Run one cell and keep its outcome; what goes wrong becomes the outcome's reason."""
    started = time.perf_counter()
    try:
        with one_thread():
            outcome = runner(cell)
    except IncompatibleError as error:
        outcome = Outcome.of(cell, status="not possible", reason=_one_line(error))
    except Exception as error:  # one cell must not take the grid down with it
        seconds = time.perf_counter() - started
        outcome = Outcome.of(cell, status="failed", reason=_one_line(error), values={"seconds": seconds})
    if folder is not None:
        store(folder, cell, outcome, key)
    return outcome


def attempt_all(cells: Sequence[Cell], runner: Runner, folder: Path | None, keys: Mapping[Place, str]) -> list[Outcome]:
    """Run cells that differ in their seed alone, side by side where the runner can; each is kept as by :func:`attempt`.

    What goes wrong with all of them at once is left to each alone to meet again, and to tell.
    """
    runners = [runner] * len(cells)
    together = getattr(runner, "together", None)
    if together is not None and len(cells) > 1:
        with contextlib.suppress(Exception), one_thread():
            runners = together(cells)
    return [attempt(cell, one, folder, keys[cell.place]) for cell, one in zip(cells, runners, strict=True)]


def batches_of(cells: Sequence[Cell], workers: int, *, vectorise: bool) -> list[list[Cell]]:
    """Return what is run as one: cells that differ in their seed alone, in as many parts as keep all workers busy.

    Example:
        >>> cells = [Cell("p", "f", "o", seed) for seed in range(5)]
        >>> [[cell.seed for cell in batch] for batch in batches_of(cells, 2, vectorise=True)]
        [[0, 1, 2], [3, 4]]
    """
    if not vectorise:
        return [[cell] for cell in cells]
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.place[:3], []).append(cell)
    parts = -(-workers // max(1, len(groups)))
    out = []
    for group in groups.values():
        size = -(-len(group) // parts)
        out += [group[i : i + size] for i in range(0, len(group), size)]
    return out


def num_jobs(jobs: Any, pending: int) -> int:
    """Return how many cells run at once: as many as asked for or as there are cores, never more than cells.

    Raises:
        ConfigError: If ``jobs`` is not a positive integer or -1.
    """
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or not (jobs >= 1 or jobs == -1)):
        raise ConfigError(f"jobs must be a positive integer, or -1 for all cores, got {jobs!r}.")
    cores = int(joblib.cpu_count(only_physical_cores=False))
    return max(1, min(cores if jobs in (None, -1) else jobs, pending))


def run_grid(
    cells: Sequence[Cell],
    runner: Runner,
    *,
    folder: Path | None = None,
    versions: Mapping[str, str] | None = None,
    jobs: int | None = None,
    resume: bool = True,
    vectorise: bool = False,
    client: Any = None,
    report: Report | None = None,
) -> list[Outcome]:
    """Run the cells that are not finished yet.

    Args:
        cells: The grid.
        runner: From a cell to its outcome; sent to worker processes when ``jobs`` is above one.
        folder: Where finished cells are kept, one JSON file each; None keeps nothing.
        versions: Part of each cell's key.
        jobs: Cells at once; None for one per core. One runs everything in this process.
        resume: Take finished cells from the folder.
        vectorise: Hand cells that differ in their seed alone to the runner's ``together``, where it has one.
        client: A ``dask.distributed`` client whose workers run the cells; None runs them on this machine. Finished
            cells are kept by this process, not by the workers.
        report: Called after each cell with its outcome, how many are done, and how many there are.

    Returns:
        One outcome per cell, in their order.

    Raises:
        ConfigError: If the folder cannot be written to, or a cell cannot be sent to a worker.
        KeyboardInterrupt: Passed on; cells finished by then are kept.
    """
    keys = {cell.place: cell.key(versions or {}) for cell in cells}
    if folder is not None:
        _check_folder(folder)
    done: dict[Place, Outcome] = {}

    def finish(outcome: Outcome) -> None:
        done[outcome.place] = outcome
        if report is not None:
            report(outcome, len(done), len(cells))

    for cell in cells:
        kept = load(folder, cell, keys[cell.place]) if folder is not None and resume and cell.resumable else None
        if kept is not None:
            finish(kept)
    pending = [cell for cell in cells if cell.place not in done]

    def lost(cell: Cell) -> None:
        outcome = Outcome.of(cell, status="failed", reason="the worker process died; it may have run out of memory.")
        if folder is not None:
            store(folder, cell, outcome, keys[cell.place])
        finish(outcome)

    if client is not None:
        # jobs is checked even where the cluster decides; at least one task for each of its threads
        num_jobs(jobs, len(pending))
        threads = sum(client.ncores().values()) if jobs in (None, -1) else int(jobs or 1)
        workers = max(1, min(threads, len(pending)))
        run = functools.partial(_run_cluster, client, runner=runner, folder=folder, keys=keys, jobs=jobs, finish=finish)
    else:
        workers = num_jobs(jobs, len(pending))
        # two, so that a cell on its own runs in a process of its own as well
        run = functools.partial(
            _run_parallel, runner=runner, folder=folder, keys=keys, workers=max(2, workers), finish=finish
        )
    batches = batches_of(pending, workers, vectorise=vectorise)
    if client is None and workers == 1:
        for batch in batches:
            for outcome in attempt_all(batch, runner, folder, keys):
                finish(outcome)
    else:
        run(batches)
        # a worker that died took its neighbours with it: those left are tried one by one, to find the one to blame
        for cell in [cell for cell in pending if cell.place not in done]:
            run([[cell]])
            if cell.place not in done:
                lost(cell)
    return [done[cell.place] for cell in cells]


def _run_cluster(
    client: Any,
    batches: Sequence[Sequence[Cell]],
    *,
    runner: Runner,
    folder: Path | None,
    keys: Mapping[Place, str],
    jobs: int | None,
    finish: Callable[[Outcome], None],
) -> None:
    cells = {cell.place: cell for batch in batches for cell in batch}
    # workers keep nothing: their disks need not be this machine's
    for outcomes in run_on(client, batches, attempt_all, runner, None, dict(keys), jobs=jobs):
        for outcome in outcomes:
            if folder is not None:
                store(folder, cells[outcome.place], outcome, keys[outcome.place])
            finish(outcome)


def _run_parallel(
    batches: Sequence[Sequence[Cell]],
    *,
    runner: Runner,
    folder: Path | None,
    keys: Mapping[Place, str],
    workers: int,
    finish: Callable[[Outcome], None],
) -> None:
    # batch_size=1: cells take seconds, and each must be reported and kept as soon as it is done
    pool = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    tasks = (joblib.delayed(attempt_all)(batch, runner, folder, keys) for batch in batches)
    try:
        with contextlib.suppress(TerminatedWorkerError):
            for outcomes in pool(tasks):
                for outcome in outcomes:
                    finish(outcome)
    except PicklingError as error:
        raise ConfigError(
            f"an object of the comparison cannot be sent to another process ({_one_line(error.__cause__ or error)}). "
            "Pass jobs=1 to run every cell in this process."
        ) from error


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder}: {error.strerror or error}. Choose another out=."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"the folder {folder} is not writable. Choose another out=, or change its permissions.")
