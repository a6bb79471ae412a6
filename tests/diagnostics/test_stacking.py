"""Mixtures of restarts: weights with known answers, and the mixture as a family."""

import math

import pytest
import torch
from torch.distributions import Normal

from vifamily.diagnostics.stacking import (
    RestartMixture,
    importance_mixture_weights,
    maximise_mixture,
    stacking_weights,
)
from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.families.full_rank import FullRank
from vifamily.families.mean_field import MeanField
from vifamily.rng import draw_noise
from vifamily.types import Capability, LatentSpec


def family_at(mean, sd, entry=None):
    family = (entry or MeanField()).build(LatentSpec(len(mean)), generator=torch.Generator())
    family.start_at(torch.tensor(mean, dtype=torch.float64), torch.tensor(sd, dtype=torch.float64))
    return family


def test_optimality_of_the_weights(generator):
    density = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    point_weight = torch.rand(200, generator=generator, dtype=torch.float64).log()
    pi = maximise_mixture(density, point_weight)
    assert float(pi.sum()) == pytest.approx(1, abs=1e-12)
    w = point_weight.softmax(0)
    gradient = (w[:, None] * density.exp() / (density.exp() @ pi)[:, None]).sum(0)
    # Kuhn-Tucker: gradient one where there is weight, at most one elsewhere
    assert float(gradient.max()) < 1 + 1e-6
    assert bool(((gradient - 1).abs() * pi < 1e-6).all())


def test_two_modes_get_their_masses(generator):
    # p = 0.3 N(-10, 1) + 0.7 N(10, 2^2), a restart in each mode
    a, b = Normal(-10.0, 1.0), Normal(10.0, 2.0)
    z = torch.cat([-10 + torch.randn(20_000, generator=generator), 10 + 2 * torch.randn(20_000, generator=generator)])
    z = z.double()
    log_p = torch.logsumexp(torch.stack([a.log_prob(z) + math.log(0.3), b.log_prob(z) + math.log(0.7)]), 0) + 5
    pi = importance_mixture_weights(log_p, torch.stack([a.log_prob(z), b.log_prob(z)], -1))
    torch.testing.assert_close(pi, torch.tensor([0.3, 0.7], dtype=torch.float64), atol=1e-3, rtol=0)


def test_restarts_that_agree_cost_nothing(generator):
    z = torch.randn(1000, generator=generator, dtype=torch.float64)
    q = Normal(0.0, 1.0).log_prob(z)
    pi = importance_mixture_weights(q, torch.stack([q, q], -1))
    torch.testing.assert_close(pi, torch.tensor([0.5, 0.5], dtype=torch.float64), atol=1e-10, rtol=0)


def test_stacking_prefers_what_predicts():
    pi = stacking_weights(torch.tensor([[0.0, -3.0, -1.0], [-3.0, 0.0, -2.9]], dtype=torch.float64))
    torch.testing.assert_close(pi, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_broken_draws_are_left_out():
    log_q = torch.zeros(4, 2, dtype=torch.float64)
    log_q[:2, 0] = -50
    log_p = torch.tensor([0.0, math.nan, 0.0, -math.inf], dtype=torch.float64)
    assert bool(importance_mixture_weights(log_p, log_q).isfinite().all())
    with pytest.raises(DataError, match="nothing to weigh"):
        importance_mixture_weights(torch.full((4,), math.nan), log_q)
    with pytest.raises(ShapeError):
        importance_mixture_weights(torch.zeros(3), log_q)


@pytest.mark.parametrize("entry", [MeanField(), FullRank()])
def test_mixture_density_and_draws(entry, generator):
    parts = [family_at([-3.0, 0.0], [0.5, 1.0], entry), family_at([2.0, 1.0], [1.0, 2.0], entry)]
    mixture = RestartMixture(parts, torch.tensor([0.25, 0.75]))
    z = mixture.sample(40_000, generator=generator)
    by_hand = torch.logsumexp(
        torch.stack([parts[0].log_prob(z) + math.log(0.25), parts[1].log_prob(z) + math.log(0.75)]), 0
    )
    torch.testing.assert_close(mixture.log_prob(z), by_hand, atol=1e-10, rtol=0)
    share = float((z[:, 0] < -1).double().mean())
    exact = 0.25 * (1 - 0.5 * math.erfc(4 / math.sqrt(2))) + 0.75 * 0.5 * math.erfc(3 / math.sqrt(2))
    assert abs(share - exact) < 5 * math.sqrt(0.19 / 40_000)
    mean, covariance = mixture.moments()
    torch.testing.assert_close(z.mean(0), mean, atol=5 * 2.5 / 200, rtol=0)
    torch.testing.assert_close(z.T.cov(), covariance, atol=0.25, rtol=0)
    draw = mixture(draw_noise(mixture.noise_spec, (500,), generator))
    assert draw.z.shape == (1000, 2)
    assert float(draw.log_weight.exp().sum()) == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(draw.log_q, mixture.log_prob(draw.z), atol=1e-10, rtol=0)
    torch.testing.assert_close(draw.log_weight.exp() @ draw.z, mean, atol=0.4, rtol=0)
    assert mixture.capabilities == {Capability.DRAWS, Capability.LOG_Q, Capability.WEIGHTED}


def test_zero_weight_is_allowed(generator):
    parts = [family_at([0.0], [1.0]), family_at([50.0], [1.0])]
    mixture = RestartMixture(parts, torch.tensor([1.0, 0.0]))
    assert float(mixture.sample(1000, generator=generator).max()) < 10
    z = torch.zeros(1, 1, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(z), parts[0].log_prob(z), atol=1e-12, rtol=0)


def test_bad_mixtures():
    part, other = family_at([0.0], [1.0]), family_at([0.0, 1.0], [1.0, 1.0])
    with pytest.raises(ConfigError, match="one kind"):
        RestartMixture([part, other], torch.tensor([0.5, 0.5]))
    with pytest.raises(ConfigError, match="sum to one"):
        RestartMixture([part, part], torch.tensor([0.5, 0.6]))
    with pytest.raises(ConfigError, match="at least one"):
        RestartMixture([], torch.tensor([]))


def test_restarts_that_draws_cannot_tell_apart_stay_equal(generator):
    # four copies a hair apart: the best weights for these very draws are not equal, the ones that they can tell are
    z = torch.randn(4000, generator=generator, dtype=torch.float64)
    log_q = torch.stack([Normal(1e-3 * r, 1.0).log_prob(z) for r in range(4)], -1)
    log_p = Normal(0.0015, 1.0).log_prob(z)
    pi = importance_mixture_weights(log_p, log_q)
    torch.testing.assert_close(pi, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-12, rtol=0)
    sharp = maximise_mixture(log_q, log_p - torch.logsumexp(log_q, 1))
    assert float((sharp - 0.25).abs().max()) > 1e-4
