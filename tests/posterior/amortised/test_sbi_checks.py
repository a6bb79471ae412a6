"""Calibration under sbi's names: right posteriors pass, broken ones do not."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Uniform

import vifamily as vf
from vifamily.errors import ConfigError, ShapeError
from vifamily.posterior.amortised import (
    AmortisedPosterior,
    calc_misspecification_mmd,
    check_sbc,
    check_tarp,
    run_sbc,
    run_tarp,
)

SIMULATIONS = 300


def simulator():
    """``theta ~ N(0, I)``, ``x ~ N(theta, I)``: the posterior is ``N(x / 2, I / 2)``."""
    return vf.models.Simulator(MultivariateNormal(torch.zeros(2), torch.eye(2)), lambda t: t + torch.randn_like(t))


@pytest.fixture(scope="module")
def fitted():
    return vf.fit(simulator(), "full_rank", "inclusive_kl(simulations=20000)", seed=0)


@pytest.fixture(scope="module")
def narrow(fitted):
    """The same with half the standard deviation."""
    family = fitted.family.copy()
    inner = family.family.transform

    def transform(noise, context):
        return inner(0.5 * noise, context)

    family.family.transform = transform
    return AmortisedPosterior(fitted.simulator, family, fitted.record, layout=fitted.layout)


@pytest.fixture(scope="module")
def pairs():
    made = simulator().simulations(SIMULATIONS, seed=11)
    return made.theta, made.x


def test_ranks_of_a_right_posterior_are_uniform_and_of_a_narrow_one_not(fitted, narrow, pairs):
    theta, x = pairs
    ranks, averaged = run_sbc(theta, x, fitted, 100)
    assert ranks.shape == averaged.shape == (SIMULATIONS, 2) and int(ranks.min()) >= 0 and int(ranks.max()) <= 100
    found = check_sbc(ranks, theta, averaged, 100)
    assert float(found["ks_pvals"].min()) > 0.01
    # five standard errors of an accuracy from 600 guesses
    assert float((found["c2st_dap"] - 0.5).abs().max()) < 5 * 0.5 / 600**0.5
    broken, _ = run_sbc(theta, x, narrow, 100)
    judged = check_sbc(broken, theta, averaged, 100)
    assert float(judged["ks_pvals"].max()) < 1e-4
    assert float(judged["c2st_ranks"].min()) > float(found["c2st_ranks"].max())


def test_the_density_gives_expected_coverage(fitted, pairs):
    theta, x = pairs
    ranks, _ = run_sbc(theta, x, fitted, 100, "log_prob", seed=3)
    # the reference: squared distance from x / 2, which orders the density of the exact posterior
    draws = fitted.draws(x, 100, seed=3)
    far = ((draws - x / 2) ** 2).sum(-1)
    expected = (far > ((theta - x / 2) ** 2).sum(-1)).sum(0)
    assert ranks.shape == (SIMULATIONS, 1)
    assert float((ranks[:, 0] - expected).abs().double().mean()) < 3
    assert float(check_sbc(ranks, theta, theta, 100)["ks_pvals"]) > 0.01


def test_functions_of_parameters_and_data(fitted, pairs):
    theta, x = pairs
    ranks, _ = run_sbc(theta[:50], x[:50], fitted, 40, [lambda t, x: t[:, 0], lambda t, x: (t - x).sum(-1)])
    marginal, _ = run_sbc(theta[:50], x[:50], fitted, 40)
    assert torch.equal(ranks[:, 0], marginal[:, 0]) and ranks.shape == (50, 2)
    with pytest.raises(ConfigError, match="reduce_fns"):
        run_sbc(theta, x, fitted, 40, "means")
    with pytest.raises(ShapeError, match="a row for each datum"):
        run_sbc(theta[:5], x, fitted, 40)


def test_random_points(fitted, narrow, pairs):
    theta, x = pairs
    coverage, credibility = run_tarp(theta, x, fitted, num_posterior_samples=200, num_bins=20)
    assert coverage.shape == credibility.shape == (21,) and float(coverage[-1]) == 1.0
    # the largest distance of an empirical distribution from its own: 1.95 / sqrt(n) in one of a thousand samples
    assert float((coverage - credibility).abs().max()) < 1.95 / SIMULATIONS**0.5
    area, p_value = check_tarp(coverage, credibility)
    assert abs(area) < 0.7 and p_value > 0.05
    worse = run_tarp(theta, x, narrow, num_posterior_samples=200, num_bins=20)
    assert check_tarp(*worse)[0] < -0.7
    with pytest.raises(ConfigError, match="num_bins"):
        run_tarp(theta, x, fitted, num_bins=0)


@pytest.mark.parametrize("mode", ["x_space", "embedding"])
def test_data_that_no_parameter_makes(fitted, pairs, mode):
    _, x = pairs
    like, (null, statistic) = calc_misspecification_mmd(fitted, x[0], x, mode, n_shuffle=200)
    assert like > 0.01 and null.shape == (200,) and isinstance(statistic, float)
    assert calc_misspecification_mmd(fitted, torch.full((3, 2), 9.0), x, mode, n_shuffle=200)[0] < 0.01
    with pytest.raises(ConfigError, match="mode"):
        calc_misspecification_mmd(fitted, x[0], x, "x")


def test_parameters_in_their_support(pairs):
    """Ranks and densities are those of the parameters, not of their logits."""
    box = vf.models.Simulator(Uniform(torch.zeros(1), torch.ones(1)), lambda t: t + 0.1 * torch.randn_like(t))
    posterior = vf.fit(box, "flow(transforms=1, hidden=[16])", "inclusive_kl(simulations=3000)", seed=0)
    made = box.simulations(200, seed=5)
    for way in ("marginals", "log_prob"):
        ranks, averaged = run_sbc(made.theta, made.x, posterior, 100, way)
        assert float(check_sbc(ranks, made.theta, averaged, 100)["ks_pvals"].min()) > 1e-3
        assert float(averaged.min()) >= 0 and float(averaged.max()) <= 1


def test_angles_and_data_of_one_number():
    """An angle seen with noise: distances are on the circle, and data need no axis of their own."""
    prior = torch.distributions.VonMises(torch.zeros(1), torch.ones(1))
    circle = vf.models.Simulator(prior, lambda t: torch.sin(t[:, 0]) + 0.3 * torch.randn(len(t)))
    posterior = vf.fit(circle, "natural(kind=von_mises)", "inclusive_kl(simulations=500)", steps=30, seed=0)
    made = circle.simulations(60, seed=5)
    coverage, credibility = run_tarp(made.theta, made.x, posterior, num_posterior_samples=50)
    turned, _ = run_tarp(made.theta + 2 * torch.pi, made.x, posterior, num_posterior_samples=50)
    assert torch.equal(coverage, turned) and coverage.shape == credibility.shape
    for mode in ("x_space", "embedding"):
        assert calc_misspecification_mmd(posterior, made.x[0], made.x, mode, n_shuffle=50)[0] > 0.01


def test_a_fit_that_goes_on_keeps_its_family(fitted):
    further = vf.fit(simulator(), objective="inclusive_kl(simulations=500)", init=fitted, steps=5, seed=1)
    assert further.record.family == fitted.record.family == "full_rank"
    with pytest.raises(ConfigError, match="leave family out"):
        vf.fit(simulator(), "flow", "inclusive_kl(simulations=500)", init=fitted, steps=5)
