"""Amortised fits by objectives with a likelihood: known optima, the axis of data, observations, refusals."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, Uniform

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, NotAvailableError, ShapeError
from vifamily.models import SimulatorAtData
from vifamily.posterior.amortised import AmortisedFamily, Vector
from vifamily.posterior.amortised._at_data import FamilyAtData
from vifamily.types import Batch, LatentSpec

VARIANCE = 0.1
COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.0]])


def correlated(noise=0.5, **options):
    """``theta ~ N(0, C)``, ``x ~ N(theta, 0.25 I)``: the posterior is normal, its coordinates dependent."""
    prior = MultivariateNormal(torch.zeros(2), COVARIANCE)
    given = {"log_likelihood": lambda theta, x: Normal(theta, noise).log_prob(x).sum(-1), **options}
    return vf.models.Simulator(prior, lambda t: t + noise * torch.randn_like(t), **given)


PRECISION = torch.linalg.inv(COVARIANCE) + torch.eye(2) / 0.25
POSTERIOR = torch.linalg.inv(PRECISION)
X = torch.tensor([0.8, -0.4])
MEAN = POSTERIOR @ X / 0.25


@pytest.fixture(scope="module")
def pairs():
    return correlated().simulations(2500, seed=3)


def fitted(objective, family="mean_field", **options):
    simulator = options.pop("simulator", None)
    return vf.fit(correlated() if simulator is None else simulator, family, objective, encoder="vector", seed=0,
                  **options)  # fmt: skip


def test_elbo_takes_the_conditional_spread_and_inclusive_kl_the_marginal_one(pairs):
    simulator = correlated().with_simulations(pairs)
    conditional, marginal = PRECISION.diagonal().rsqrt(), POSTERIOR.diagonal().sqrt()
    for objective, sd, least in (("elbo", conditional, 0.03), ("inclusive_kl", marginal, 0.09)):
        posterior = fitted(objective, simulator=simulator, steps=600)
        draws = posterior(X).draws(20_000)
        assert float((draws.std(0) / sd - 1).abs().max()) < least, objective
        assert float((draws.mean(0) - MEAN).abs().max()) < 0.1 * float(sd.min()), objective
    assert float((conditional / marginal).max()) < 0.95


def test_the_value_of_the_elbo_is_the_evidence_where_the_family_holds_the_posterior(pairs):
    posterior = fitted("elbo", "full_rank", simulator=correlated().with_simulations(pairs), steps=600)
    marginal = COVARIANCE + 0.25 * torch.eye(2)
    entropy = 0.5 * float(torch.logdet(2 * math.pi * math.e * marginal))
    # 250 held-out data: minus the log density of two normal coordinates has variance one
    assert abs(posterior.record.restart_losses[0] - entropy) < 5 / math.sqrt(250) + 0.02
    assert posterior.record.estimator == "stl"
    assert posterior.record.draws_per_step % 2 == 0
    draws = posterior(X).draws(20_000)
    assert float((draws.T.cov() / POSTERIOR - 1).abs().max()) < 0.1


@pytest.mark.parametrize("objective", ["iwae", "renyi(alpha=0.5)", "reweighted_wake", "msc", "smc_wake(refresh=4)"])
def test_the_others_find_it_too(objective, pairs):
    posterior = fitted(objective, "full_rank", simulator=correlated().with_simulations(pairs), steps=400)
    draws, sd = posterior(X).draws(10_000), POSTERIOR.diagonal().sqrt()
    wide = 3.0 if objective == "iwae" else 1.0  # its own q is wider
    assert float(((draws.mean(0) - MEAN) / sd).abs().max()) < 0.2 * wide
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.15 * wide


def test_smc_wake_from_the_prior_fits_a_mixture_at_every_datum(pairs):
    # weighted draws of mixtures are no start for a sampler, the prior is; runs are kept for each datum
    simulator = correlated().with_observations(torch.cat([X[None], pairs.x[:7]]))
    posterior = fitted("smc_wake(refresh=5, keep=2)", "mixture(components=2)", simulator=simulator, steps=300, draws=64)
    assert posterior.record.estimator == "from_prior"
    draws, sd = posterior(X).draws(10_000), POSTERIOR.diagonal().sqrt()
    assert float(((draws.mean(0) - MEAN) / sd).abs().max()) < 0.15
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.15


def test_a_positive_parameter_is_fitted_through_its_transform():
    # x given a rate: ten waiting times, summed; the posterior is Gamma(2 + 10, 1 + x)
    prior = torch.distributions.Gamma(torch.tensor([2.0]), torch.tensor([1.0]))

    def simulate(rate):
        return torch.distributions.Gamma(torch.full_like(rate, 10.0), rate).sample()

    def log_likelihood(rate, x):
        return torch.distributions.Gamma(torch.full_like(rate, 10.0), rate).log_prob(x).sum(-1)

    simulator = vf.models.Simulator(prior, simulate, log_likelihood=log_likelihood)
    posterior = vf.fit(simulator, "full_rank", "elbo", encoder="vector(hidden=[32])", seed=0, steps=500)
    for x in (3.0, 8.0):
        draws = posterior(torch.tensor([x])).sample(20_000)["theta"][:, 0]
        exact = torch.distributions.Gamma(12.0, 1.0 + x)
        assert float(draws.mean() / exact.mean - 1) == pytest.approx(0, abs=0.05)
        assert float(draws.std() / exact.stddev - 1) == pytest.approx(0, abs=0.15)


# -- the axis of data --------------------------------------------------------------------------------------------------
def at_data(spec="full_rank"):
    source = torch.Generator().manual_seed(1)
    options = {"dtype": torch.float64, "device": torch.device("cpu")}
    encoder = Vector(hidden=(8,), outputs=3).build((2,), generator=source, **options)
    family = registry.build("families", spec).build(LatentSpec(2, context_dim=3), generator=source)
    x = torch.randn(4, 2, generator=source, dtype=torch.float64)
    return AmortisedFamily(encoder, family), x, source


@pytest.mark.parametrize("spec", ["full_rank", "mixture(components=2)", "natural", "flow(kind=maf, hidden=[8])"])
def test_each_row_is_the_family_at_its_datum(spec):
    module, x, source = at_data(spec)
    view = FamilyAtData(module, x)
    noise = torch.randn(4, 6, *view.noise_spec.shape, generator=source, dtype=torch.float64)
    if view.noise_spec.law == "uniform":
        noise = torch.special.ndtr(noise)
    draw = view(noise)
    for i in range(4):
        alone = module.at(x[i])
        one = alone(noise[i])
        torch.testing.assert_close(draw.z[i], one.z)
        torch.testing.assert_close(draw.log_q[i], one.log_q)
        torch.testing.assert_close(view.log_prob(draw.z)[i], alone.log_prob(one.z))
    if "entropy" in {str(c).split()[-1] for c in view.capabilities}:
        assert view.entropy().shape == (4,)


def test_a_frozen_density_stops_the_gradient_to_the_encoder_as_well():
    module, x, _ = at_data()
    z = torch.zeros(4, 3, 2, dtype=torch.float64, requires_grad=True)
    frozen = FamilyAtData(module, x).log_prob(z, frozen=True).sum()
    (path,) = torch.autograd.grad(frozen, z, retain_graph=True)
    assert float(path.abs().max()) > 0
    assert all(g is None for g in torch.autograd.grad(frozen, list(module.parameters()), allow_unused=True))


@pytest.mark.parametrize("objective", ["elbo(estimator=stl)", "elbo(estimator=score)", "iwae", "reweighted_wake"])
def test_the_loss_at_data_is_that_of_each_datum(objective):
    module, x, source = at_data()
    simulator = correlated(dtype=torch.float64)
    noise = torch.randn(4, 6, 2, generator=source, dtype=torch.float64)
    view, model = FamilyAtData(module, x), SimulatorAtData(simulator).given(x)
    loss = registry.build("objectives", objective).resolve(model, view)
    together = loss.loss(view, model, noise)
    assert together.value.shape == (4,)
    for i in range(4):
        alone = loss.loss(FamilyAtData(module, x[i : i + 1]), SimulatorAtData(simulator).given(x[i : i + 1]),
                          noise[i : i + 1])  # fmt: skip
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-10, atol=1e-10)


# -- data and refusals -------------------------------------------------------------------------------------------------
def test_observations_are_learnt_from(pairs):
    x = pairs.x[:400]
    posterior = fitted("elbo", "full_rank", simulator=correlated().with_observations(x), steps=400)
    assert any("360 observations to learn from, 40 held out" in note for note in posterior.record.notes)
    draws = posterior(X).draws(10_000)
    assert float((draws.mean(0) - MEAN).abs().max()) < 0.1
    few = fitted("reweighted_wake", "full_rank", simulator=correlated().with_observations(X[None]), steps=300)
    there = few(X).draws(10_000)
    assert float((there.mean(0) - MEAN).abs().max()) < 0.03
    assert float((there.T.cov() / POSTERIOR - 1).abs().max()) < 0.1
    # minus the evidence lower bound is minus the log evidence where q is the posterior
    evidence = MultivariateNormal(torch.zeros(2), COVARIANCE + 0.25 * torch.eye(2)).log_prob(X)
    assert few.record.restart_losses[0] == pytest.approx(-float(evidence), abs=0.002)
    with pytest.raises(ShapeError, match="shape of simulations"):
        fitted("elbo", simulator=correlated().with_observations(torch.zeros(3, 5)), steps=5)


def test_the_same_seed_gives_the_same_fit(pairs):
    simulator = correlated().with_simulations(pairs)
    one, two = (fitted("iwae", simulator=simulator, steps=15)(X).draws(3, seed=0) for _ in range(2))
    assert torch.equal(one, two)


def test_without_a_likelihood_it_says_what_to_give():
    bare = correlated(log_likelihood=None)
    with pytest.raises(IncompatibleError, match=r"log_likelihood=.*inclusive_kl") as raised:
        vf.fit(bare, objective="elbo")
    assert raised.value.missing == ("model: log joint",)
    by_draws = vf.models.Simulator(lambda n: torch.randn(n, 2), lambda t: t, log_likelihood=lambda t, x: t.sum(-1))
    with pytest.raises(IncompatibleError, match="log_prob"):
        vf.fit(by_draws, "full_rank", "elbo")


def test_what_cannot_be_averaged_over_data_is_refused(pairs):
    simulator = correlated().with_simulations(pairs)
    for objective in ("annealed", "f_divergence", "roc_arc"):
        with pytest.raises(IncompatibleError, match="state"):
            fitted(objective, "full_rank", simulator=simulator, steps=5)
    with pytest.raises(IncompatibleError):
        fitted("fisher", simulator=simulator, steps=5)
    with pytest.raises(ConfigError, match="batch_size"):
        fitted("inclusive_kl", simulator=simulator, draws=4, steps=5)


def test_draws_at_each_datum(pairs):
    simulator = correlated().with_simulations(pairs)
    assert fitted("iwae", simulator=simulator, draws=5, batch_size=50, steps=5).record.draws_per_step == 250
    with pytest.raises(ConfigError, match="draws"):
        fitted("iwae", simulator=simulator, draws=1, steps=5)


def test_plan_sees_the_likelihood():
    assert vf.plan(correlated(), "full_rank", "elbo").solver is not None
    with pytest.raises(IncompatibleError):
        vf.plan(correlated(log_likelihood=None), "full_rank", "elbo")


def test_the_angle_of_a_circle_is_refused_with_the_space_named():
    unit = vf.models.Simulator(Uniform(torch.zeros(1), torch.ones(1)), lambda t: t)
    with pytest.raises(IncompatibleError, match="circle"):
        vf.fit(unit, "natural(kind='von_mises')", "inclusive_kl", steps=5)


# -- wake and sleep ----------------------------------------------------------------------------------------------------
def test_the_loss_of_wake_and_sleep_is_the_sum_of_both():
    module, x, source = at_data()
    noise = torch.randn(4, 6, 2, generator=source, dtype=torch.float64)
    z, simulated = (torch.randn(9, 2, generator=source, dtype=torch.float64) for _ in range(2))
    view, model = FamilyAtData(module, x), SimulatorAtData(correlated(dtype=torch.float64)).given(x)
    loss, wake = (
        registry.build("objectives", spec).resolve(model, view)
        for spec in ("reweighted_wake(sleep=0.25, estimator=wake)", "reweighted_wake(estimator=wake)")
    )
    both = loss.loss(view, model, noise, Batch((z, simulated), 9))
    sleep = -module.log_prob(z, simulated).mean()
    torch.testing.assert_close(both.terms["sleep"], sleep.detach())
    alone = wake.loss(view, model, noise)
    torch.testing.assert_close(both.surrogate, 0.75 * alone.surrogate + 0.25 * sleep)
    torch.testing.assert_close(both.value, 0.75 * alone.value + 0.25 * sleep.detach())
    with pytest.raises(NotAvailableError, match="pairs"):
        loss.loss(view, model, noise)


def test_wake_alone_knows_the_observation_and_with_sleep_the_model_as_well():
    far = torch.tensor([-1.5, 1.0])
    simulator = correlated().with_observations(X[None])
    errors = {}
    for spec in ("reweighted_wake", "reweighted_wake(sleep=0.5)"):
        posterior = fitted(spec, "full_rank", simulator=simulator, steps=400)
        there = posterior(X).draws(10_000).mean(0) - MEAN
        assert float(there.abs().max()) < 0.06, spec
        errors[spec] = float((posterior(far).draws(10_000).mean(0) - POSTERIOR @ far / 0.25).abs().max())
    assert errors["reweighted_wake(sleep=0.5)"] < 0.2 < errors["reweighted_wake"]


def test_a_sleep_phase_needs_a_simulator_with_a_likelihood():
    with pytest.raises(IncompatibleError, match="simulation"):
        vf.fit("correlated_normal", "mean_field", "reweighted_wake(sleep=0.5)")
    with pytest.raises(IncompatibleError, match="log_likelihood="):
        vf.fit(correlated(log_likelihood=None), "full_rank", "reweighted_wake(sleep=0.5)")
    with pytest.raises(ConfigError, match="sleep"):
        registry.build("objectives", "reweighted_wake(sleep=1.0)")
