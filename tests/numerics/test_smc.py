"""Tempered sequential Monte Carlo: unbiased evidence, exact expectations, laws that are kept, samplers of their own."""

import math

import pytest
import torch

from vifamily.errors import ConfigError
from vifamily.numerics.smc import KERNELS, effective, systematic, tempered_smc

DOUBLE = torch.float64
MEAN = torch.tensor([1.5, -1.0], dtype=DOUBLE)
PRECISION = torch.tensor([[4.0, 1.5], [1.5, 2.0]], dtype=DOUBLE)
COVARIANCE = torch.linalg.inv(PRECISION)
LADDER = [(t / 6) ** 2 for t in range(1, 7)]


def log_start(z):
    return -0.5 * z.square().sum(-1)


def log_target(z):
    # twice as much mass as the start, up to the constant that both leave out
    apart = z - MEAN
    return math.log(2) + 0.5 * math.log(float(torch.det(PRECISION))) - 0.5 * ((apart @ PRECISION) * apart).sum(-1)


def sources(number, seed):
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(number)]


def run(samplers, count, seed, start=log_start, target=log_target, dim=2, **options):
    own = sources(samplers, seed % 10**6)
    z = torch.stack([torch.randn(count, dim, generator=s, dtype=DOUBLE) for s in own])
    return tempered_smc(z, start, target, own, **options)


def apart(values, exact):
    """Standard errors between a mean over samplers and what it should be."""
    return (values.mean(0) - exact).abs() / (values.std(0) / math.sqrt(len(values)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_evidence_is_unbiased_on_a_ladder_fixed_beforehand_with_few_particles(kernel, seed):
    found = run(1500, 12, seed, ladder=LADDER, covariance=COVARIANCE, kernel=kernel, moves=1)
    evidence = found.log_evidence.exp()
    assert float(apart(evidence, 2.0)) < 5
    assert float(evidence.std()) > 0.2, "a test that could not fail says nothing"
    weight = (evidence.unsqueeze(-1) * found.log_weight.exp()).unsqueeze(-1)
    # unnormalised expectations are unbiased too: Z times the moments
    assert bool((apart((weight * found.z).sum(1), 2 * MEAN) < 5).all())
    assert bool((apart((weight * found.z**2).sum(1), 2 * (MEAN**2 + COVARIANCE.diagonal())) < 5).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_expectations_of_a_chosen_ladder_are_those_of_the_target(kernel, seed):
    found = run(100, 500, seed, kernel=kernel)
    weight = found.log_weight.exp().unsqueeze(-1)
    mean = (weight * found.z).sum(1)
    assert bool((apart(mean, MEAN) < 5).all())
    product = (weight * (found.z - MEAN)).mT @ (found.z - MEAN)
    assert bool((apart(product.flatten(1), COVARIANCE.flatten()) < 5).all())
    assert float(apart(found.log_evidence.exp(), 2.0)) < 5
    assert bool((found.ess >= 0.5).all()) and bool((found.stages > 1).all())
    assert float(found.acceptance.mean()) > 0.2


def test_the_bias_falls_as_one_over_the_particles(seed):
    # one temperature more than importance sampling has, and too few moves: the bias is there to be seen
    errors = []
    for samplers, count in ((4000, 64), (4000, 256)):
        found = run(samplers, count, seed, ladder=[0.3, 1.0], covariance=COVARIANCE, kernel="random_walk", moves=1)
        mean = (found.log_weight.exp().unsqueeze(-1) * found.z).sum(1)[:, 0]
        errors.append((float(mean.mean() - MEAN[0]), float(mean.std()) / math.sqrt(samplers)))
    (few, error), (many, other) = errors
    assert few < -10 * error, "towards the start"
    assert abs(few - 4 * many) < 0.25 * abs(few) + 5 * math.hypot(error, 4 * other)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_law_that_is_there_already_is_kept(kernel, seed):
    unit = torch.eye(2, dtype=DOUBLE)
    found = run(400, 50, seed, target=log_start, ladder=[0.5, 1.0], covariance=unit, kernel=kernel, moves=4)
    torch.testing.assert_close(found.log_weight.exp(), torch.full_like(found.log_weight, 1 / 50))
    torch.testing.assert_close(found.log_evidence, torch.zeros(400, dtype=DOUBLE), rtol=0, atol=1e-12)
    if kernel == "pcn":
        torch.testing.assert_close(found.acceptance, torch.ones(400, dtype=DOUBLE))
    for power, exact in ((1, 0.0), (2, 1.0), (4, 3.0)):
        assert bool((apart((found.z**power).mean(1), exact) < 5).all())


def test_the_weights_of_two_modes_are_right(seed):
    def start(z):
        return -0.5 * (z[..., 0] / 4) ** 2

    def target(z):
        modes = torch.stack([math.log(0.25) - 2 * (z[..., 0] + 4) ** 2, math.log(0.75) - 2 * (z[..., 0] - 4) ** 2])
        return modes.logsumexp(0)

    own = sources(100, seed % 10**6)
    z = torch.stack([4 * torch.randn(300, 1, generator=s, dtype=DOUBLE) for s in own])
    found = tempered_smc(z, start, target, own, kernel="random_walk")
    right = (found.log_weight.exp() * (found.z[..., 0] > 0)).sum(-1)
    assert float(apart(right, 0.75)) < 5
    assert float(right.std()) < 0.1


def test_each_sampler_is_what_it_would_be_alone():
    together = run(3, 40, 5)
    for i, source in enumerate(sources(3, 5)):
        z = torch.randn(40, 2, generator=source, dtype=DOUBLE)
        alone = tempered_smc(z, log_start, log_target, [source])
        torch.testing.assert_close(alone.z, together.z[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone.log_evidence, together.log_evidence[i], rtol=1e-10, atol=1e-10)
        assert alone.log_evidence.shape == ()


def test_particles_without_mass_are_lost_and_the_rest_goes_on(seed):
    def half(z):
        return torch.where(z[..., 0] > 0, log_start(z), -torch.inf)

    def undefined(z):
        return torch.where(z[..., 0] > 0, log_start(z), torch.nan)

    for target in (half, undefined):
        found = run(200, 60, seed, target=target, dim=1)
        assert bool(found.log_evidence.isfinite().all())
        assert float((found.log_weight.exp() * (found.z[..., 0] <= 0)).sum()) == 0
        assert float(apart(found.log_evidence.exp(), 0.5)) < 5
        mean = (found.log_weight.exp() * found.z[..., 0]).sum(-1)
        assert float(apart(mean, math.sqrt(2 / math.pi))) < 5


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_target_far_away_is_reached(kernel, seed):
    found = run(20, 200, seed, target=lambda z: -0.5 * ((z - 30) / 0.1).square().sum(-1), kernel=kernel)
    weight = found.log_weight.exp().unsqueeze(-1)
    mean = (weight * found.z).sum(1)
    assert bool(((mean - 30).abs() < 0.1).all())
    # the ratio of the normalisers is 0.1 to the power of two; a walk of three steps at each temperature lags behind
    assert abs(float(found.log_evidence.mean()) - 2 * math.log(0.1)) < (12 if kernel == "random_walk" else 3)


def test_systematic_resampling_is_unbiased_and_rounds(seed):
    weight = torch.tensor([0.07, 0.41, 0.0, 0.52], dtype=DOUBLE)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(seed % 10**6), dtype=DOUBLE)
    index = systematic(weight.log().expand(20000, 4), uniform)
    counts = torch.stack([(index == k).sum(-1) for k in range(4)], -1).double()
    assert bool(((counts - 4 * weight).abs() < 1).all())
    seen = counts.std(0) > 0
    assert bool((apart(counts, 4 * weight)[seen] < 5).all())
    assert float(effective(weight[[0, 0]].log() - (2 * weight[0]).log())) == pytest.approx(1.0)


def test_options_are_checked():
    z, source = torch.zeros(4, 2, dtype=DOUBLE), sources(1, 0)
    for options, match in (
        ({"kernel": "hmc"}, "kernel"),
        ({"ess": 1.5}, "ess"),
        ({"moves": 0}, "moves"),
        ({"ladder": [0.5, 0.2, 1.0]}, "ladder"),
        ({"ladder": [0.5]}, "ladder"),
    ):
        with pytest.raises(ConfigError, match=match):
            tempered_smc(z, log_start, log_target, source, **options)
    with pytest.raises(ConfigError, match="generator for each"):
        tempered_smc(z.expand(3, 4, 2), log_start, log_target, source)
