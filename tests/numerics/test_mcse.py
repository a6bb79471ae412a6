"""Effective sample size and MCSE against arviz and an autoregression with known answer."""

import arviz
import numpy as np
import pytest
import torch

from vifamily.errors import ShapeError
from vifamily.numerics.mcse import autocovariance, effective_sample_size, mcse


def autoregression(coefficient: float, time: int, quantity: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(time, quantity, generator=generator, dtype=torch.float64)
    out = noise.clone()
    out[0] /= (1 - coefficient**2) ** 0.5
    for t in range(1, time):
        out[t] += coefficient * out[t - 1]
    return out


def test_autocovariance_equals_the_direct_sum(generator):
    x = torch.randn(37, 2, generator=generator, dtype=torch.float64)
    centred = x - x.mean(0)
    direct = torch.stack([(centred[lag:] * centred[: 37 - lag]).sum(0) / 37 for lag in range(37)])
    torch.testing.assert_close(autocovariance(x), direct, atol=1e-12, rtol=0)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.9, -0.5])
def test_known_effective_size_of_an_autoregression(coefficient, generator):
    # n (1 - a) / (1 + a); the estimate is averaged over 40 independent chains.
    chains = autoregression(coefficient, 4000, 40, generator)
    exact = 4000 * (1 - coefficient) / (1 + coefficient)
    estimates = effective_sample_size(chains)
    assert float(estimates.mean()) == pytest.approx(min(exact, 4000 * np.log10(4000)), rel=0.1)


def test_mcse_is_the_spread_of_means(generator):
    chains = autoregression(0.8, 2000, 200, generator)
    spread = float(chains.mean(0).std())
    # the standard deviation of 200 means is known to 1 / sqrt(2 * 199) = 5 %; five of those
    assert float(mcse(chains).mean()) == pytest.approx(spread, rel=0.25)


def test_close_to_arviz(generator):
    chains = autoregression(0.7, 1000, 3, generator)
    theirs = [float(arviz.ess(chains[:, q].numpy()[None], method="mean")) for q in range(3)]
    np.testing.assert_allclose(effective_sample_size(chains).numpy(), theirs, rtol=0.05)


def test_a_drift_lowers_the_effective_size(generator):
    x = torch.randn(1000, generator=generator, dtype=torch.float64)
    assert float(effective_sample_size(x + torch.linspace(0, 6, 1000))) < 50


def test_constants_and_non_finite_values():
    constant = torch.full((50,), 3.0)
    assert float(effective_sample_size(constant)) == 50.0
    assert float(mcse(constant)) == 0.0
    broken = torch.arange(50.0)
    broken[7] = torch.inf
    assert bool(effective_sample_size(broken).isnan())
    assert bool(mcse(broken).isnan())


@pytest.mark.parametrize("shape", [(7, 2), (7,), (), (8, 3, 2)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match="eight times"):
        mcse(torch.zeros(shape))
