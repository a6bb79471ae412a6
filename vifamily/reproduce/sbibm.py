"""Neural posterior estimation on the benchmark of simulation-based inference (Lueckmann et al. 2021)."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

from vifamily.diagnostics import c2st
from vifamily.errors import ReferenceDataError
from vifamily.fit import fit
from vifamily.problems._sbibm_tasks import TASKS, observations
from vifamily.reproduce._parts import digest
from vifamily.reproduce._report import Claim, Options, Paper, Reproduction
from vifamily.rng import split

__all__ = ["PAPER"]

_DRAWS, _QUICK_DRAWS = 2000, 500
_FAMILY = "flow(kind='nsf')"


def run(options: Options) -> Reproduction:
    """Fit every task and compare with the reference posteriors.

    Args:
        options: ``data`` is the folder with the npz files; None looks where ``VIFAMILY_REFERENCE_DATA`` points.
            ``quick`` takes two tasks, a thousand simulations and 500 draws.
    """
    folder = _folder(options)
    if folder is None:
        missing = "the reference posteriors are not here: give their folder as --data"
        return Reproduction(
            [Claim(_claim(name, 10_000), task.published[10_000], None, None, None, missing)
             for name, task in TASKS.items()]
        )  # fmt: skip
    tasks = ("two_moons", "gaussian_linear") if options.quick else tuple(TASKS)
    sizes = (1000,) if options.quick else (1000, 10_000)
    claims, rows = [], []
    for name in tasks:
        for size in sizes:
            draws = _QUICK_DRAWS if options.quick else _DRAWS
            found = options.rows(
                f"{name}: {size} simulations",
                functools.partial(measure, name, size, folder, options.seed, draws),
                seed=options.seed, draws=draws, data=digest(folder.glob(f"{name}*")),
            )  # fmt: skip
            rows += found
            claims.append(_judged(name, size, found))
    return Reproduction(claims, {}, {"sbibm": rows})


def _folder(options: Options) -> Path | None:
    if options.data is not None:
        if not options.data.is_dir():
            raise ReferenceDataError(f"there is no folder {str(options.data)!r}: give the one with the npz files.")
        return options.data
    where = os.environ.get("VIFAMILY_REFERENCE_DATA")
    found = None if where is None else Path(where) / "sbibm"
    return found if found is not None and found.is_dir() else None


def measure(name: str, size: int, folder: Path, seed: int, num_draws: int) -> list[dict[str, Any]]:
    """Fit one task once, and tell its posteriors from the reference by a classifier, one row per observation.

    Args:
        name: The task.
        size: Number of simulations.
        folder: Folder of the reference posteriors.
        seed: Root seed.
        num_draws: Draws of each posterior that are compared.
    """
    places = observations(folder, name)
    posterior = fit(
        TASKS[name].make(), _FAMILY, f"inclusive_kl(simulations={size})", seed=split(seed, f"sbibm/{name}", size),
        progress=False,
    )  # fmt: skip
    rows = []
    for place in places:
        draws = posterior(place.x).columns(num_draws)  # type: ignore[operator]
        found = c2st(place.draws[:num_draws], draws, seed=seed)
        rows.append({
            "task": name, "simulations": size, "observation": place.number, "draws": num_draws,
            "c2st": found.value, "c2st_error": found.error, "seconds": posterior.record.seconds,
            "steps": posterior.record.steps, "holdout": posterior.record.restart_losses[0],
        })  # fmt: skip
    return rows


def _claim(name: str, size: int) -> str:
    return f"{name}: classifier accuracy (0.5 is perfect) at {size:,} simulations"


def _judged(name: str, size: int, rows: list[dict[str, Any]]) -> Claim:
    task, values = TASKS[name], [row["c2st"] for row in rows]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
    bound = task.bound if size == 10_000 and task.bound is not None else task.published[size] + 0.03
    rule = (
        f"mean over {len(values)} observations at most {bound:.3g}, {rows[0]['draws']} draws each (published: ten "
        f"observations, 10,000 draws); fitted in {rows[0]['seconds']:.0f} s"
    )
    return Claim(_claim(name, size), task.published[size], mean, spread, mean <= bound, rule)


PAPER = Paper(
    "Benchmarking Simulation-Based Inference", "Lueckmann, Boelts, Greenberg, Goncalves and Macke, AISTATS 2021", run
)
