"""Networks as models: closed forms where the net is linear, contracts, minibatches, fits, files."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import vifamily as vf
from vifamily import errors, rng, testing
from vifamily.models import Network, Prediction
from vifamily.testing._tools import seeded
from vifamily.types import Capability
from vifamily.weights.dense import Dense

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def own_stream():
    """Layers draw their first weights from torch's stream."""
    with rng.scoped(0):
        yield


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=DOUBLE)


def tanh_net(inputs=2, outputs=1, width=4):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def linear_model(count=12, sd=0.5, **options):
    x = normal(count, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=DOUBLE) + 0.3 + sd * normal(count, 1, seed=1)
    return Network(nn.Linear(3, 1).double(), f"gaussian(sd={sd})", data=(x, y), **options)


def conjugate(model, sd):
    """Mean and covariance of the posterior of Bayesian linear regression."""
    x, y = model._data_of(None)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=DOUBLE)], 1)
    _, prior_sd = model.gaussian_prior()
    precision = design.T @ design / sd**2 + torch.diag(prior_sd**-2)
    return torch.linalg.solve(precision, design.T @ y[:, 0] / sd**2), torch.linalg.inv(precision), design


def smooth_model(likelihood="gaussian", y=None, outputs=1, **options):
    x = normal(12, 2)
    if y is None:
        y = torch.sin(x[:, :1])
    return Network(tanh_net(outputs=outputs), likelihood, data=(x, y), **options)


COUNTS = torch.tensor([0, 1, 3, 2, 0, 5, 1, 1, 2, 0, 4, 1])
KINDS = {
    "gaussian": ("gaussian", None, 1),
    "known": ("gaussian(sd=0.3)", None, 1),
    "student": ("student_t(df=5)", None, 1),
    "heteroscedastic": ("heteroscedastic", normal(12), 2),
    "categorical": ("categorical", COUNTS % 3, 3),
    "bernoulli": ("bernoulli", (COUNTS % 2).unsqueeze(-1), 1),
    "poisson": ("poisson", COUNTS.double().unsqueeze(-1), 1),
    "own": (lambda f, y: -(f - y).abs().sum(-1), None, 1),
}


# --- contracts and closed forms ---


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "own"])
def test_contracts(kind):
    likelihood, y, outputs = KINDS[kind]
    report = testing.check_model(smooth_model(likelihood, y, outputs))
    assert {"parts", "score", "minibatches", "draws_apart", "gaussian_prior"} <= set(report.passed)


@pytest.mark.parametrize("weights", ["last_layer", "subset(pattern='*.weight')", "lora(rank=1)"])
def test_contracts_of_other_weights(weights):
    report = testing.check_model(smooth_model(weights=weights))
    assert {"parts", "score", "minibatches", "gaussian_prior"} <= set(report.passed)


def test_log_joint_is_that_of_linear_regression():
    model = linear_model(sd=0.5)
    z = normal(5, 4, seed=2)
    _, _, design = conjugate(model, 0.5)
    _, prior_sd = model.gaussian_prior()
    _, y = model._data_of(None)
    expected = torch.distributions.Normal(0, prior_sd).log_prob(z).sum(-1)
    expected = expected + torch.distributions.Normal(z @ design.T, 0.5).log_prob(y[:, 0]).sum(-1)
    torch.testing.assert_close(model.log_joint(z), expected, rtol=1e-12, atol=1e-10)


def test_full_rank_fit_of_a_linear_net_is_the_conjugate_posterior():
    model = linear_model(sd=0.5)
    mean, covariance, design = conjugate(model, 0.5)
    posterior = vf.fit(model, "full_rank", "elbo", seed=0)
    found_mean, found_covariance = posterior.family.moments()
    sd = covariance.diagonal().sqrt()
    assert float(((found_mean - mean) / sd).abs().max()) < 0.02
    assert float(((found_covariance - covariance) / torch.outer(sd, sd)).abs().max()) < 0.05
    new = normal(6, 3, seed=4)
    prediction = posterior.predict(new, num_draws=4000)
    rows = torch.cat([new, torch.ones(6, 1, dtype=DOUBLE)], 1)
    exact = ((rows @ covariance) * rows).sum(-1)
    torch.testing.assert_close(prediction.aleatoric, torch.full((6, 1), 0.25, dtype=DOUBLE))
    error = prediction.epistemic[:, 0] / exact - 1  # a variance from 4000 draws, and the fit's own error
    assert float(error.abs().max()) < 5 * math.sqrt(2 / 4000) + 0.1


def test_divergence_from_the_prior_is_the_closed_form():
    model = linear_model()
    family = vf.fit(model, "full_rank", "elbo(estimator=analytic_kl)", steps=20).family
    mean, covariance = family.moments()
    _, sd = model.gaussian_prior()
    exact = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(mean, covariance),
        torch.distributions.MultivariateNormal(torch.zeros_like(mean), torch.diag(sd**2)),
    )
    torch.testing.assert_close(model.kl_to_prior(family), exact, rtol=1e-9, atol=1e-9)


def test_each_datum_with_a_latent_of_its_own():
    model = smooth_model()
    assert Capability.EXAMPLE_NOISE in model.capabilities
    z = normal(3, 12, model.dim, seed=3)
    expected = torch.stack([model.log_likelihood(z[:, i])[:, i] for i in range(12)], -1)
    torch.testing.assert_close(model.log_likelihood_each(z), expected, rtol=1e-10, atol=1e-10)


def test_minibatches_are_unbiased():
    model = smooth_model()
    z = normal(3, model.dim, seed=3)
    source = model.batches(4, seed=0)
    parts = torch.stack([model.log_joint(z, source.at(k)) for k in range(3)])
    torch.testing.assert_close(parts.mean(0), model.log_joint(z), rtol=1e-10, atol=1e-10)
    index = torch.tensor([3, 0])
    assert torch.equal(model.batch_at(index).data[0], model._data_of(None)[0][index])


def test_kinks_cost_second_derivatives():
    x, y = normal(12, 2), normal(12, 1)
    for net in (nn.ReLU(), nn.LeakyReLU(), nn.Hardtanh()):
        model = Network(nn.Sequential(nn.Linear(2, 3), net, nn.Linear(3, 1)).double(), data=(x, y))
        assert Capability.SECOND_ORDER not in model.capabilities
    for net in (nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus()):
        model = Network(nn.Sequential(nn.Linear(2, 3), net, nn.Linear(3, 1)).double(), data=(x, y))
        assert Capability.SECOND_ORDER in model.capabilities


def test_capabilities_follow_the_parts():
    assert Capability.POINT_PARAMETERS in smooth_model().capabilities  # the noise
    assert Capability.POINT_PARAMETERS not in smooth_model("gaussian(sd=1.0)").capabilities
    assert Capability.POINT_PARAMETERS in smooth_model("gaussian(sd=1.0)", weights="last_layer").capabilities
    frozen = smooth_model("gaussian(sd=1.0)", weights="last_layer", rest="frozen")
    assert Capability.POINT_PARAMETERS not in frozen.capabilities
    assert Capability.PREDICTIVE not in smooth_model(KINDS["own"][0]).capabilities


# --- fits ---


def toy(count=60):
    x = torch.linspace(-1, 1, count).unsqueeze(-1)
    return x, torch.sin(4 * x) + 0.1 * torch.randn(count, 1, generator=seeded(7))


def test_a_fit_predicts_better_than_the_prior():
    x, y = toy()
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    model = Network(net, "gaussian(sd=0.1)", data=(x[::2], y[::2]))
    prior = model.predict(model.sample_prior(500, generator=seeded(0)), x[1::2])
    posterior = vf.fit(model, "mean_field", "elbo", "adam(step_size=0.05)", seed=0, steps=400)
    prediction = posterior.predict(x[1::2])
    assert float(prediction.log_score(y[1::2]).mean()) > float(prior.log_score(y[1::2]).mean()) + 1
    assert prediction.calibration(y[1::2])["rmse"] < 0.3


def test_a_learned_noise_is_that_of_least_squares():
    model = Network(nn.Linear(3, 1).double(), data=linear_model(200, sd=0.5)._data_of(None), prior_scale=100.0)
    assert float(model.likelihood.scale(normal(1)).detach()) > 1  # begins at the standard deviation of the data
    posterior = vf.fit(model, "full_rank", "elbo", "adam(step_size=0.05)", seed=0, steps=500)
    x, y = model._data_of(None)
    design = torch.cat([x, torch.ones(200, 1, dtype=DOUBLE)], 1)
    residual = y - design @ torch.linalg.lstsq(design, y).solution
    unbiased = math.sqrt(float(residual.square().sum()) / (200 - 4))  # the maximum of the evidence under a wide prior
    assert abs(float(posterior.model.likelihood.scale(y).detach()) / unbiased - 1) < 0.02


def test_an_ensemble_and_minibatches_fit_too():
    x, y = toy()
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    model = Network(net, "gaussian(sd=0.2)", data=(x, y), weights="dense(begin=prior)")
    posterior = vf.fit(model, "ensemble(size=3)", "renyi_predictive", seed=0, steps=30, batch_size=20)
    members = posterior.family.particles()
    assert float(torch.pdist(members).min()) > 1


def test_natural_gradients_take_a_draw_for_all_data():
    model = smooth_model("gaussian(sd=0.3)")
    posterior = vf.fit(model, "mean_field", "elbo", "natural_gradient", seed=0, steps=3)
    assert "example" not in posterior.record.objective
    with pytest.raises(errors.IncompatibleError, match="one draw for all data"):
        vf.plan(model, "mean_field", "elbo(estimator=example)", "natural_gradient")


def test_a_given_start_that_collapses_warns():
    model = smooth_model(weights="walsh_hadamard")
    options = {"steps": 2, "seed": 0, "progress": False, "init": torch.zeros(model.dim, dtype=DOUBLE)}
    vf.fit(model, "mean_field", "elbo", **options)  # the spread around the point is enough
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".left", ".right")):
                parameter.mul_(0.01)
    with pytest.warns(errors.VifamilyWarning, match="nearly nothing"):
        vf.fit(model, "mean_field", "elbo", **options)


def test_fitted_prior_raises_the_bound():
    model = linear_model()
    posterior = vf.fit(model, "mean_field", "elbo", seed=0)
    before = model.kl_to_prior(posterior.family)
    found = model.fit_prior(posterior)
    assert model.kl_to_prior(posterior.family) < before
    assert found.keys() == {"net"}
    with pytest.raises(errors.ShapeError):
        smooth_model().fit_prior(posterior)


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
@pytest.mark.parametrize(
    "weights", ["prior=isotropic, bias=gaussian", "prior=isotropic, scales=latent", "prior=latent"]
)
def test_fitted_prior_is_best_for_walsh_hadamard_weights_too(weights, family):
    model, wider = (smooth_model(weights=f"walsh_hadamard({weights})", prior_scale=scale) for scale in (1.0, 2.0))
    at = normal(1, model.dim)
    assert not torch.allclose(model.log_prior(at), wider.log_prior(at))
    posterior = vf.fit(model, family, "elbo(estimator=reparameterised)", seed=0, steps=30)
    found = model.fit_prior(posterior)
    assert found.keys() == {"0", "2"}
    with torch.no_grad():
        # the draws that the fitted scale comes from where there is no closed form
        z, best = posterior.draws(4000), model.weights.scales.clone()
        bounds = []
        for factor in (0.9, 1.0, 1.1):
            model.weights.scales.copy_(factor * best)
            bounds.append(float(model.log_prior(z).mean()))
    assert bounds[1] == max(bounds)


def test_batch_normalisation_is_left_as_it_was():
    x, y = toy()
    net = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    net(3 * x)
    before = {k: v.clone() for k, v in net.named_buffers()}
    model = Network(net, data=(x, y))
    posterior = vf.fit(model, "mean_field", "elbo", seed=0, steps=20)
    after = dict(posterior.model.weights.net.named_buffers())
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert "batch normalisation" in model.report.skipped["1"]


def test_saved_and_loaded(tmp_path):
    model = linear_model(sd=0.5, include="weight")
    posterior = vf.fit(model, "mean_field", "elbo", seed=0, steps=200)
    model.fit_prior(posterior)
    posterior.save(tmp_path / "fit")
    again = linear_model(sd=0.5, include="weight")
    loaded = vf.load(tmp_path / "fit", model=again)
    x = normal(4, 3, seed=8)
    assert torch.equal(loaded.predict(x).draws, posterior.predict(x).draws)
    assert torch.equal(again.weights.scales, model.weights.scales)


# --- data ---


def test_loaders_and_datasets():
    x, y = toy(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    model = Network(nn.Linear(1, 1), data=loader)
    assert model.own_batch_size == 10
    assert model.log_likelihood(torch.zeros(3, 2)).shape == (3, 40)

    class Pairs(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return x[i], y[i]

    other = Network(nn.Linear(1, 1), data=Pairs())
    torch.testing.assert_close(
        other.log_likelihood(torch.ones(3, 2)), Network(nn.Linear(1, 1), data=(x, y)).log_likelihood(torch.ones(3, 2))
    )


@pytest.mark.parametrize("wrong", [7, -1])
def test_targets_of_later_batches_are_checked(wrong):
    x, y = normal(40, 2).float(), torch.arange(40) % 3
    y[35] = wrong
    model = Network(nn.Linear(2, 3), "categorical", data=DataLoader(TensorDataset(x, y), batch_size=10))
    with pytest.raises(errors.DataError, match="labels must be 0 to 2"):
        vf.fit(model, "mean_field", "elbo", steps=8, seed=0, progress=False)
    with pytest.raises(errors.DataError, match="labels must be 0 to 2"):
        model.log_likelihood(torch.zeros(1, model.dim))


def test_new_targets():
    model = smooth_model("gaussian(sd=0.2)")
    z = model.sample_prior(3, generator=seeded(0))
    drawn = model.predictive(z, generator=seeded(1))["y"]
    assert drawn.shape == (3, 12, 1)
    other = model.with_observed({"y": drawn[0]})
    assert torch.equal(other.observed()["y"], drawn[0])
    assert float(other.log_joint(z)[0]) > float(model.log_joint(z)[0])
    with pytest.raises(errors.ShapeError):
        model.with_observed({"y": drawn})


def test_new_targets_spread_as_the_likelihood_says(seed):
    model = smooth_model("gaussian(sd=0.2)")
    z = model.sample_prior(1, generator=seeded(0)).expand(4000, -1)
    drawn = model.predictive(z, generator=rng.generator(seed, "new"))["y"]
    standard = (drawn - model.predict(z[:1], model._data_of(None)[0]).draws) / 0.2
    assert abs(float(standard.square().mean()) - 1) < 5 * math.sqrt(2 / standard.numel())


def test_moved_to_another_precision():
    model = smooth_model()
    moved = model.moved(device=torch.device("cpu"), dtype=torch.float32)
    z = normal(3, model.dim)
    torch.testing.assert_close(moved.log_joint(z.float()), model.log_joint(z).float(), rtol=1e-4, atol=1e-3)


def test_prediction_in_parts_is_the_whole():
    model = smooth_model()
    z, x = normal(7, model.dim), normal(5, 2)
    whole = model.predict(z, x)
    assert isinstance(whole, Prediction)
    torch.testing.assert_close(model.predict(z, x, chunk_draws=2).draws, whole.draws)
    with pytest.raises(errors.ShapeError):
        model.predict(z, torch.zeros(0, 2))


REFUSED = {
    "no data": ({}, errors.ConfigError, "data="),
    "flat": ({"data": (torch.zeros(5, 2), torch.zeros(5))}, errors.ShapeError, r"\(N, 1\)"),
    "alone": ({"data": torch.zeros(5, 2)}, errors.DataError, "inputs and targets"),
    "three": ({"data": (torch.zeros(5, 2),) * 3}, errors.DataError, "3 parts"),
    "precision": ({"data": (torch.zeros(5, 2), torch.zeros(5, 1, dtype=DOUBLE))}, errors.DeviceError, "float64"),
    "width": ({"data": (torch.zeros(5, 3), torch.zeros(5, 1))}, errors.ModelError, r"\(5, 3\)"),
    "weights": ({"data": (torch.zeros(5, 2), torch.zeros(5, 1)), "weights": Dense}, errors.ConfigError, "entry"),
    "weights name": (
        {"data": (torch.zeros(5, 2), torch.zeros(5, 1)), "weights": "densely"},
        errors.UnknownNameError,
        "dense",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    options, kind, match = REFUSED[case]
    with pytest.raises(kind, match=match):
        Network(nn.Linear(2, 1), **options)
