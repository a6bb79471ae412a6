"""Refinement by importance weights: the exact posterior and evidence, from good fits and from bad ones; refusals."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, Uniform

import vifamily as vf
from vifamily.errors import ConfigError, NotAvailableError, VifamilyWarning

COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
POSTERIOR = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + 4 * torch.eye(2))
X = torch.tensor([0.8, -0.4])
MEAN = 4 * POSTERIOR @ X


def simulator(**options):
    given = {"log_likelihood": lambda theta, x: Normal(theta, 0.5).log_prob(x).sum(-1), **options}
    prior = MultivariateNormal(torch.zeros(2), COVARIANCE)
    return vf.models.Simulator(prior, lambda t: t + 0.5 * torch.randn_like(t), **given)


@pytest.fixture(scope="module")
def rough():
    """A fit that was broken off: wide, and off the mean."""
    return vf.fit(simulator(), "full_rank", "inclusive_kl(simulations=500)", encoder="vector", steps=150, seed=0)


def moments_are_right(refined, errors=5.0):
    share = refined.weights.log_weight.exp()
    mean = share @ refined.proposals.double()
    deviation = refined.proposals.double() - mean
    covariance = deviation.T @ (share.unsqueeze(-1) * deviation)
    bound = errors / math.sqrt(refined.ess)
    sd = POSTERIOR.diagonal().sqrt()
    assert float(((mean - MEAN) / sd).abs().max()) < bound
    assert float(((covariance - POSTERIOR) / (sd[:, None] * sd)).abs().max()) < 2 * bound


def test_weights_make_a_rough_posterior_exact(rough):
    before = rough(X).draws(4000)
    assert float((before.T.cov() / POSTERIOR).diagonal().max()) > 1.2
    refined = rough.refine(X, 2000, seed=1)
    moments_are_right(refined)
    evidence = MultivariateNormal(torch.zeros(2), COVARIANCE + 0.25 * torch.eye(2)).log_prob(X)
    assert abs(refined.log_evidence - float(evidence)) < 5 * refined.log_evidence_error
    assert refined.reliable and not refined.tuned and refined.k_hat == refined.k_hat_before
    assert refined.sample["theta"].shape == (2000, 2) and torch.equal(refined.sample["theta"], refined.draws)
    torch.testing.assert_close(refined.mean()["theta"], MEAN, atol=0.06, rtol=0)
    assert "reliable" in str(refined) and "log evidence" in str(refined)
    again = rough.refine(X, 2000, seed=1)
    assert torch.equal(again.draws, refined.draws)


@pytest.fixture(scope="module")
def narrow(rough):
    """The same with a tenth of the spread, and displaced: weights of its draws cannot be trusted."""
    family = rough.family.copy()
    inner = family.family
    inner.scale = inner.scale * 0.1
    inner.shift = inner.shift * 0.1 + 0.5
    return vf.posterior.amortised.AmortisedPosterior(
        rough.simulator, family, rough.record, layout=rough.layout, encoder_spec=rough.encoder_spec,
        config=rough.config,
    )  # fmt: skip


def test_a_narrow_posterior_is_fitted_on_at_the_observation(narrow):
    with pytest.warns(VifamilyWarning, match="k-hat"):
        left = narrow.refine(X, 100, defensive=0.0, tune=False, seed=2)
    assert not left.reliable
    refined = narrow.refine(X, 1000, defensive=0.0, seed=2, steps=400)
    assert refined.tuned and refined.reliable and refined.k_hat < refined.k_hat_before
    moments_are_right(refined)
    # the amortised posterior itself is what it was
    assert float((narrow(X).draws(2000).std(0) / POSTERIOR.diagonal().sqrt()).max()) < 0.6


def test_points_of_the_prior_show_what_was_left_out(narrow):
    refined = narrow.refine(X, 1000, defensive=0.5, pool=20_000, tune=False, seed=3)
    assert refined.reliable
    moments_are_right(refined)


def test_bounded_parameters():
    flat = Uniform(torch.zeros(1), torch.ones(1))
    model = vf.models.Simulator(flat, lambda t: t + 0.2 * torch.randn_like(t),
                                log_likelihood=lambda theta, x: Normal(theta, 0.2).log_prob(x).sum(-1))  # fmt: skip
    posterior = vf.fit(model, "full_rank", "inclusive_kl(simulations=400)", encoder="vector", steps=100, seed=0)
    refined = posterior.refine(torch.tensor([0.05]), 4000, seed=0)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    density = Normal(grid, 0.2).log_prob(torch.tensor(0.05, dtype=torch.float64)).exp()
    evidence = torch.trapezoid(density, grid)
    mean = float(torch.trapezoid(grid * density, grid) / evidence)
    draws = refined.sample["theta"][:, 0]
    assert float(draws.min()) >= 0 and float(draws.max()) <= 1
    assert float(refined.mean()["theta"][0]) == pytest.approx(mean, abs=5 * float(draws.std()) / math.sqrt(refined.ess))
    assert refined.log_evidence == pytest.approx(math.log(float(evidence)), abs=5 * refined.log_evidence_error)


def test_refusals(rough):
    for options in ({"pool": 3}, {"defensive": 1.0}, {"steps": 0}, {"tune": 1}):
        with pytest.raises(ConfigError):
            rough.refine(X, 10, **options)
    with pytest.raises(ConfigError):
        rough.refine(X, 0)
    bare = vf.fit(simulator(log_likelihood=None), "full_rank", "inclusive_kl(simulations=200)", encoder="vector",
                  steps=5)  # fmt: skip
    with pytest.raises(NotAvailableError, match="log_likelihood="):
        bare.refine(X)
    bare.simulator = None
    with pytest.raises(NotAvailableError, match="simulator"):
        bare.refine(X)
