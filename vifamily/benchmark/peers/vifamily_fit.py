"""This package's own fit, by one solver; run like the peers, in a process of its own."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ._common import Clock, Job, Trajectory

__all__ = ["main"]

_MOST_FITS = 8


def _gaussian(run: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of the family as it stands: where it sends zero noise and each unit of noise."""
    import torch

    flat, average = getattr(run, "flat", None), getattr(run, "average", None)
    kept = None
    if average is not None and flat is not None and run.finished is None:
        # what `fit` would return if it ended here
        kept = flat.value.clone()
        flat.set(average()[0])
    family = run.task.family
    size = family.noise_spec.shape[0]
    with torch.no_grad():
        z = family(torch.cat([torch.zeros(1, size), torch.eye(size)]).to(family.shift)).z.numpy()
    if flat is not None and kept is not None:
        flat.set(kept)
    mean, columns = z[0].copy(), (z[1:] - z[0]).T
    diagonal = np.count_nonzero(columns - np.diag(columns.diagonal())) == 0
    return mean, np.abs(columns.diagonal()).copy() if diagonal else columns


def _fit(job: Job, setting: dict[str, Any], problem: Any) -> Trajectory:
    from vifamily.loop import FitLoop
    from vifamily.plan import make_plan
    from vifamily.progress import FitProgress

    clock = Clock(job["clock"])
    trajectory = Trajectory(setting["name"], clock)
    restarts = int(setting.get("restarts", 1))
    evaluated = [0]
    clock.go()
    plan = make_plan(problem, job["family"], "elbo", setting["solver"], draws=setting.get("draws"), batch_size=None,
                     device=None, dtype=None)  # fmt: skip
    original = plan.model.log_joint

    def counted(z: Any, batch: Any = None) -> Any:
        evaluated[0] += z.numel() // z.shape[-1]
        return original(z, batch)

    plan.model.log_joint = counted  # type: ignore[method-assign]
    loop = FitLoop(plan, seed=job["seed"], most_steps=setting.get("steps") or 50_000, restarts=restarts, init="auto",
                   folder=None, every=1000, encoder=None, local_family=None)  # fmt: skip
    clock.stop()
    run = loop.runs[0]
    next_look = [1.0]
    if restarts == 1:
        trajectory.add(0, evaluated[0], *_gaussian(run))
    clock.go()

    def look(report: Any) -> bool:
        clock.stop()
        if restarts == 1 and report.step >= next_look[0]:
            next_look[0] = report.step + 1 if report.step < 300 else 1.1 * report.step
            before = evaluated[0]
            trajectory.add(report.step, before, *_gaussian(run))
            evaluated[0] = before
        over = bool(clock.counted > job["budget"])
        clock.go()
        return over

    posterior = loop.run((look,), None, FitProgress(show=False, most_steps=50_000), None)
    clock.stop()
    if restarts == 1:
        trajectory.add(run.step_count, evaluated[0], *_gaussian(run))
    record = posterior.record
    trajectory.info = {
        "total_seconds": clock.wall, "total_cpu_seconds": clock.cpu, "stop_reason": record.stop_reason,
        "steps": record.steps, "evaluations": evaluated[0], "solver": record.solver,
    }  # fmt: skip
    return trajectory


def _steps_per_second(job: Job, setting: dict[str, Any], problem: Any, seconds: float = 0.5) -> Trajectory:
    """Steps of the stochastic bound in whole fits, stopping rule, averaging and guard included.

    A fit ends when it has converged, often within some milliseconds, so further ones follow with other seeds.
    """
    from vifamily.loop import FitLoop
    from vifamily.plan import make_plan

    trajectory = Trajectory(setting["name"], Clock())
    plan = make_plan(problem, job["family"], "elbo", setting["solver"], draws=1, batch_size=None, device=None,
                     dtype=None, compile=bool(setting.get("compile", False)))  # fmt: skip
    steps, used = 0, 0.0
    for number in range(_MOST_FITS):
        loop = FitLoop(plan, seed=_MOST_FITS * job["seed"] + number, most_steps=10**8, restarts=1, init="auto",
                       folder=None, every=10**9, encoder=None, local_family=None)  # fmt: skip
        run = loop.runs[0]
        if not run.compiled and setting.get("compile"):
            raise RuntimeError(f"the step was not compiled: {run.not_compiled}")
        for _ in range(3):
            run.step()
        first, began = run.step_count, time.process_time()
        while run.finished is None and time.process_time() - began < seconds:
            run.step()
        steps, used = steps + run.step_count - first, used + time.process_time() - began
        if used >= seconds:
            break
    trajectory.info["steps_per_second"] = steps / used
    trajectory.add(0, 0, *_gaussian(run))
    return trajectory


def main(path: str) -> None:
    """Do a job: each setting cold, then once more in the same process, warm."""
    import torch

    from vifamily.benchmark._suite import problem_named
    from vifamily.posterior import versions

    torch.set_num_threads(1)
    job = Job(path)
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()  # outside every clock
    trajectories = []
    for setting in job["settings"]:
        if job["what"] == "steps":
            trajectories.append(_steps_per_second(job, setting, problem_named(job["problem"])))
            continue
        cold = _fit(job, setting, problem_named(job["problem"]))
        if job["what"] == "target":
            warm = _fit(job, setting, problem_named(job["problem"]))
            cold.info["warm"] = [[point[0], point[1]] for point in warm.points]
        trajectories.append(cold)
    model = problem_named(job["problem"]).model
    values = model.log_joint(torch.from_numpy(job.data["check_points"])).detach().numpy()
    job.answer(trajectories, values, versions=dict(versions()))
