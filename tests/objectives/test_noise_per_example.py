"""Noise per example: the same mean gradient as one draw for all data, with less noise, from a fit down to the loss."""

import pytest
import torch
from torch import nn

import vifamily as vf
from vifamily import registry, rng
from vifamily.errors import ConfigError, IncompatibleError, NotAvailableError, ShapeError
from vifamily.models import LikelihoodModel
from vifamily.types import Batch, Capability

DOUBLE = torch.float64


class Regression(LikelihoodModel):
    """Linear regression of unit noise that also gives each datum coefficients of its own."""

    def __init__(self, rows=64, dim=3):
        source = torch.Generator().manual_seed(1)
        x = torch.randn(rows, dim, generator=source, dtype=DOUBLE)
        y = x.sum(-1) + torch.randn(rows, generator=source, dtype=DOUBLE)
        super().__init__((0.0, 1.0), lambda z, data: -0.5 * (data[1] - z @ data[0].T) ** 2, data=(x, y), dim=dim)
        self.capabilities = self.capabilities | {Capability.EXAMPLE_NOISE}

    def _log_likelihood_each(self, z, batch):
        x, y = self.source.whole() if batch is None else batch.data
        return -0.5 * (y - (z * x).sum(-1)) ** 2


def gradients(estimator, model, family, rows, repeats, seed):
    objective = registry.build("objectives", f"elbo(estimator={estimator})").resolve(model, family)
    source, out = torch.Generator().manual_seed(seed), []
    for _ in range(repeats):
        noise = torch.randn(rows, model.dim, generator=source, dtype=DOUBLE)
        loss = objective.loss(family, model, noise)
        out.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss.surrogate, list(family.parameters()))]))
    return torch.stack(out)


def test_the_mean_gradient_is_that_of_a_draw_for_all_and_its_variance_smaller(tools, seed):
    model, family = Regression(), tools.gaussian([0.5, 1.5, 0.0], [0.7, 0.7, 0.7])
    each = gradients("example", model, family, 64, 1500, seed)
    shared = gradients("analytic_kl", model, family, 1, 1500, seed + 1)
    assert tools.same_mean(each, shared)
    assert float(each.var(0).sum()) < 0.25 * float(shared.var(0).sum())


def test_a_model_that_takes_it_is_fitted_so_on_minibatches_and_ends_at_the_posterior():
    model = Regression()
    posterior = vf.fit(model, "full_rank", "elbo(estimator=example)", "adam", batch_size=16, draws=2, seed=0)
    x, y = model.source.whole()
    precision = x.T @ x + torch.eye(3, dtype=DOUBLE)
    mean = torch.linalg.solve(precision, x.T @ y)
    got, covariance = posterior.family.moments()
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    assert posterior.record.estimator == "example"
    assert float(((got - mean) / sd).abs().max()) < 0.1
    assert torch.allclose(covariance.diagonal().sqrt(), sd, rtol=0.05)


def test_it_is_taken_unasked_where_it_is_cheap():
    model = Regression()
    assert vf.plan(model, "mean_field", "elbo", "adam").estimator != "example"
    asked = vf.plan(model, "mean_field", "elbo(estimator=example)", "adam")
    assert any("cheap noise per example" in warning for warning in asked.warnings)
    model.capabilities = model.capabilities | {Capability.CHEAP_EXAMPLE_NOISE}
    assert vf.plan(model, "mean_field", "elbo", "adam").estimator == "example"
    assert vf.plan(model, "mean_field", "elbo", "lbfgs").estimator != "example"


def test_networks_take_it_unasked_with_walsh_hadamard_weights_and_not_with_all_weights_latent():
    """With dense weights each datum of a batch would have all weights drawn anew."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for weights, each in (("dense", False), ("lora(rank=2)", False), ("walsh_hadamard", True)):
        with rng.scoped(0):
            net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        model = vf.models.Network(net, "gaussian", (x, x[:, :1]), weights)
        assert Capability.EXAMPLE_NOISE in model.capabilities
        assert (vf.plan(model, "mean_field", "elbo", "adam").estimator == "example") is each, weights


def test_a_prior_that_is_not_normal_is_refused_before_the_first_step():
    model = Regression()
    model.capabilities = model.capabilities - {Capability.GAUSSIAN_PRIOR}
    with pytest.raises(IncompatibleError, match="Gaussian prior"):
        vf.plan(model, "mean_field", "elbo(estimator=example)", "adam")


def test_what_does_not_fit_is_refused(tools):
    model, family = Regression(), tools.gaussian([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    objective = registry.build("objectives", "elbo(estimator=example)").resolve(model, family)
    with pytest.raises(ConfigError, match="64 at least, and got 3"):
        objective.loss(family, model, torch.zeros(3, 3, dtype=DOUBLE))
    with pytest.raises(ShapeError, match="one for each"):
        model.log_likelihood_each(torch.zeros(2, 5, 3, dtype=DOUBLE))
    plain = LikelihoodModel((0.0, 1.0), lambda z, y: -0.5 * (y - z) ** 2, data=torch.zeros(4, dtype=DOUBLE), dim=1)
    with pytest.raises(NotAvailableError, match="noise per example"):
        plain.log_likelihood_each(torch.zeros(1, 4, 1, dtype=DOUBLE))


def test_a_batch_of_other_size_takes_as_many_rows(tools):
    model, family = Regression(), tools.gaussian([0.1, 0.2, 0.3], [1e-9, 1e-9, 1e-9])
    objective = registry.build("objectives", "elbo(estimator=example)").resolve(model, family)
    x, y = model.source.whole()
    batch = Batch((x[:8], y[:8]), 8)
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    wanted = 64 / 8 * 0.5 * (y[:8] - x[:8] @ mean).square().sum()
    assert float(objective.loss(family, model, noise, batch).terms["log_likelihood"]) == pytest.approx(float(wanted))
