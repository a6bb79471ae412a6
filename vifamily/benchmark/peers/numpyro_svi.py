"""NumPyro's SVI with AutoDiagonalNormal or AutoMultivariateNormal."""

from __future__ import annotations

from typing import Any

from ._common import Job, Trajectory
from ._jax import optimise, schedule, work

__all__ = ["main"]


def _run(job: Job, log_density: Any, setting: dict[str, Any]) -> Trajectory:
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_value

    dim, mean_field = job["dim"], job["family"] == "mean_field"
    held: dict[str, Any] = {}

    def begin() -> tuple[Any, Any]:
        def model() -> None:
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
            numpyro.factor("density", log_density(z))

        guide_class = autoguide.AutoDiagonalNormal if mean_field else autoguide.AutoMultivariateNormal
        guide = guide_class(model, init_loc_fn=init_to_value(values={"z": jnp.zeros(dim)}))
        optimiser = numpyro.optim.Adam(schedule(setting))
        held["svi"] = svi = SVI(model, guide, optimiser, Trace_ELBO(num_particles=setting["draws"]))
        return svi.init(jax.random.PRNGKey(job["seed"])), lambda i, state: svi.update(state)[0]

    def where(state: Any) -> tuple[Any, Any]:
        values = held["svi"].get_params(state)
        return values["auto_loc"], values["auto_scale" if mean_field else "auto_scale_tril"]

    return optimise(job, setting, begin, where)


def main(path: str) -> None:
    """Do a job."""
    work(path, ("numpyro",), _run)
