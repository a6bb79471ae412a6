"""Gaussian approximations to start from: exact where they can be, alive where the mode is degenerate."""

import math

import pytest
import torch

from vifamily.numerics.gaussian_start import best_start, laplace, mean_field_fixed_draws, negative_curvature
from vifamily.rng import generator

SCALES = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
CORRELATION = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, -0.1], [0.2, -0.1, 1.0]], dtype=torch.float64)
MEAN = torch.tensor([2e-3, -5.0, 4e3], dtype=torch.float64)
COVARIANCE = SCALES.unsqueeze(-1) * CORRELATION * SCALES
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(z):
    centred = z - MEAN.to(z)
    return -0.5 * ((centred @ PRECISION.to(z)) * centred).sum(-1)


def funnel(z):
    # the mode of (v, x_1, ..., x_4) runs off to v = -infinity
    v, x = z[..., 0], z[..., 1:]
    return -0.5 * (v / 3) ** 2 - 0.5 * x.shape[-1] * v - 0.5 * (x**2).sum(-1) * torch.exp(-v)


def start(dim=3, seed=0):
    return 4 * torch.rand(dim, generator=generator(seed, "test"), dtype=torch.float64) - 2


def test_curvature_of_a_quadratic_is_exact_in_any_units():
    found = negative_curvature(gaussian, MEAN, 1e-2 * SCALES)
    unit = SCALES.unsqueeze(-1) * SCALES
    assert torch.allclose(found * unit, PRECISION * unit, atol=1e-6, rtol=1e-6)
    assert torch.equal(found, found.T)


def test_curvature_has_second_order_error():
    def log_density(z):
        return torch.sin(z[:, 0]) * torch.exp(z[:, 1])

    x = torch.tensor([0.7, 0.3], dtype=torch.float64)
    exact = -torch.autograd.functional.hessian(lambda v: log_density(v.unsqueeze(0))[0], x)
    errors = [float((negative_curvature(log_density, x, h) - exact).abs().max()) for h in (2e-2, 1e-2)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_the_laplace_approximation_of_a_gaussian_is_that_gaussian(seed):
    mode, factor = laplace(gaussian, start(seed=seed))
    assert float(((mode - MEAN) / SCALES).abs().max()) < 1e-5
    assert torch.allclose((factor @ factor.T) / (SCALES.unsqueeze(-1) * SCALES), CORRELATION, atol=1e-5)
    assert torch.equal(factor, factor.tril())


def test_the_laplace_approximation_of_a_log_gamma_density():
    shape = torch.tensor([0.7, 5.0, 40.0], dtype=torch.float64)
    mode, factor = laplace(lambda z: (shape * z - z.exp()).sum(-1), start())
    assert torch.allclose(mode, shape.log(), atol=1e-5)
    assert torch.allclose(factor.diagonal(), shape.rsqrt(), rtol=1e-4)


@pytest.mark.parametrize(
    "log_density",
    [
        funnel,
        lambda z: -(z**4).sum(-1),  # flat at its mode
        lambda z: z.sum(-1),  # no mode
        lambda z: (z**2).sum(-1),  # a minimum
        lambda z: torch.full_like(z[:, 0], torch.nan) * z[:, 0],
    ],
    ids=["funnel", "quartic", "slope", "bowl", "nan"],
)
def test_there_is_no_laplace_approximation_at_a_degenerate_mode(log_density):
    found = laplace(log_density, start())
    if found is not None:  # a quartic has curvature wherever the search stops short of its mode: then it must be close
        mode, factor = found
        assert log_density(mode.unsqueeze(0))[0] > -1e-3
        assert bool(torch.isfinite(factor).all())


def test_mean_field_on_fixed_draws_finds_the_best_mean_field_gaussian():
    half = torch.randn(64, 3, generator=generator(1, "test"), dtype=torch.float64)
    half = half / half.square().mean(0).sqrt()  # draws with exact second moments make the fixed-draw optimum exact
    mean, log_sd = mean_field_fixed_draws(
        lambda z: -0.5 * ((z - 3) ** 2 / torch.tensor([0.25, 1.0, 9.0])).sum(-1),
        start(), torch.zeros(3, dtype=torch.float64), torch.cat([half, -half]),
    )  # fmt: skip
    assert torch.allclose(mean, torch.full_like(mean, 3.0), atol=1e-4)
    assert torch.allclose(log_sd.exp(), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("full", [True, False])
def test_the_best_start_of_a_gaussian(full):
    found = best_start(gaussian, start(), generator=generator(0, "test"), full=full)
    assert float(((found.mean - MEAN) / SCALES).abs().max()) < 0.02
    if full:
        covariance = found.scale @ found.scale.T
        assert torch.allclose(covariance / (SCALES.unsqueeze(-1) * SCALES), CORRELATION, atol=0.02)
        evidence = 0.5 * 3 * math.log(2 * math.pi) + 0.5 * float(torch.logdet(CORRELATION)) + float(SCALES.log().sum())
        # the mean of -chi2_3 / 2 over 32 antithetic pairs has a standard error of 0.22
        assert found.elbo == pytest.approx(evidence, abs=1.1)
    else:
        # the best mean field of a Gaussian has the conditional sds
        assert torch.allclose(found.scale, PRECISION.diagonal().rsqrt(), rtol=0.1)


@pytest.mark.parametrize("full", [True, False])
def test_the_best_start_survives_a_funnel(full):
    found = best_start(funnel, start(5), generator=generator(0, "test"), full=full)
    assert found.method != "laplace"
    assert bool(torch.isfinite(found.mean).all())
    sd = found.scale if found.scale.dim() == 1 else found.scale.norm(dim=-1)
    assert 0.3 < float(sd[0]) < 6  # v ~ normal(0, 3)
    assert abs(float(found.mean[0])) < 6


def test_no_candidate_is_finite_on_a_density_that_is_not():
    assert best_start(lambda z: z.sum(-1) * torch.nan, start(), generator=generator(0, "test")) is None


def test_a_wall_of_non_finite_values_is_survived():
    def log_density(z):
        # log z - z with NaN for z <= 0, seen from a start beyond the wall's edge
        return torch.where(z > 0, z.clamp_min(1e-300).log() * 3 - z, torch.nan).sum(-1)

    mode, factor = laplace(log_density, torch.tensor([8.0], dtype=torch.float64))
    assert float(mode) == pytest.approx(3.0, rel=1e-4)
    assert float(factor) == pytest.approx(math.sqrt(3.0), rel=1e-3)


def test_it_repeats_and_keeps_precision_and_leaves_gradients_alone():
    point = start().float()
    a, b = (best_start(gaussian, point, generator=generator(0, "test")) for _ in range(2))
    assert a.mean.dtype == torch.float32
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.scale, b.scale)
    assert not a.mean.requires_grad
    assert not point.requires_grad


def test_it_works_where_gradients_are_switched_off():
    with torch.no_grad():
        found = best_start(gaussian, start(), generator=generator(0, "test"))
    assert found is not None


def test_above_the_largest_dimension_no_hessian_is_formed():
    calls = []

    def log_density(z):
        calls.append(z.shape[0])
        return -0.5 * (z**2).sum(-1)

    found = best_start(log_density, start(6), generator=generator(0, "test"), longest_hessian=5)
    assert found.method == "mean field on fixed draws"
    assert found.scale.shape == (6,)
    assert 12 not in calls
