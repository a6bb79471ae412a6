"""PyMC's ADVI and full-rank ADVI."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np

from ._common import Clock, Job, Trajectory, drive, steps_per_second
from .densities import density, pytensor_ops

__all__ = ["main"]


def _run(job: Job, log_density: Any, setting: dict[str, Any]) -> Trajectory:
    import pymc as pm
    import pytensor

    dim = job["dim"]
    clock = Clock(job["clock"])
    trajectory = Trajectory(setting["name"], clock)
    clock.go()
    with pm.Model() as model:
        z = pm.Flat("z", shape=dim)
        pm.Potential("density", log_density(z))
    method = pm.ADVI if job["family"] == "mean_field" else pm.FullRankADVI
    inference = method(model=model, random_seed=job["seed"])
    rate = pytensor.shared(np.float64(setting["first"]))
    shrink = (setting["last"] / setting["first"]) ** (1 / setting["steps"])
    # not through more_updates: that would replace the updates of the random streams, and every step would see the same
    # draws
    step = inference.objective.step_function(obj_n_mc=setting["draws"], obj_optimizer=pm.adam(learning_rate=rate))
    done = [0]
    clock.stop()
    trajectory.ready()

    def advance(count: int) -> None:
        for number in range(done[0], done[0] + count):
            if number % 10 == 0:
                rate.set_value(setting["first"] * shrink**number)
            step()
        done[0] += count

    def where() -> tuple[Any, Any]:
        values = {key: value.get_value() for key, value in inference.approx.params_dict.items()}
        if "rho" in values:
            return values["mu"], np.logaddexp(0.0, values["rho"])
        factor = np.zeros((dim, dim))
        factor[np.tril_indices(dim)] = values["L_tril"]
        np.fill_diagonal(factor, np.logaddexp(0.0, factor.diagonal()))
        return values["mu"], factor

    trajectory.add(0, 0, *where())
    if job["what"] == "steps":
        trajectory.info["steps_per_second"] = steps_per_second(advance)
    else:
        drive(trajectory, setting, job["budget"], advance, where)
    return trajectory


def main(path: str) -> None:
    """Do a job."""
    import pytensor
    import pytensor.tensor as pt

    job = Job(path)
    x = pt.dvector("x")
    pytensor.function([x], pytensor.grad((x * x).sum(), x))(np.ones(2))  # outside every clock
    check = job.data.pop("check_points")
    log_density = density(job["density"], pytensor_ops(), job.data)
    trajectories = [_run(job, log_density, setting) for setting in job["settings"]]
    compiled = pytensor.function([x], log_density(x))
    versions = {name: importlib.metadata.version(name) for name in ("pymc", "pytensor")}
    job.answer(trajectories, [compiled(point) for point in check], versions=versions)
