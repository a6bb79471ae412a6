"""The bound that semi-implicit draws carry."""

import math

import pytest
import torch

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.families.semi_implicit import SemiImplicit
from vifamily.rng import draw_noise
from vifamily.types import LatentSpec


def linear(mixing_draws):
    """Mean 2 e and unit noise, so that the marginal is N(0, 5)."""
    family = SemiImplicit(mixing_draws=mixing_draws).build(LatentSpec(1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        family.net.unit.zero_()
        family.net.skip.fill_(2.0)
        family.log_scale.zero_()
    return family


def excess(mixing_draws, num=20_000):
    """Mean and standard error of (bound - exact log density) at draws."""
    family = linear(mixing_draws)
    with torch.no_grad():
        draw = family(draw_noise(family.noise_spec, (num,), torch.Generator().manual_seed(1)))
        exact = torch.distributions.Normal(0.0, math.sqrt(5)).log_prob(draw.z[:, 0])
    gap = draw.log_q - exact
    return gap.mean().item(), gap.std().item() / math.sqrt(num)


def test_the_bound_lies_above_the_log_density_and_tightens():
    gaps = {k: excess(k) for k in (1, 5, 50)}
    for mean, error in gaps.values():
        assert mean > 5 * error
    assert gaps[1][0] > gaps[5][0] + 5 * gaps[1][1] > gaps[50][0]
    assert gaps[50][0] < 0.05


def test_one_mixing_draw_matches_its_formula():
    family = linear(1)
    noise = torch.tensor([[0.5, 1.0, -0.3]], dtype=torch.float64)
    draw = family(noise)
    assert draw.z.item() == pytest.approx(2.5)
    normal = torch.distributions.Normal(torch.tensor([2.0, -0.6], dtype=torch.float64), 1.0)
    expected = normal.log_prob(torch.tensor(2.5, dtype=torch.float64)).exp().mean().log()
    assert draw.log_q.item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_average_at_given_points_is_a_density():
    family = SemiImplicit().build(LatentSpec(1), generator=torch.Generator().manual_seed(0))
    t = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    assert torch.trapezoid(family.log_prob(t[:, None]).exp(), t).item() == pytest.approx(1, abs=1e-8)


def test_estimators_that_would_mix_two_densities_are_refused():
    family = linear(3)
    assert family.log_q_is_bound and SemiImplicit.log_q_is_bound
    with pytest.raises(NotAvailableError, match="reparameterised"):
        family.log_prob(torch.zeros(1, 1, dtype=torch.float64), frozen=True)


@pytest.mark.parametrize("options", [{"mixing_draws": 0}, {"noise_dim": -1}, {"hidden": "wide"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SemiImplicit(**options)
