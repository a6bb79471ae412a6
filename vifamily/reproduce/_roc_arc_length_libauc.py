"""LibAUC on the tasks with rare positives, in an environment of its own and on the same splits and starts."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vifamily.benchmark._environments import AUC_PEERS, default_folder, install, interpreter
from vifamily.benchmark._workers import ask_and_read, read_files
from vifamily.errors import BenchmarkError
from vifamily.reproduce._report import Options
from vifamily.reproduce._roc_arc_length_imbalance import BATCH_SIZE, TASKS, Prepared, auc_of, prepare

__all__ = ["LIBAUC", "NOT_INSTALLED", "libauc_rows"]

LIBAUC = "LibAUC"
NOT_INSTALLED = "LibAUC is not installed: --install-peers creates its environment, in --peers-dir"
_NAME = "libauc"
_VERSION = "v1"
_SECONDS = 300.0
"""Most seconds of one case, for slow machines; the rule of a whole task is that many for each."""
Array = NDArray[np.float64]


def libauc_rows(
    fractions: Sequence[float], seeds: Sequence[int], options: Options, *, max_iter: int
) -> tuple[list[dict[str, Any]], str]:
    """AUC of LibAUC's AUC-margin loss with PESG for every task, fraction and seed.

    Args:
        fractions: Fractions of positives.
        seeds: Seeds of the splits, starts and minibatches.
        options: Where its environment is, and whether to make one.
        max_iter: Number of steps.

    Returns:
        Rows as of the other methods, and an empty string; or no rows and why there are none.
    """
    folder = options.peers_dir or default_folder()
    try:
        if options.install_peers:
            install((_NAME,), folder)
        python = interpreter(_NAME, folder)
        if python is None:
            return [], NOT_INSTALLED
        rows: list[dict[str, Any]] = []
        for task, make in TASKS.items():
            at = [(fraction, seed) for fraction in fractions for seed in seeds]

            def computed(task: str = task, make: Any = make, at: Any = at) -> list[dict[str, Any]]:
                aucs = _aucs(python, [(prepare(make(fraction, seed), seed), seed) for fraction, seed in at], max_iter)
                return [
                    {"task": task, "fraction": fraction, "seed": seed, "method": LIBAUC, "auc": auc}
                    for (fraction, seed), auc in zip(at, aucs, strict=True)
                ]

            name = f"{LIBAUC}: {task}, {len(at)} splits"
            rows += options.rows(name, computed, at=at, max_iter=max_iter, version=_VERSION)
    except BenchmarkError as error:
        return [], str(error)
    return rows, ""


def _aucs(python: Path, cases: Sequence[tuple[Prepared, int]], max_iter: int) -> list[float]:
    """AUC of each case; one process does them all."""
    job = {
        "seeds": [seed for _, seed in cases], "max_iter": max_iter, "batch_size": BATCH_SIZE, "version": _VERSION,
    }  # fmt: skip
    data = {f"{i}/{name}": value for i, (case, _) in enumerate(cases) for name, value in _arrays(case).items()}
    sizes = [tuple(len(x) for x in case.tests) for case, _ in cases]
    with tempfile.TemporaryDirectory() as scratch:
        scores = ask_and_read(
            python, AUC_PEERS[_NAME].script, job, data, limit=_SECONDS * len(cases), folder=Path(scratch),
            read=functools.partial(read_scores, sizes=sizes),
        )  # fmt: skip
    return [auc_of(*pair) for pair in scores]


def _arrays(case: Prepared) -> dict[str, Array]:
    """A case as the worker reads it; the output is one more layer there."""
    layers = len([name for name in case.start if name.startswith("weights.")])
    arrays = {
        "pos": case.pos.x, "neg": case.neg.x, "held_pos": case.held[0].x, "held_neg": case.held[1].x,
        "test_pos": case.tests[0], "test_neg": case.tests[1],
        **{f"weight{i}": case.start[f"weights.{i}"] for i in range(layers)},
        **{f"bias{i}": case.start[f"biases.{i}"] for i in range(layers)},
        f"weight{layers}": case.start["last"].unsqueeze(0), f"bias{layers}": case.start["offset"].unsqueeze(0),
    }  # fmt: skip
    return {name: value.numpy() for name, value in arrays.items()}


def read_scores(folder: Path, *, sizes: Sequence[tuple[int, ...]]) -> list[tuple[Array, Array]]:
    """Read and check scores of positives and negatives of every case.

    Args:
        folder: Where the worker left its answer.
        sizes: Numbers of positives and negatives of each case.

    Raises:
        BenchmarkError: If a file is missing or damaged, or scores are missing, not numbers or of another number.
    """
    _, arrays = read_files(folder)
    found = []
    for i, each in enumerate(sizes):
        pair = []
        for name, size in zip(("test_pos", "test_neg"), each, strict=True):
            scores = arrays.get(f"{i}/{name}")
            if scores is None or scores.dtype != np.float64 or scores.shape != (size,) or not np.isfinite(scores).all():
                raise BenchmarkError(f"the worker's scores {i}/{name} must be {size} finite numbers.")
            pair.append(scores)
        found.append((pair[0], pair[1]))
    return found
