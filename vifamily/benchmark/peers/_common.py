"""What every worker shares: its job, a clock, the trajectory it leaves, and the file it answers with."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Clock", "Job", "Trajectory", "drive", "step_counts"]


class Clock:
    """Wall and CPU seconds of this process, stopped while something is written down.

    Args:
        counts: ``"wall"`` or ``"cpu"``: which of them a limit of time is about.

    Example:
        >>> clock = Clock()
        >>> clock.go()
        >>> clock.stop()
        >>> clock.wall >= 0
        True
    """

    def __init__(self, counts: str = "wall") -> None:
        self.counts = counts
        self.wall = self.cpu = 0.0
        self._since: tuple[float, float] | None = None

    def go(self) -> None:
        """Start or go on."""
        self._since = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """Stop until the next :meth:`go`."""
        if self._since is not None:
            self.wall += time.perf_counter() - self._since[0]
            self.cpu += time.process_time() - self._since[1]
            self._since = None

    @property
    def counted(self) -> float:
        """Seconds that count towards a limit."""
        return self.cpu if self.counts == "cpu" else self.wall


class Trajectory:
    """Gaussians that one run passed through, with the time and the work at which it was there.

    Args:
        setting: The settings of the run, in words.
        clock: The clock of the run.
    """

    def __init__(self, setting: str, clock: Clock) -> None:
        self.setting, self.clock = setting, clock
        self.setup = (0.0, 0.0)
        self.points: list[tuple[float, float, int, int]] = []
        self.means: list[np.ndarray] = []
        self.scales: list[np.ndarray] = []
        self.info: dict[str, Any] = {}

    def ready(self) -> None:
        """Note that building and compiling are over."""
        self.setup = (self.clock.wall, self.clock.cpu)

    def add(self, steps: int, evaluations: int, mean: Any, scale: Any) -> bool:
        """Note where the run stands; returns False, and notes nothing, where that is not finite."""
        mean, scale = np.array(mean, dtype=np.float64), np.array(scale, dtype=np.float64)
        if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
            return False
        self.points.append((self.clock.wall, self.clock.cpu, steps, evaluations))
        self.means.append(mean)
        self.scales.append(scale)
        return True


class Job:
    """What a worker is asked to do, and where its answer goes.

    Args:
        path: The job file, JSON, beside ``data.npz``.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(path).parent
        self.values: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
        with np.load(self.folder / "data.npz", allow_pickle=False) as stored:
            self.data = {key: stored[key] for key in stored.files}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def answer(self, trajectories: list[Trajectory], log_density: Any, **info: Any) -> None:
        """Write the answer.

        Args:
            trajectories: One for each setting.
            log_density: This side's log density at the points to be checked.
            info: Plain values, such as steps per second and versions.
        """
        arrays: dict[str, Any] = {"log_density": np.asarray(log_density, dtype=np.float64)}
        runs = []
        for i, run in enumerate(trajectories):
            runs.append({"setting": run.setting, "setup": list(run.setup), **run.info})
            if run.points:
                arrays[f"{i}/points"] = np.array(run.points, dtype=np.float64)
                arrays[f"{i}/mean"], arrays[f"{i}/scale"] = np.stack(run.means), np.stack(run.scales)
        self.write(arrays, runs=runs, **info)

    def write(self, arrays: dict[str, Any], **info: Any) -> None:
        """Write arrays and plain values, and the peak memory of the process, as the answer."""
        with (self.folder / "answer.npz").open("wb") as file:
            np.savez(file, **arrays)
        (self.folder / "answer.json").write_text(json.dumps({"memory_mb": peak_memory(), **info}), "utf-8")


def peak_memory() -> float:
    """Peak memory of this process in MB.

    Linux lets a new program inherit the maximum of the process that started it, so the program's own is read from
    ``/proc`` where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 2**10
    import resource  # not on Windows

    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def step_counts(most: int, ratio: float = 1.2) -> list[int]:
    """Numbers of steps at which a run is looked at: geometric, the last one ``most``.

    Example:
        >>> step_counts(10, ratio=2.0)
        [1, 2, 4, 8, 10]
    """
    out: list[int] = []
    now = 1.0
    while math.ceil(now) < most:
        if not out or math.ceil(now) > out[-1]:
            out.append(math.ceil(now))
        now *= ratio
    return [*out, most]


def drive(
    trajectory: Trajectory,
    setting: dict[str, Any],
    budget: float,
    advance: Callable[[int], None],
    where: Callable[[], tuple[Any, Any]],
) -> None:
    """Run to the last step or out of time, noting where the run stands on the way.

    Args:
        trajectory: Where that is noted.
        setting: ``steps`` and ``draws``.
        budget: Most seconds of steps, by what the clock counts.
        advance: Takes this many steps, and returns when they are done.
        where: Gives mean and scale.
    """
    clock, done = trajectory.clock, 0
    first = clock.counted
    for target in step_counts(setting["steps"]):
        used = clock.counted - first
        if used > budget:
            break
        count = target - done
        if done:  # no longer than what is left allows, judged by the steps so far
            count = min(count, max(1, int((budget - used) * done / max(used, 1e-9))))
        clock.go()
        advance(count)
        clock.stop()
        done += count
        if not trajectory.add(done, done * setting["draws"], *where()):
            trajectory.info["ended"] = "not finite"
            break
        if done < target:
            break


def steps_per_second(advance: Callable[[int], None], seconds: float = 1.0) -> float:
    """Steps per CPU second of a loop that is compiled and warm, from about ``seconds`` of them."""
    advance(20)
    count, used = 20, 0.0
    while True:
        began = time.process_time()
        advance(count)
        used = time.process_time() - began
        if used > 0.3 * seconds:
            return count / used
        count = int(count * min(10.0, max(1.5, seconds / max(used, 1e-4))))
