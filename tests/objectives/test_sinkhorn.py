"""Sinkhorn divergence to reference draws, as an objective."""

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError
from vifamily.testing import targets
from vifamily.testing._tools import grid_noise

DOUBLE = torch.float64


def minimised(objective, family, model, noise):
    parameters = list(family.parameters())
    optimiser = torch.optim.LBFGS(parameters, max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = objective.loss(family, model, noise)
        loss.surrogate.backward()
        return loss.value

    optimiser.step(closure)
    return [part.detach() for part in family.moments()]


def test_mean_field_lands_on_the_wasserstein_optimum(tools):
    # the nearest diagonal normal law to a correlated one in the Wasserstein distance has sd tr(Sigma^(1/2)) / dim
    rho = 0.9
    wanted = ((1 + rho) ** 0.5 + (1 - rho) ** 0.5) / 2
    family = tools.gaussian([0.2, -0.1], [1.2, 0.6])
    objective = registry.build("objectives", "sinkhorn(epsilon=0.1, reference_batch=None)")
    mean, covariance = minimised(
        objective, family, targets.correlated_normal(rho).model, grid_noise(family.noise_spec, 16)
    )
    assert covariance.diagonal().sqrt().tolist() == pytest.approx([wanted] * 2, rel=0.03)
    assert float(mean.abs().max()) < 0.02


def test_the_nearest_gaussian_to_two_normals_has_the_mean_of_quantile_products(tools):
    # in one dimension: sd = E[F^(-1)(u) Phi^(-1)(u)]
    model = targets.two_normals().model
    draws = model.reference_draws.sort(0).values
    wanted = float((draws * tools.quadrature_noise(len(draws))).mean())
    objective = registry.build("objectives", "sinkhorn(epsilon=0.02, standardise=true, reference_batch=None)")
    _, covariance = minimised(objective, tools.gaussian(0.5, 2.0), model, tools.quadrature_noise(128))
    assert float(covariance.sqrt()) == pytest.approx(wanted, rel=0.02)


def test_a_mixture_is_fitted_with_its_weights():
    model = targets.two_normals().model
    posterior = vf.fit(model, "mixture(components=2)", "sinkhorn(epsilon=0.1)", seed=0, steps=80, draws=64)
    z = posterior.draws(4000)
    assert float(z.mean()) == pytest.approx(0, abs=0.5) and float(z.std()) == pytest.approx(3.16, abs=0.4)
    assert 0.3 < float((z > 0).double().mean()) < 0.7


@pytest.mark.parametrize(
    "options", [{"epsilon": 0}, {"iterations": 0}, {"standardise": None}, {"reference_batch": 1.5}], ids=str
)
def test_options_out_of_range_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match="positive" if name in ("epsilon", "iterations") else name):
        vf.objectives.Sinkhorn(**options)
