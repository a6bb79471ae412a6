"""Truncated sequential estimation: the exact posterior at one observation, nested regions, what is refused."""

import math

import pytest
import torch

import vifamily as vf
from vifamily.errors import ConfigError
from vifamily.posterior.amortised._truncated import _from_prior, _Region
from vifamily.rng import generator

SD = 0.2


def wide_prior():
    """A prior ten times as wide as the posterior: ``theta`` uniform, ``x ~ N(theta, 0.2^2)``."""
    prior = torch.distributions.Uniform(-4 * torch.ones(2), 4 * torch.ones(2))
    return vf.models.Simulator(prior, lambda t: t + SD * torch.randn_like(t))


def test_the_posterior_at_the_observation():
    x = torch.tensor([1.0, -0.5])
    posterior = vf.amortised.truncated(
        wide_prior(), x, "full_rank", rounds=3, simulations=1000, encoder="vector", seed=0
    )
    theta = posterior.sample(8000)["theta"]
    # the exact posterior is N(x, 0.2^2 I): the prior is flat there
    assert float((theta.mean(0) - x).abs().max()) < 0.25 * SD
    assert float((theta.std(0) / SD - 1).abs().max()) < 0.2
    shares = [float(note.split(": ")[1].split("%")[0]) for note in posterior.record.notes if note.startswith("round")]
    assert len(shares) == 2 and shares[1] <= shares[0] + 1 and shares[1] < 20
    assert math.isfinite(posterior.record.restart_losses[0])


class Disc:
    """A density whose level sets are discs."""

    def log_prob(self, z):
        return -z.square().sum(-1)


def test_the_truncated_prior_is_the_prior_inside_the_region(seed):
    simulator = vf.models.Simulator(torch.distributions.Normal(torch.zeros(2), torch.ones(2)), lambda t: t)
    z, share = _from_prior(simulator, [_Region(Disc(), -4.0), _Region(Disc(), -1.0)], 20_000, generator(seed, "disc"))
    square = z.double().square().sum(-1)
    # the squared radius of two normal coordinates is exponential of mean two
    inside = 1 - math.exp(-0.5)
    assert len(z) == 20_000 and float(square.max()) <= 1.0
    assert abs(share - inside) < 5 * math.sqrt(inside * (1 - inside) / 50_000)
    wanted = 2 - math.exp(-0.5) / inside
    assert abs(float(square.mean()) - wanted) < 5 * float(square.std()) / math.sqrt(len(z))


def test_it_ends_where_nothing_of_the_prior_is_left(monkeypatch):
    monkeypatch.setattr("vifamily.posterior.amortised._truncated._MOST_PROPOSALS", 10_000)
    posterior = vf.amortised.truncated(
        wide_prior(), torch.tensor([1.0, -0.5]), "mean_field", rounds=2, simulations=9000, steps=400, seed=0
    )
    assert any("ended there" in note for note in posterior.record.notes)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"simulations": 5}, {"level": 0.7}])
def test_numbers_are_checked(options):
    with pytest.raises(ConfigError):
        vf.amortised.truncated(wide_prior(), torch.zeros(2), "full_rank", **options)
