"""Hands a job to a process of its own and reads what it answers; nothing that comes back is trusted unread."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vifamily.errors import BenchmarkError

__all__ = ["Answer", "Run", "ask", "ask_and_read", "ask_rows", "read_answer", "read_files"]

_FOLDER = Path(__file__).resolve().parent
_MOST_BYTES = 2**31
_OWN = ("vifamily_fit", "vifamily_npe", "pyro_svi")
"""Workers that run in this interpreter and import this package."""
_Read = TypeVar("_Read")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one setting of one side went through.

    Attributes:
        setting: The setting in words.
        setup: Wall and CPU seconds of building and compiling.
        points: ``(point, 4)``: wall seconds, CPU seconds, steps, log-density evaluations.
        mean: ``(point, dim)``.
        scale: ``(point, dim)`` or ``(point, dim, dim)``.
        info: Further plain values.
    """

    setting: str
    setup: tuple[float, float]
    points: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a worker answered.

    Attributes:
        runs: One for each setting.
        log_density: Its log density at the points of the job.
        memory_mb: Peak memory of the process.
        versions: Versions of what ran.
    """

    runs: tuple[Run, ...]
    log_density: np.ndarray
    memory_mb: float
    versions: dict[str, str]


def _environment() -> dict[str, str]:
    """One thread for everybody, float64 and CPU for JAX and PyTensor."""
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    flags = {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "NPROC": "1", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1",
        "PYTENSOR_FLAGS": "floatX=float64", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    return {**os.environ, **one, **flags, "PYTHONPATH": str(_FOLDER.parents[1])}


def ask(
    interpreter: Path, script: str, job: dict[str, Any], data: dict[str, np.ndarray], *, limit: float, folder: Path
) -> Answer:
    """Run a worker and read its answer.

    Args:
        interpreter: The Python that runs it.
        script: Name of a script in the folder of workers, or a path of one (for tests and peers of one's own).
        job: What it is to do.
        data: Arrays that it gets; ``check_points`` among them.
        limit: Most seconds for everything.
        folder: Where scratch files go.

    Raises:
        BenchmarkError: If it cannot be started, fails, takes too long or answers something that cannot be used.
    """
    read = functools.partial(read_answer, dim=int(job["dim"]), settings=len(job["settings"]))
    return ask_and_read(interpreter, script, job, data, limit=limit, folder=folder, read=read)


def ask_and_read(
    interpreter: Path,
    script: str,
    job: dict[str, Any],
    data: dict[str, np.ndarray],
    *,
    limit: float,
    folder: Path,
    read: Callable[[Path], _Read],
) -> _Read:
    """Run a worker, and read what it left in its folder by ``read``; as :func:`ask` otherwise.

    Raises:
        BenchmarkError: As :func:`ask`.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        _work(interpreter, script, job, data, limit, place)
        return read(place)


def ask_rows(
    interpreter: Path, script: str, job: dict[str, Any], *, limit: float, folder: Path
) -> list[dict[str, float]]:
    """Run a worker that times pieces of code, and read its rows of seconds by name.

    Args:
        interpreter: The Python that runs it.
        script: Name of a script in the folder of workers, or a path of one.
        job: What it is to do.
        limit: Most seconds for everything.
        folder: Where scratch files go.

    Raises:
        BenchmarkError: As `ask`.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        _work(interpreter, script, job, {}, limit, place)
        try:
            rows = json.loads((place / "answer.json").read_text("utf-8"))["rows"]
            found = [{str(name): float(seconds) for name, seconds in row.items()} for row in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BenchmarkError(f"the worker's answer cannot be read: {error!r}.") from error
    if not all(0 < seconds < float("inf") for row in found for seconds in row.values()):
        raise BenchmarkError("the worker's times must be positive and finite.")
    return found


def _work(
    interpreter: Path, script: str, job: dict[str, Any], data: dict[str, np.ndarray], limit: float, place: Path
) -> None:
    """Run a worker to its end in a folder."""
    (place / "job.json").write_text(json.dumps(job), "utf-8")
    with (place / "data.npz").open("wb") as file:
        np.savez(file, **data)  # type: ignore[arg-type]
    named = f"import sys; sys.path.append({str(_FOLDER)!r}); from peers.{script} import main; main(sys.argv[1])"
    command = [str(interpreter), *([script] if script.endswith(".py") else ["-c", named]), str(place / "job.json")]
    environment = _environment()
    if script not in _OWN:
        environment.pop("PYTHONPATH")  # the peers' interpreters need nothing of this one's
    try:
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"the worker {script} was stopped after {limit:.0f} seconds.") from error
    except OSError as error:
        raise BenchmarkError(f"the worker {script} cannot be started: {error}.") from error
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise BenchmarkError(f"the worker {script} failed: {last[0][:300]}")


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the two files of an answer: plain values and arrays.

    Raises:
        BenchmarkError: If a file is missing, damaged or too large.
    """
    try:
        content = json.loads((folder / "answer.json").read_text("utf-8"))
        if (folder / "answer.npz").stat().st_size > _MOST_BYTES:
            raise BenchmarkError("the worker's answer is larger than 2 GB.")
        with (folder / "answer.npz").open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return content, {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, KeyError, RecursionError, zipfile.BadZipFile) as error:
        raise BenchmarkError(f"the worker's answer cannot be read: {error}.") from error


def read_answer(folder: Path, *, dim: int, settings: int) -> Answer:
    """Read and check a worker's answer.

    Raises:
        BenchmarkError: If a file is missing or damaged, or shapes, numbers or their order cannot be right.
    """
    content, arrays = read_files(folder)
    try:
        runs = content["runs"]
        if not isinstance(runs, list) or len(runs) != settings:
            raise BenchmarkError(f"the worker answered for {len(runs)} settings, {settings} were asked for.")
        density = _numbers(arrays["log_density"], "log_density", (len(arrays["log_density"]),), finite=False)
        versions = {str(k): str(v) for k, v in dict(content.get("versions", {})).items()}
        read = tuple(_run(run, i, arrays, dim) for i, run in enumerate(runs))
        return Answer(read, density, float(content["memory_mb"]), versions)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BenchmarkError(f"the worker's answer lacks or garbles what it must hold: {error!r}.") from error


def _run(run: dict[str, Any], number: int, arrays: dict[str, np.ndarray], dim: int) -> Run:
    info = {key: value for key, value in run.items() if key not in ("setting", "setup")}
    setup = float(run["setup"][0]), float(run["setup"][1])
    if f"{number}/points" not in arrays:
        return Run(str(run["setting"]), setup, np.zeros((0, 4)), np.zeros((0, dim)), np.zeros((0, dim)), info)
    points = arrays[f"{number}/points"]
    count = len(points)
    points = _numbers(points, "points", (count, 4))
    if count == 0 or (points < 0).any() or (np.diff(points, axis=0) < 0).any():
        raise BenchmarkError("the worker's times and counts must be positive and must not decrease.")
    mean = _numbers(arrays[f"{number}/mean"], "mean", (count, dim))
    scale = arrays[f"{number}/scale"]
    scale = _numbers(scale, "scale", (count, dim) if scale.ndim == 2 else (count, dim, dim))
    return Run(str(run["setting"]), setup, points, mean, scale, info)


def _numbers(array: np.ndarray, name: str, shape: tuple[int, ...], *, finite: bool = True) -> np.ndarray:
    if array.dtype != np.float64 or array.shape != shape:
        raise BenchmarkError(f"the worker's {name} must be float64 of shape {shape}, got {array.dtype} {array.shape}.")
    if finite and not np.isfinite(array).all():
        raise BenchmarkError(f"the worker's {name} must be finite.")
    return array
