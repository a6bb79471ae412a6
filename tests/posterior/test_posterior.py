"""What a posterior gives: draws, moments, weights, checks, exports."""

import math

import numpy as np
import pytest
import torch

from vifamily.errors import ConfigError, NotAvailableError, VifamilyWarning
from vifamily.models.density import Density
from vifamily.posterior import Posterior
from vifamily.types import Space


def test_draws_come_from_the_fits_own_stream(exact):
    assert torch.equal(exact.draws(50), exact.draws(50))
    assert not torch.equal(exact.draws(50), exact.draws(50, seed=4))
    assert torch.equal(exact.draws(50), exact.draws(50, seed=3))  # the record's seed
    assert not torch.equal(exact.draws(50), exact.draws(50, seed=0))  # zero is a seed


def test_sample_is_named_constrained_and_keeps_the_dtype(exact, named, family, record):
    theta = exact.sample(7)
    assert {k: tuple(v.shape) for k, v in theta.items()} == {"mu": (7,), "tau": (7,), "v": (7, 2)}
    assert bool((theta["tau"] > 0).all())
    assert theta["mu"].dtype == torch.float64
    torch.testing.assert_close(exact.columns(7), named.layout.flatten(theta), rtol=0, atol=0)
    single = family("mean_field", [0.0] * 4, [1.0] * 4, dtype=torch.float32)
    posterior = Posterior(None, single, record(), layout=named.layout)
    assert {v.dtype for v in posterior.sample(3).values()} == {torch.float32}


def test_discrete_draws_are_integers(record):
    from vifamily import registry
    from vifamily.types import LatentSpec

    table = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    model = Density(
        lambda theta: table.log()[theta["k"].long() - 1].sum(-1), parameters={"k": ((2,), "integer_interval(1, 3)")}
    )
    assert model.space is Space.DISCRETE
    latent = LatentSpec(2, space=Space.DISCRETE, num_categories=model.num_categories)
    family = registry.build("families", "categorical").build(latent, generator=torch.Generator().manual_seed(0))
    posterior = Posterior(model, family, record(family="categorical"), layout=model.layout)
    k = posterior.sample(500)["k"]
    assert k.dtype == torch.int64
    assert set(k.unique().tolist()) == {1, 2, 3}
    assert math.isfinite(posterior.diagnose().k_hat)
    assert posterior.to_arviz(num_draws=30).posterior["k"].dtype == np.int64


def test_densities(exact, named):
    z = exact.draws(9)
    torch.testing.assert_close(exact.log_prob(z), exact.log_joint(z), atol=1e-10, rtol=0)
    torch.testing.assert_close(exact.log_joint_in_chunks(exact.draws(600)), exact.log_prob(exact.draws(600)))
    assert exact.log_prob(z.reshape(3, 3, 4)).shape == (3, 3)


def test_moments_are_exact_where_closed_and_near_where_not(exact):
    mean, sd = exact.mean(unconstrained=True), exact.sd(unconstrained=True)
    torch.testing.assert_close(mean, torch.tensor([1.0, 0.5, 0, 0], dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(sd, torch.tensor([2.0, 0.3, 1, 1], dtype=torch.float64), atol=1e-12, rtol=0)
    tau = exact.mean(num_draws=20_000)[1]
    known = math.exp(0.5 + 0.3**2 / 2)
    spread = known * math.sqrt(math.expm1(0.3**2))
    assert abs(float(tau) - known) < 5 * spread / math.sqrt(20_000)
    assert float(exact.sd(num_draws=20_000)[1]) == pytest.approx(spread, rel=0.1)
    covariance = exact.covariance(num_draws=100)
    torch.testing.assert_close(covariance, exact.columns(100).T.cov(), atol=1e-12, rtol=0)


def test_summary(exact):
    table = exact.summary(num_draws=10_000)
    assert list(table.to_dict()) == ["mu", "tau", "v[0]", "v[1]"]
    assert abs(table.to_dict()["mu"]["mean"] - 1) < 5 * table.to_dict()["mu"]["mcse"]
    assert table.to_dict()["tau"]["50%"] == pytest.approx(math.exp(0.5), rel=0.02)


@pytest.mark.parametrize("number", [0, -3, 2.5, True, "10"])
def test_bad_numbers_of_draws(exact, number):
    for method in (exact.draws, exact.sample, exact.importance_resample, exact.prior_predictive):
        with pytest.raises(ConfigError, match="num_draws"):
            method(number)


# -- weights ---


def test_importance_resampling_corrects_a_wide_family(named, family, record):
    wide = family("mean_field", [1.5, 0.6, 0.0, 0.0], [3.0, 0.4, 1.3, 1.3])
    posterior = Posterior(named, wide, record(), layout=named.layout)
    theta = posterior.importance_resample(4000)
    _, weights = posterior.importance_weights(16_000)
    assert theta["mu"].shape == (4000,)
    assert abs(float(theta["mu"].mean()) - 1) < 5 * 2 / math.sqrt(min(weights.ess, 4000))
    assert float(theta["mu"].std()) == pytest.approx(2, rel=0.1)
    assert abs(float(posterior.sample(4000)["mu"].std()) - 3) < 0.2  # not corrected: as wide as the family


def test_importance_resampling_says_when_it_is_hopeless(named, family, record):
    narrow = family("mean_field", [1.0, 0.5, 0.0, 0.0], [0.3, 0.05, 0.2, 0.2])
    posterior = Posterior(named, narrow, record(), layout=named.layout)
    with pytest.warns(VifamilyWarning, match="k-hat"):
        posterior.importance_resample(100)


def test_stacking_gives_the_masses_of_modes(two_modes):
    stacked = two_modes.stack()
    weights = stacked.family.mixture_weights
    torch.testing.assert_close(weights, torch.tensor([0.3, 0.7], dtype=torch.float64), atol=1e-3, rtol=0)
    assert "0.300, 0.700" in stacked.record.notes[-1]
    assert stacked.diagnose().k_hat < 0.5
    z = stacked.draws(4000)
    assert abs(float((z < 0).double().mean()) - 0.3) < 5 * math.sqrt(0.21 / 4000)
    assert two_modes.diagnose().k_hat < 0.5  # blind to the mode it misses ...
    assert two_modes.diagnose().restart_rhat > 1.5  # ... which the restarts show
    assert stacked.diagnose().log_evidence.value == pytest.approx(0, abs=0.01)  # the density is normalised
    assert two_modes.diagnose().log_evidence.value == pytest.approx(math.log(0.7), abs=0.01)


def test_predictive_stacking_prefers_the_restart_that_predicts(regression, family):
    good = regression.family
    far = family("mean_field", [float(good.moments()[0]) + 1.0], [0.05])
    posterior = Posterior(regression.model, good, regression.record, layout=regression.layout, restarts=(far, good))
    weights = posterior.stack(method="predictive", num_draws=1000).family.mixture_weights
    assert float(weights[1]) > 0.95


def test_stacking_refuses_what_it_cannot_do(exact, two_modes):
    with pytest.raises(NotAvailableError, match="restarts=4"):
        exact.stack()
    with pytest.raises(ConfigError, match="'importance' or 'predictive'"):
        two_modes.stack(method="guess")
    with pytest.raises(NotAvailableError, match="likelihood per datum"):
        two_modes.stack(method="predictive")


# -- predictions and checks ---


def test_predictive_draws_and_checks(regression):
    y = regression.model.observed()["y"]
    replicated = regression.posterior_predictive(2000)["y"]
    assert replicated.shape == (2000, 20)
    assert torch.equal(replicated, regression.posterior_predictive(2000)["y"])
    variance = 1 / 20 + float(regression.sd()[0]) ** 2  # of the mean of a replicated data set
    assert abs(float(replicated.mean()) - float(regression.mean()[0])) < 5 * math.sqrt(variance / 2000)
    prior = regression.prior_predictive(2000)["y"]
    assert float(prior.mean(1).std()) == pytest.approx(math.sqrt(4 + 1 / 20), rel=0.1)
    found = regression.check(lambda data: data["y"].mean())
    assert 0.2 < found.p_value < 0.8
    assert found.observed == pytest.approx(float(y.mean()))
    assert regression.check(lambda data: data["y"].mean(), prior=True).kind == "prior"
    # the model's spread is one: data ten times as wide are not of it
    assert regression.check(lambda data: data["y"].std() * (10 if data["y"] is y else 1)).p_value == 0


def test_leave_one_out_on_the_conjugate_model(regression):
    y = regression.model.observed()["y"]
    terms = []
    for i in range(20):
        rest = torch.cat([y[:i], y[i + 1 :]])
        precision = 19 + 0.25
        terms.append(
            torch.distributions.Normal(float(rest.sum()) / precision, math.sqrt(1 + 1 / precision)).log_prob(y[i])
        )
    assert regression.loo(num_draws=20_000).elpd == pytest.approx(float(torch.stack(terms).sum()), abs=0.03)


def test_predict_delegates(regression, monkeypatch):
    with pytest.raises(NotAvailableError, match="posterior_predictive"):
        regression.predict(torch.zeros(3))
    monkeypatch.setattr(type(regression.model), "predict", lambda self, z, x, scale: scale * z @ x, raising=False)
    out = regression.predict(torch.ones(1, 3, dtype=torch.float64), num_draws=5, scale=2)
    torch.testing.assert_close(out, 2 * regression.draws(5) @ torch.ones(1, 3, dtype=torch.float64))


def test_what_the_model_cannot_do_is_named(exact):
    for call, word in (
        (exact.loo, "likelihood per datum"),
        (exact.posterior_predictive, "predictive"),
        (exact.prior_predictive, "prior"),
        (lambda: exact.check(lambda d: d["y"]), "predictive"),
    ):
        with pytest.raises(NotAvailableError, match=word):
            call()


def test_without_a_model_draws_stay_and_the_rest_says_why(exact):
    bare = Posterior(None, exact.family, exact.record, layout=exact.layout)
    assert torch.equal(bare.draws(5), exact.draws(5))
    assert torch.equal(bare.log_prob(bare.draws(5)), exact.log_prob(exact.draws(5)))
    bare.summary()
    for call in (lambda: bare.log_joint(bare.draws(2)), bare.importance_resample, bare.loo, bare.posterior_predictive):
        with pytest.raises(NotAvailableError, match="model="):
            call()
    assert "model=" in bare.diagnose().k_hat_note
    assert "log_p" not in bare.to_arviz().sample_stats


# -- ArviZ ---


def test_inference_data(regression, tmp_path):
    import arviz

    data = regression.to_arviz(num_draws=200)
    assert data.posterior["mu"].dims == ("chain", "draw")
    z = regression.draws(200)
    np.testing.assert_allclose(data.sample_stats["log_p"][0], regression.log_joint(z), rtol=1e-12)
    np.testing.assert_allclose(data.sample_stats["log_q"][0], regression.log_prob(z), rtol=1e-12)
    assert float(np.exp(data.sample_stats["log_weight"][0]).sum()) == pytest.approx(1)
    assert data.log_likelihood["y"].shape == (1, 200, 20)
    assert data.posterior_predictive["y"].shape == (1, 200, 20)
    np.testing.assert_array_equal(data.observed_data["y"], regression.model.observed()["y"])
    np.testing.assert_allclose(data.fit_trace["loss"], regression.record.trace["loss"])
    assert "term_log_joint" in data.fit_trace
    pytest.importorskip("h5netcdf")
    path = tmp_path / "fit.nc"
    data.to_netcdf(path, engine="h5netcdf")
    again = arviz.from_netcdf(path, engine="h5netcdf")
    for group in data.groups():
        assert again[group].equals(data[group])
    assert again.posterior.attrs["objective"] == "elbo"
    assert again.posterior.attrs["converged"] == "true"


# -- plots ---


@pytest.mark.parametrize("kind", ["pairs", "marginals", "trace", "khat"])
def test_plots(exact, kind, tmp_path):
    path = tmp_path / "picture.png"
    figure = exact.plot(kind, num_draws=300, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figure.axes


def test_contour_and_reference(family, record):
    model = Density(lambda z: -0.5 * (z**2).sum(-1), dim=2)
    posterior = Posterior(model, family("mean_field", [0.0, 0.0], [1.0, 1.0]), record(), layout=model.layout)
    assert posterior.plot("contour", num_draws=200).axes
    assert posterior.plot("pairs", num_draws=200, reference=np.random.default_rng(0).normal(size=(300, 2))).axes


def test_the_reference_of_a_named_problem_is_shown(family, record):
    from vifamily import registry

    problem = registry.build("problems", "banana")
    dim = problem.model.dim
    posterior = Posterior(
        problem.model,
        family("mean_field", [0.0] * dim, [1.0] * dim),
        record(),
        layout=problem.model.layout,
        problem=problem,
    )
    assert posterior.plot("marginals", num_draws=200).axes
    assert posterior.problem_name == "banana"


def test_plots_that_cannot_be(exact, record):
    with pytest.raises(ConfigError, match="choose one of pairs"):
        exact.plot("pie")
    with pytest.raises(NotAvailableError, match="two unconstrained"):
        exact.plot("contour")
    with pytest.raises(NotAvailableError, match="no trace"):
        Posterior(None, exact.family, record(trace={}), layout=exact.layout).plot("trace")


def test_repr_is_short(exact):
    assert "full_rank" in repr(exact)
    assert "tau" in repr(exact)
