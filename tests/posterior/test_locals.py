"""Local latents of a conjugate model, drawn after a fit with minibatches."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import vifamily as vf

NOISE = 0.5


def data() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 1.5 + 1.2 * torch.randn(24, generator=generator, dtype=torch.float64)


def log_local(theta: object, local: dict[str, Tensor], x: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(local["code"]) + Normal(local["code"], NOISE).log_prob(x)


@pytest.fixture(scope="module")
def posterior() -> vf.Posterior:
    model = vf.models.LikelihoodModel(None, None, data=data(), local={"code": ((), "real")}, log_local=log_local)
    return vf.fit(model, family="mean_field", batch_size=8, seed=0, steps=2000, progress=False)


def test_local_draws_have_the_exact_moments(posterior: vf.Posterior) -> None:
    """Normal prior, normal likelihood: the code of datum x is N(x / (1 + s^2), s^2 / (1 + s^2))."""
    num_draws = 4000
    draws = posterior.sample_local(num_draws)["code"]
    assert draws.shape == (num_draws, 24)
    shrink = 1 / (1 + NOISE**2)
    sd = (NOISE**2 * shrink) ** 0.5
    # five standard errors of the draws, and what the stopping rule leaves
    assert ((draws.mean(0) - shrink * data()).abs() / sd).max() < 5 / num_draws**0.5 + 0.05
    assert (draws.std(0) / sd).log().abs().max() < 5 / (2 * num_draws) ** 0.5 + 0.05


def test_chosen_data_come_in_the_order_asked(posterior: vf.Posterior) -> None:
    some = posterior.sample_local(2000, index=[5, 2])["code"].mean(0)
    every = posterior.sample_local(2000)["code"].mean(0)
    assert torch.allclose(some, every[[5, 2]], atol=5 * 2 * 0.45 / 2000**0.5)


def test_positions_out_of_range_are_refused(posterior: vf.Posterior) -> None:
    with pytest.raises(vf.errors.ConfigError, match="positions from 0 to 23"):
        posterior.sample_local(10, index=[24])


def test_posterior_without_local_latents_says_so() -> None:
    plain = vf.fit("correlated_normal", family="mean_field", steps=20, progress=False)
    with pytest.raises(vf.errors.NotAvailableError, match="local latents"):
        plain.sample_local(10)
