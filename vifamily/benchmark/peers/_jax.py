"""What the workers on JAX share."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from ._common import Clock, Job, Trajectory, drive, steps_per_second
from .densities import density, jax_ops

__all__ = ["optimise", "schedule", "work"]


def schedule(setting: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the step size as a function of the step: from ``first`` to ``last``, geometrically."""
    ratio, steps = setting["last"] / setting["first"], setting["steps"]
    return lambda i: setting["first"] * ratio ** (i / steps)


def optimise(
    job: Job,
    setting: dict[str, Any],
    begin: Callable[[], tuple[Any, Callable[[Any, Any], Any]]],
    where: Callable[[Any], tuple[Any, Any]],
) -> Trajectory:
    """Run one setting in one compiled loop whose number of steps is an argument, so that it is compiled once.

    Args:
        job: The job.
        setting: Draws, steps, first and last step size.
        begin: Gives the first state and the step ``(i, state) -> state``; inside the clock.
        where: From a state to mean and scale.
    """
    import jax
    import jax.numpy as jnp

    jax.clear_caches()
    clock = Clock(job["clock"])
    trajectory = Trajectory(setting["name"], clock)
    clock.go()
    state, step = begin()

    def loop(state: Any, start: Any, count: Any) -> Any:
        return jax.lax.fori_loop(start, start + count, step, state)

    done = jnp.asarray(0)
    compiled = jax.jit(loop).lower(state, done, done).compile()
    clock.stop()
    trajectory.ready()
    held = {"state": state, "done": 0}

    def advance(count: int) -> None:
        held["state"] = jax.block_until_ready(compiled(held["state"], jnp.asarray(held["done"]), jnp.asarray(count)))
        held["done"] += count

    trajectory.add(0, 0, *where(held["state"]))
    if job["what"] == "steps":
        trajectory.info["steps_per_second"] = steps_per_second(advance)
    else:
        drive(trajectory, setting, job["budget"], advance, where=lambda: where(held["state"]))
    return trajectory


def work(path: str, packages: tuple[str, ...], run: Callable[[Job, Any, dict[str, Any]], Trajectory]) -> None:
    """Do a job: one trajectory for each setting.

    Args:
        path: The job file.
        packages: Packages whose versions are reported.
        run: From the job, the log density and a setting to a trajectory.
    """
    import jax
    import jax.numpy as jnp

    job = Job(path)
    jax.block_until_ready(jax.jit(jax.grad(lambda x: jnp.sum(x * x)))(jnp.ones(2)))  # outside every clock
    check = job.data.pop("check_points")
    log_density = density(job["density"], jax_ops(), {key: jnp.asarray(value) if value.ndim and value.dtype.kind == "f"
                          and key not in ("observed", "y_init", "y", "sigma", "x", "k") else value
                          for key, value in job.data.items()})  # fmt: skip
    trajectories = [run(job, log_density, setting) for setting in job["settings"]]
    values = jax.vmap(log_density)(jnp.asarray(check))
    job.answer(trajectories, values, versions={p: importlib.metadata.version(p) for p in ("jax", *packages)})
