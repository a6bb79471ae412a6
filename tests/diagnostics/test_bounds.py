"""Bounds on the log evidence against a pair of normals, where everything is known."""

import math

import pytest
import torch

from vifamily.diagnostics.bounds import Estimate, cubo, divergence_bound, elbo, iwae, log_evidence, wasserstein_bounds
from vifamily.errors import ConfigError, ShapeError, VifamilyWarning

LOG_Z = 1.7
SD = 1.3  # q = N(0, SD^2) on p = exp(LOG_Z) N(0.5, 1)


def ratios(size, generator):
    z = SD * torch.randn(size, generator=generator, dtype=torch.float64)
    log_p = LOG_Z + torch.distributions.Normal(0.5, 1.0).log_prob(z)
    return z, log_p - torch.distributions.Normal(0.0, SD).log_prob(z)


def log_power(order):
    """Log of the integral of p^n q^(1 - n), in closed form."""
    a = order - (order - 1) / SD**2
    b = 0.5 * order
    return order * LOG_Z + 0.5 * b**2 / a - 0.5 * order * 0.25 - 0.5 * math.log(a) + (order - 1) * math.log(SD)


def test_elbo_and_evidence(generator):
    _, x = ratios(50_000, generator)
    kl = -math.log(1 / SD) * -1 + (SD**2 + 0.25) / 2 - 0.5  # KL(N(0, SD^2) || N(0.5, 1))
    kl = -math.log(SD) + (SD**2 + 0.25) / 2 - 0.5
    found = elbo(x)
    assert abs(found.value - (LOG_Z - kl)) < 5 * found.error
    found = log_evidence(x)
    assert abs(found.value - LOG_Z) < 5 * found.error
    assert log_power(1) == pytest.approx(LOG_Z)


def test_errors_are_the_spread_over_repetitions(generator):
    _, x = ratios(200 * 500, generator)
    for estimator in (elbo, log_evidence, cubo):
        parts = [estimator(part) for part in x.split(500)]
        spread = torch.tensor([p.value for p in parts]).std()
        claimed = sum(p.error for p in parts) / len(parts)
        assert float(spread) == pytest.approx(claimed, rel=0.3)


def test_iwae_lies_between_and_one_draw_is_the_elbo(generator):
    _, x = ratios(20_000, generator)
    assert iwae(x, 1).value == pytest.approx(elbo(x).value, abs=1e-12)
    assert elbo(x).value < iwae(x, 4).value < iwae(x, 64).value < log_evidence(x).value
    with pytest.raises(ConfigError, match="two groups"):
        iwae(x[:10], 6)


def test_cubo_is_the_closed_form(generator):
    _, x = ratios(200_000, generator)
    found = cubo(x)
    assert abs(found.value - log_power(2) / 2) < 5 * found.error
    with pytest.raises(ConfigError, match="above 1"):
        cubo(x, 1.0)


def test_bounds_on_moments_hold(generator):
    z, x = ratios(50_000, generator)
    exact = log_power(2) - 2 * LOG_Z  # D_2(p || q)
    assert divergence_bound(x).value > exact
    found = wasserstein_bounds(z[:, None], x)
    assert found["mean_error"] > 0.5
    assert found["sd_error"] > SD - 1
    assert found["k_hat"] < 0.7
    perfect = wasserstein_bounds(z[:, None], torch.zeros_like(x))
    assert perfect["w1"] == perfect["w2"] == perfect["covariance_error"] == 0


def test_hopeless_ratios_give_infinity():
    z = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    with pytest.warns(VifamilyWarning, match="bounds nothing"):
        found = wasserstein_bounds(z, torch.arange(50.0) * 50)
    assert found["w1"] == math.inf and found["k_hat"] > 0.7


def test_text():
    assert str(Estimate(-3.21, 0.021)) == "-3.21 ± 0.021"


@pytest.mark.parametrize("function", [elbo, log_evidence, cubo])
@pytest.mark.parametrize("shape", [(1,), (3, 2), ()])
def test_bad_shapes(function, shape):
    with pytest.raises(ShapeError, match="two draws"):
        function(torch.zeros(shape))


def test_draws_that_do_not_match():
    with pytest.raises(ShapeError, match="ratios"):
        wasserstein_bounds(torch.zeros(3, 2), torch.zeros(4))
