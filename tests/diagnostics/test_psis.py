"""PSIS: sign, tail index on known cases, degenerate weights."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from vifamily.diagnostics.psis import draws_needed, k_hat_threshold, psis
from vifamily.errors import ConfigError, ShapeError


@pytest.mark.parametrize("index", [0.1, 0.25, 0.5, 0.7, 1.2])
def test_tail_index_of_pareto_weights(index, generator):
    # w = u ** -k has a generalised Pareto tail of shape k exactly, below k = 1/3 too
    repeats = [psis(-index * torch.rand(4000, generator=generator, dtype=torch.float64).log()) for _ in range(30)]
    estimate = np.array([r.k_hat for r in repeats])
    tail = math.ceil(3 * math.sqrt(4000))
    shrunk = (tail * index + 10 * 0.5) / (tail + 10)  # the prior pulls towards one half
    assert abs(estimate.mean() - shrunk) < 5 * estimate.std() / math.sqrt(30) + 0.02
    # the reported error is the spread over repetitions (a standard deviation of 30 is known to 13 %)
    reported = np.mean([r.k_hat_error for r in repeats])
    assert 0.5 < estimate.std() / reported < 1.6


def test_normal_family_that_is_too_narrow_has_the_known_index(generator):
    # q = N(0, s^2) on p = N(0, 1): w ~ z^2 (1/s^2 - 1) / 2 on the log scale, tail index 1 - s^2
    narrow = 0.5
    z = narrow * torch.randn(20_000, generator=generator, dtype=torch.float64)
    ratio = torch.distributions.Normal(0.0, 1.0).log_prob(z) - torch.distributions.Normal(0.0, narrow).log_prob(z)
    assert psis(ratio).k_hat == pytest.approx(1 - narrow**2, abs=0.25)
    assert not psis(ratio).reliable
    # the sign: the reversed ratios belong to a family that is too wide, whose weights are bounded
    assert psis(-ratio).k_hat < 0.3


def test_bounded_weights_have_a_negative_index(generator):
    assert psis(torch.rand(4000, generator=generator, dtype=torch.float64).log()).k_hat < -0.5


def test_equal_weights_are_perfect():
    for x in (torch.zeros(100), 1e-13 * torch.arange(100, dtype=torch.float64) - 1234.5):
        found = psis(x)
        assert found.k_hat == 0.0
        assert found.ess == pytest.approx(100)
        assert found.reliable


def test_smoothing_recovers_a_known_mean(generator):
    # E_p z^2 = 1 from draws of a narrower normal, at an index of 0.19
    z = 0.9 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    ratio = -0.5 * z**2 + 0.5 * (z / 0.9) ** 2
    found = psis(ratio)
    assert float(torch.logsumexp(found.log_weight, 0)) == pytest.approx(0, abs=1e-10)
    estimate = float((found.log_weight.exp() * z**2).sum())
    assert abs(estimate - 1) < 5 * math.sqrt(2 / found.ess) * 1.5
    assert abs(float((z**2).mean()) - 0.81) < 0.05  # and uncorrected it is not one


def test_dead_and_broken_draws(generator):
    x = torch.randn(1000, generator=generator, dtype=torch.float64)
    x[:100] = -math.inf
    x[100] = math.nan
    x[101] = math.inf
    found = psis(x)
    assert found.non_finite == 2
    assert bool((found.log_weight[:102] == -math.inf).all())
    assert math.isfinite(found.k_hat)
    nothing = psis(torch.full((50,), -math.inf))
    assert nothing.k_hat == math.inf
    assert not nothing.reliable


def test_one_draw_that_carries_everything_is_unreliable():
    x = torch.zeros(1000, dtype=torch.float64)
    x[0] = 5000.0
    found = psis(x)
    assert found.k_hat == math.inf
    assert found.ess == pytest.approx(1)


def test_input_is_left_alone(generator):
    x = torch.randn(100, generator=generator, dtype=torch.float64)
    before = x.clone()
    psis(x)
    assert torch.equal(x, before)


def test_threshold():
    assert k_hat_threshold(100) == pytest.approx(0.5)
    assert k_hat_threshold(2154) < 0.7 == k_hat_threshold(2155)
    with pytest.raises(ConfigError, match="two draws"):
        k_hat_threshold(1)


def test_draws_needed():
    assert draws_needed(-1) == 10
    assert draws_needed(0.7) == pytest.approx(10 ** (1 / 0.3))
    assert draws_needed(1.0) == draws_needed(math.nan) == draws_needed(1 - 1e-9) == math.inf


@pytest.mark.parametrize("shape", [(24,), (30, 1), ()])
def test_bad_shapes(shape):
    with pytest.raises(ShapeError, match="25 draws"):
        psis(torch.zeros(shape))


def test_agrees_with_a_maximum_likelihood_fit(generator):
    # an independent fit of the same tail: scipy's, without the pull towards one half
    x = -0.5 * torch.rand(20_000, generator=generator, dtype=torch.float64).log()
    weight = np.sort(np.exp(x.numpy()))
    tail = math.ceil(3 * math.sqrt(20_000))
    shape, _, _ = stats.genpareto.fit(weight[-tail:] - weight[-tail - 1], floc=0)
    assert psis(x).k_hat == pytest.approx((tail * shape + 5) / (tail + 10), abs=0.02)
