"""blackjax's mean-field and full-rank VI, and its Pathfinder."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._common import Clock, Job, Trajectory
from ._jax import optimise, schedule, work

__all__ = ["main"]


def _run(job: Job, log_density: Any, setting: dict[str, Any]) -> Trajectory:
    import jax
    import jax.numpy as jnp
    import optax
    from blackjax.vi import fullrank_vi, meanfield_vi

    if job["method"] == "pathfinder":
        return _pathfinder(job, log_density, setting)
    mean_field, dim = job["family"] == "mean_field", job["dim"]

    def begin() -> tuple[Any, Any]:
        method = meanfield_vi if mean_field else fullrank_vi
        algorithm = method.as_top_level_api(log_density, optax.adam(schedule(setting)), setting["draws"])
        key = jax.random.PRNGKey(job["seed"])
        return algorithm.init(jnp.zeros(dim)), lambda i, state: algorithm.step(jax.random.fold_in(key, i), state)[0]

    def where(state: Any) -> tuple[Any, Any]:
        if mean_field:
            return state.mu, np.exp(np.asarray(state.rho))
        numbers = np.asarray(state.chol_params)
        factor = np.diag(np.exp(numbers[:dim]))
        factor[np.tril_indices(dim, -1)] = numbers[dim:]
        return state.mu, factor

    return optimise(job, setting, begin, where)


def _pathfinder(job: Job, log_density: Any, setting: dict[str, Any]) -> Trajectory:
    """One path with default settings; its Gaussian has a diagonal plus low-rank covariance."""
    import jax
    import jax.numpy as jnp
    from blackjax.vi import pathfinder

    jax.clear_caches()
    clock = Clock(job["clock"])
    trajectory = Trajectory(setting["name"], clock)
    key, start = jax.random.PRNGKey(job["seed"]), jnp.zeros(job["dim"])
    clock.go()
    compiled = jax.jit(lambda k, x: pathfinder.approximate(k, log_density, x)).lower(key, start).compile()
    clock.stop()
    trajectory.ready()
    clock.go()
    state, _ = jax.block_until_ready(compiled(key, start))
    clock.stop()
    beta = np.asarray(state.beta)
    covariance = np.diag(np.asarray(state.alpha)) + beta @ np.asarray(state.gamma) @ beta.T
    mean = np.asarray(state.position) + covariance @ np.asarray(state.grad_position)
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        trajectory.info["ended"] = "a covariance that is not positive definite"
        return trajectory
    trajectory.add(1, 200, mean, factor)
    return trajectory


def main(path: str) -> None:
    """Do a job."""
    work(path, ("blackjax", "optax"), _run)
