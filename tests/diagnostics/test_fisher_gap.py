"""The Fisher gap: closed forms, units, posteriors."""

import math

import pytest
import torch

import vifamily as vf
from vifamily.diagnostics import fisher_gap, kernel_stein
from vifamily.errors import ConfigError, DataError, NotAvailableError, ShapeError
from vifamily.models import Density


def draws(size, dim, generator):
    return torch.randn(size, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("weight", ["covariance", "identity"])
def test_gap_between_normal_laws(weight, generator):
    """N(0, v I) for N(0, I): with weight covariance (v - 1)^2 a coordinate, else (v - 1)^2 / v."""
    v = 1.7
    z = math.sqrt(v) * draws(20000, 3, generator)
    gap = fisher_gap(z, -z, -z / v, weight=weight)
    wanted = 3 * (v - 1) ** 2 / (1 if weight == "covariance" else v)
    # the covariance of the draws is itself known to one part in a hundred or so
    assert abs(gap.value - wanted) < 5 * gap.error * (1 + (weight == "covariance"))


def test_no_gap_at_the_posterior(generator):
    z = draws(50, 2, generator)
    assert fisher_gap(z, -z, -z).value == 0.0


def test_the_weighted_gap_does_not_depend_on_units(generator):
    z, p, q = (draws(200, 2, generator) for _ in range(3))
    matrix = torch.tensor([[50.0, 0.0], [3.0, 0.01]], dtype=torch.float64)
    back = torch.linalg.inv(matrix)
    one, other = fisher_gap(z, p, q), fisher_gap(z @ matrix.mT, p @ back, q @ back)
    assert other.value == pytest.approx(one.value, rel=1e-8)


def test_gap_of_a_posterior():
    model = Density(lambda z: -0.5 * (z[:, 0] ** 2 + z[:, 1] ** 2 - 1.8 * z[:, 0] * z[:, 1]) / 0.19, dim=2)
    exact = vf.fit(model, "full_rank", seed=0)
    assert exact.fisher_gap().value < 1e-3
    simple = vf.fit(model, "mean_field", seed=0)
    # mean field by reverse KL: scores differ by rho z_other / 0.19, each with variance 0.19: 2 * 0.81
    gap = simple.fisher_gap(num_draws=4000)
    assert abs(gap.value - 1.62) < 5 * gap.error + 0.02
    assert simple.fisher_gap(weight="identity").value > 5 * gap.value


def test_families_without_density_have_none():
    model = Density(lambda z: -0.5 * z.square().sum(-1), dim=2)
    posterior = vf.fit(model, "ensemble(size=5)", "svgd", seed=0)
    with pytest.raises(NotAvailableError, match="Stein test"):
        posterior.fisher_gap()


def test_bad_input(generator):
    z = draws(5, 2, generator)
    with pytest.raises(ShapeError, match="two scores"):
        fisher_gap(z, z, z[:4])
    with pytest.raises(DataError, match="NaN"):
        fisher_gap(z, z, torch.full_like(z, math.nan))
    with pytest.raises(ConfigError, match="identity"):
        fisher_gap(z, z, z, weight="unit")


@pytest.mark.parametrize("kernel", ["imq", "rbf", "multiscale", "linear"])
def test_stein_tests_with_other_kernels(kernel, generator):
    z = draws(300, 2, generator)
    assert kernel_stein(z, -z, generator=generator, kernel=kernel).p_value > 0.001
    assert kernel_stein(0.6 * z, -0.6 * z, generator=generator, kernel=kernel).p_value < 0.01


def test_a_linear_kernel_sees_moments_only(generator):
    """A law with the moments of the target passes it, and not the others."""
    signs = 2.0 * torch.randint(2, (400, 1), generator=generator).double() - 1
    assert kernel_stein(signs, -signs, generator=generator, kernel="linear").p_value > 0.01
    assert kernel_stein(signs, -signs, generator=generator, kernel="imq").p_value < 0.01
