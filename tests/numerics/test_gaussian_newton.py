"""Newton's method on the bound: one step on Gaussians, the known optimum where the family is too small."""

import math

import pytest
import torch

from vifamily.numerics.gaussian_newton import bounds, gaussian_newton
from vifamily.rng import generator

DOUBLE = torch.float64
COVARIANCE = torch.tensor([[4.0, 1.9], [1.9, 1.0]], dtype=DOUBLE)
PRECISION = torch.linalg.inv(COVARIANCE)
MEAN = torch.tensor([3.0, -2.0], dtype=DOUBLE)


def gaussian(z):
    return -0.5 * (((z - MEAN) @ PRECISION) * (z - MEAN)).sum(-1)


def noise(dim, pairs=8):
    half = torch.randn(pairs, dim, generator=generator(3, "test"), dtype=DOUBLE)
    return torch.stack([half, -half], dim=1).reshape(-1, dim)


def begin(dim, sd=0.5):
    return torch.zeros(1, dim, dtype=DOUBLE), sd * torch.eye(dim, dtype=DOUBLE)[None]


def test_the_bound_of_a_gaussian_at_itself_is_its_evidence():
    root = torch.linalg.cholesky(COVARIANCE)
    many = noise(2, 4000)
    found = float(bounds(gaussian, MEAN[None], root[None], many)[0])
    # the mean of chi-square_2 / 2 over 4,000 antithetic pairs: sd 1 / sqrt(4000)
    assert found == pytest.approx(math.log(2 * math.pi) + 0.5 * float(torch.logdet(COVARIANCE)), abs=5 / 4000**0.5)


def test_a_full_covariance_becomes_that_of_a_gaussian_posterior():
    mean, root, hessian = gaussian_newton(gaussian, *begin(2), noise(2), full=True)
    assert torch.allclose(mean[0], MEAN, atol=1e-6)
    assert torch.allclose(root[0] @ root[0].T, COVARIANCE, atol=1e-6)
    assert torch.allclose(hessian[0], PRECISION, rtol=1e-6)


def test_independent_coordinates_get_the_conditional_sds():
    mean, root, _ = gaussian_newton(gaussian, *begin(2), noise(2), full=False)
    assert torch.allclose(mean[0], MEAN, atol=1e-5)
    assert torch.allclose(root[0], torch.diag(PRECISION.diagonal().rsqrt()), atol=1e-5)


def test_a_log_gamma_posterior_has_the_known_best_gaussian():
    # E log p = a m - exp(m + s^2 / 2): the best Gaussian has s^2 = 1 / a and m = log a - 1 / (2 a)
    a = 4.0
    mean, root, _ = gaussian_newton(lambda z: (a * z - z.exp()).sum(-1), *begin(1), noise(1, 500), full=True)
    # the averaged Hessian uses eight of the draws
    assert float(mean[0, 0]) == pytest.approx(math.log(a) - 1 / (2 * a), abs=0.08)
    assert float(root[0, 0, 0]) == pytest.approx(a**-0.5, rel=0.2)


def test_a_funnel_is_survived_and_rows_are_apart():
    def funnel(z):
        v, x = z[..., 0], z[..., 1:]
        return -0.5 * (v / 3) ** 2 - 0.5 * x.shape[-1] * v - 0.5 * (x**2).sum(-1) * torch.exp(-v)

    means = torch.stack([torch.zeros(5, dtype=DOUBLE), torch.full((5,), torch.nan, dtype=DOUBLE)])
    roots = torch.eye(5, dtype=DOUBLE).expand(2, 5, 5)
    mean, root, _ = gaussian_newton(funnel, means, roots, noise(5), full=True)
    assert bool(torch.isfinite(mean[0]).all())
    assert 0.3 < float((root[0] @ root[0].T)[0, 0].sqrt()) < 6
    # a start that is not finite stays as it was
    assert bool(mean[1].isnan().all())
    assert torch.equal(root[1], roots[1])
