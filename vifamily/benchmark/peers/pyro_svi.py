"""Pyro's SVI with AutoDiagonalNormal or AutoMultivariateNormal, on the package's own log density."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from ._common import Clock, Job, Trajectory, drive, steps_per_second

__all__ = ["main"]


def _run(job: Job, log_density: Any, setting: dict[str, Any]) -> Trajectory:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI, Trace_ELBO, autoguide

    dim, mean_field = job["dim"], job["family"] == "mean_field"
    pyro.clear_param_store()
    pyro.set_rng_seed(job["seed"])
    clock = Clock(job["clock"])
    trajectory = Trajectory(setting["name"], clock)
    clock.go()

    def model() -> None:
        support = dist.constraints.independent(dist.constraints.real, 1)
        z = pyro.sample("z", dist.ImproperUniform(support, (), (dim,)))
        pyro.factor("density", log_density(z))

    start = autoguide.initialization.init_to_value(values={"z": torch.zeros(dim, dtype=torch.float64)})
    guide_class = autoguide.AutoDiagonalNormal if mean_field else autoguide.AutoMultivariateNormal
    guide = guide_class(model, init_loc_fn=start)
    decay = (setting["last"] / setting["first"]) ** (1 / setting["steps"])
    optimiser = pyro.optim.ClippedAdam({"lr": setting["first"], "lrd": decay, "clip_norm": 1e300})
    loss = Trace_ELBO(num_particles=setting["draws"], vectorize_particles=setting["draws"] > 1, max_plate_nesting=0)
    svi = SVI(model, guide, optimiser, loss)
    guide()
    clock.stop()
    trajectory.ready()

    def advance(count: int) -> None:
        for _ in range(count):
            svi.step()

    def where() -> tuple[Any, Any]:
        with torch.no_grad():
            scale = guide.scale if mean_field else guide.scale[..., None] * guide.scale_tril
            return guide.loc.numpy().copy(), scale.numpy().copy()

    trajectory.add(0, 0, *where())
    if job["what"] == "steps":
        trajectory.info["steps_per_second"] = steps_per_second(advance)
    else:
        drive(trajectory, setting, job["budget"], advance, where)
    return trajectory


def main(path: str) -> None:
    """Do a job."""
    import torch

    from vifamily.benchmark._suite import problem_named

    torch.set_default_dtype(torch.float64)  # this process is the peer's alone
    torch.set_num_threads(1)
    job = Job(path)
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()  # outside every clock
    model = problem_named(job["problem"]).model
    trajectories = [_run(job, model.log_joint, setting) for setting in job["settings"]]
    values = model.log_joint(torch.from_numpy(job.data["check_points"])).detach().numpy()
    job.answer(trajectories, values, versions={p: importlib.metadata.version(p) for p in ("torch", "pyro-ppl")})
