"""Natural-parameter families: contracts, convexity, angles, amortised fits that end at the exact posterior."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import testing
from vifamily.errors import ConfigError
from vifamily.families.natural import Natural, _angle_quantile
from vifamily.rng import generator
from vifamily.types import LatentSpec, Space


@pytest.mark.parametrize("spec", ["natural", "natural(kind=full)", "natural(kind=full, hidden=[4])"])
def test_the_contracts_of_families(spec):
    assert {"integral", "gradients", "stack", "conditional", "start"} <= set(testing.check_family(spec).passed)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("link", ["softplus", "identity"])
def test_it_starts_at_the_standard_normal_law(kind, link):
    family = Natural(kind=kind, link=link).build(LatentSpec(3), generator=generator(0, "family"))
    mean, covariance = family.moments()
    torch.testing.assert_close(covariance, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(mean.detach().abs().max()) == 0 and family.convex_in_output == (link == "identity")


def test_the_inclusive_fit_ends_at_the_moments_of_the_draws():
    draws = torch.randn(500, 2, generator=generator(0, "draws"), dtype=torch.float64)
    draws = draws @ torch.tensor([[1.0, 0.7], [0.0, 0.5]], dtype=torch.float64) + 3
    model = vf.models.Density(lambda z: 0.0 * z.sum(-1), dim=2).with_reference_draws(draws)
    posterior = vf.fit(model, "natural(kind=full)", "inclusive_kl_draws", "adam", init=torch.zeros(2), seed=0)
    mean, covariance = posterior.family.moments()
    torch.testing.assert_close(mean, draws.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(covariance, draws.T.cov(correction=0), atol=0.05, rtol=0)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 4.0, 500.0])
def test_angles_follow_their_density(kappa, seed):
    latent = LatentSpec(1, space=Space.CIRCLE)
    family = Natural(kind="von_mises").build(latent, generator=generator(0, "family"))
    with torch.no_grad():
        family.output.copy_(kappa * torch.tensor([math.cos(2.5), math.sin(2.5)]))
    draws = family.sample(20_000, generator=generator(seed, "angles"))
    assert float(draws.abs().max()) <= math.pi
    statistics = family.law.statistics(draws)
    error = statistics.std(0) / math.sqrt(len(draws))
    wanted = family.law.mean(family.natural_parameters()).detach()
    assert bool(((statistics.mean(0) - wanted).abs() < 5 * error + 1e-4).all())
    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)
    total = torch.trapezoid(family.log_prob(grid[:, None]).exp(), grid)
    assert float(total.detach()) == pytest.approx(1.0, abs=1e-6)


def test_quantiles_of_angles_under_a_context():
    eta = torch.tensor([[3.0, 0.0, 0.0, 1.0], [0.0, -2.0, 5.0, 0.0]], dtype=torch.float64)
    uniform = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    # the median of a von Mises law is its mode
    wanted = torch.tensor([[[0.0, math.pi / 2], [-math.pi / 2, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(_angle_quantile(uniform, eta), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["natural(kind=full)", "natural", "mixture(components=2, of=full_rank)"])
def test_an_amortised_fit_ends_at_the_exact_posterior(family):
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    simulator = vf.models.Simulator(prior, lambda t: t + torch.randn_like(t))
    posterior = vf.fit(simulator, family, "inclusive_kl(simulations=4000)", encoder="vector", seed=0)
    draws = posterior(torch.tensor([1.0, -0.6])).draws(8000)
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.5, -0.3]), atol=0.12, rtol=0)
    torch.testing.assert_close(draws.var(0), torch.tensor([0.5, 0.5]), atol=0.1, rtol=0)


def test_the_weights_of_a_conditional_mixture_depend_on_the_context(seed):
    # two modes whose weights follow the data: theta is +-2 plus noise, x says which
    def prior(num, generator):
        sign = torch.where(torch.rand(num, 1, generator=generator) < 0.5, -1.0, 1.0)
        return 2 * sign + 0.3 * torch.randn(num, 1, generator=generator)

    def simulate(theta, generator):
        return theta.sign() + torch.randn(theta.shape, generator=generator)

    simulator = vf.models.Simulator(prior, simulate)
    posterior = vf.fit(simulator, "mixture(components=2, of=full_rank)", "inclusive_kl(simulations=4000)", seed=0)
    for x in (-0.8, 0.0, 0.5):
        share = float((posterior(torch.tensor([x])).draws(4000, seed=seed) > 0).double().mean())
        assert share == pytest.approx(1 / (1 + math.exp(-2 * x)), abs=0.08)


@pytest.mark.parametrize("options", [{"kind": "gamma"}, {"link": "exp"}, {"hidden": [0]}])
def test_options_are_checked(options):
    with pytest.raises(ConfigError):
        Natural(**options)


def test_the_contracts_of_a_discrete_law():
    passed = set(testing.check_family("natural(kind=categorical)").passed)
    assert {"integral", "gradients", "stack", "conditional", "draws_follow_density"} <= passed


def test_the_contracts_of_splines():
    passed = set(testing.check_family("natural(kind=spline, basis=8)").passed)
    assert {"integral", "gradients", "stack", "conditional", "start", "draws_follow_density"} <= passed
