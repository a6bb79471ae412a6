"""Densities on splines: the basis, the normaliser, distribution functions and quantiles, moments matched."""

import math

import pytest
import torch
from scipy.interpolate import BSpline
from scipy.stats import logistic

from vifamily.errors import ConfigError
from vifamily.numerics.spline_density import SplineDensity, spline_basis

GRID = torch.linspace(-20, 20, 80_001, dtype=torch.float64).unsqueeze(-1)
SCALE = math.sqrt(3) / math.pi


def coefficients(law, size=1.5):
    return size * torch.randn(law.num_outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("count", "degree"), [(4, 1), (7, 2), (9, 3)])
def test_the_basis_is_that_of_scipy(count, degree):
    t = torch.linspace(0, 0.999, 61, dtype=torch.float64)
    knots = [0.0] * degree + torch.linspace(0, 1, count - degree + 1, dtype=torch.float64).tolist() + [1.0] * degree
    found = spline_basis(t, count, degree)
    wanted = torch.as_tensor(BSpline.design_matrix(t.numpy(), knots, degree).toarray())
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(61, dtype=torch.float64), rtol=0, atol=1e-12)


def test_without_coefficients_it_is_the_logistic_law():
    law = SplineDensity(1)
    u = torch.linspace(-6, 6, 41, dtype=torch.float64).unsqueeze(-1)
    zero = torch.zeros(law.num_outputs, dtype=torch.float64)
    wanted = torch.as_tensor(logistic(scale=SCALE).logpdf(u[:, 0].numpy()))
    torch.testing.assert_close(law.log_prob(u, zero), wanted, rtol=1e-10, atol=1e-10)


def test_the_normaliser_and_the_means():
    law = SplineDensity(2, 8, 2)
    eta = coefficients(law)
    one = SplineDensity(1, 8, 2)
    for row in eta.unflatten(0, (2, 7)):
        assert float(torch.trapezoid(one.log_prob(GRID, row).exp(), GRID[:, 0])) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(torch.func.grad(law.log_partition)(eta), law.mean(eta), rtol=1e-12, atol=1e-13)
    hessian = torch.func.jacrev(torch.func.jacrev(law.log_partition))(eta)
    torch.testing.assert_close(law.fisher(eta), hessian, rtol=1e-10, atol=1e-12)
    assert float(torch.linalg.eigvalsh(hessian).min()) > 0  # a minimal family, strictly convex


def test_moments_are_matched():
    law = SplineDensity(2, 8, 2)
    eta = coefficients(law)
    torch.testing.assert_close(law.from_mean(law.mean(eta)), eta, rtol=1e-7, atol=1e-7)


def test_quantiles_invert_the_distribution_function():
    law = SplineDensity(2, 9, 3)
    eta = torch.stack([coefficients(law), -coefficients(law)])
    uniform = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = law.quantile(uniform, eta)
    torch.testing.assert_close(law.cdf(law.place(u), eta), uniform, rtol=1e-10, atol=1e-12)
    # the distribution function is the integral of the density
    one = SplineDensity(1, 9, 3)
    row = eta[0, :8]
    at = torch.tensor([0.3], dtype=torch.float64)
    below = torch.linspace(-20, 0.3, 40_001, dtype=torch.float64).unsqueeze(-1)
    mass = float(torch.trapezoid(one.log_prob(below, row).exp(), below[:, 0]))
    assert float(one.cdf(one.place(at).unsqueeze(0), row)) == pytest.approx(mass, abs=1e-6)


def test_draws_carry_the_gradient_of_the_implicit_function():
    law = SplineDensity(1, 7, 2)
    eta = coefficients(law).requires_grad_()
    uniform = torch.tensor([[0.1], [0.45], [0.9]], dtype=torch.float64)
    for i in range(3):
        (got,) = torch.autograd.grad(law.quantile(uniform, eta)[i, 0], eta)
        wanted, step = torch.zeros_like(got), 1e-6
        for k in range(len(wanted)):
            shift = step * torch.eye(len(wanted), dtype=torch.float64)[k]
            above, below = (law.quantile(uniform, (eta + s * shift).detach())[i, 0] for s in (1, -1))
            wanted[k] = (above - below) / (2 * step)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_draws_have_the_mean_statistics(seed):
    law = SplineDensity(2, 7, 2)
    eta = coefficients(law)
    draws = law.sample(eta.expand(4000, -1), generator=torch.Generator().manual_seed(seed))
    statistics = law.statistics(draws)
    error = statistics.std(0) / math.sqrt(len(draws))
    assert bool(((statistics.mean(0) - law.mean(eta)).abs() < 5 * error).all())


def test_near_a_normal_law():
    law = SplineDensity(2, 16, 2)
    mean, sd = torch.tensor([0.4, -0.6]).double(), torch.tensor([0.7, 0.3]).double()
    uniform = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = law.quantile(uniform, law.near_normal(mean, sd))
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.09
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.08


@pytest.mark.parametrize("options", [{"basis": 2}, {"degree": 0}, {"basis": True}, {"basis": 3, "degree": 3}])
def test_options_are_checked(options):
    with pytest.raises(ConfigError):
        SplineDensity(1, **options)
