"""The kit's known answers are right: closed forms against quadrature and minimisation."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.testing import targets

GRID = torch.linspace(-12, 12, 1201, dtype=torch.float64)


def mass(model, points, cell):
    return float((model.log_joint(points).exp() * cell).sum())


def test_evidence_of_the_regression_is_its_mass():
    target = targets.linear_regression()
    mean, covariance = target.moments()
    sd = covariance.diagonal().sqrt()
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis) * sd + mean
    with torch.no_grad():
        log_p = target.model.log_joint(points)
        weight = (log_p - target.log_evidence).exp() * float((axis[1] - axis[0]) ** 2 * sd.prod())
    assert float(weight.sum()) == pytest.approx(1, abs=1e-8)
    assert torch.allclose((weight[:, None] * points).sum(0), mean, atol=1e-8)
    apart = points - mean
    found = torch.einsum("n,ni,nj->ij", weight, apart, apart)
    assert torch.allclose(found, covariance, atol=1e-8)


def test_two_normals_is_normalised_with_its_moments():
    target = targets.two_normals()
    mean, covariance = target.moments()
    density = target.model.log_joint(GRID[:, None]).exp() * (GRID[1] - GRID[0])
    assert float(density.sum()) == pytest.approx(1, abs=1e-10)
    assert float((density * GRID**2).sum()) == pytest.approx(float(covariance[0, 0]), abs=1e-8) == pytest.approx(10)
    assert float(mean[0]) == 0


def test_evidence_of_the_discrete_target_is_its_sum():
    target = targets.discrete()
    axes = [torch.arange(n, dtype=torch.float64) for n in target.model.num_categories]
    total = target.model.log_joint(torch.cartesian_prod(*axes)).logsumexp(0)
    assert float(total) == pytest.approx(target.log_evidence, abs=1e-12)
    with pytest.raises(NotAvailableError):
        target.moments()


def test_evidence_of_the_local_target_is_the_product_of_its_integrals():
    target = targets.local_normal()
    model = target.model
    batch = model.batches(6, seed=0).at(0)
    local = GRID[:, None, None].expand(-1, 6, 1)
    with torch.no_grad():
        each = model.log_local(GRID.new_zeros(GRID.shape[0], 0), local, batch).exp().sum(0) * (GRID[1] - GRID[0])
    assert float(each.log().sum()) == pytest.approx(target.log_evidence, abs=1e-8)


def divergence(alpha, log_sd, rho):
    """Minus log of the integral of q^alpha p^(1 - alpha), signed so that less is better, by quadrature."""
    target = targets.correlated_normal(rho)
    axis = torch.linspace(-14, 14, 561, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    sd = math.exp(log_sd)
    log_q = -0.5 * (points / sd).square().sum(-1) - 2 * math.log(sd) - math.log(2 * math.pi)
    log_p = target.model.log_joint(points)
    cell = 2 * math.log(float(axis[1] - axis[0]))
    if alpha == 1:
        return float((log_q.exp() * (log_q - log_p)).sum() * math.exp(cell))
    log_integral = float(torch.logsumexp(alpha * log_q + (1 - alpha) * log_p, 0)) + cell
    value = log_integral / (alpha - 1)
    return -value if alpha < 0 else value


@pytest.mark.parametrize("rho", [0.9, -0.5])
@pytest.mark.parametrize("alpha", [-1.0, 0.1, 0.5, 0.9, 1.0, 2.0])
def test_closed_form_of_mean_field_is_the_minimum_by_quadrature(alpha, rho):
    closed = targets.mean_field_sd(alpha, rho)
    log_sd = math.log(closed)
    found = minimize_scalar(lambda x: divergence(alpha, x, rho), bounds=(log_sd - 0.2, log_sd + 0.2), method="bounded")
    assert found.x == pytest.approx(log_sd, abs=2e-4)


def test_closed_form_falls_with_the_order_from_marginal_to_conditional():
    orders = [0.0, 1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 1 - 1e-6, 1.0]
    sds = [targets.mean_field_sd(alpha, 0.9) for alpha in orders]
    assert sds[0] == pytest.approx(1) and sds[-1] == pytest.approx(math.sqrt(1 - 0.81))
    assert all(a > b for a, b in zip(sds, sds[1:], strict=False))
    with pytest.raises(ConfigError, match="finite"):
        targets.mean_field_sd(math.inf, 0.9)
    with pytest.raises(ConfigError, match="inside"):
        targets.correlated_normal(1.0)
