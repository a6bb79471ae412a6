"""Stratified mixtures."""

import math

import pytest
import torch

from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, UnknownNameError
from vifamily.families.full_rank import FullRank
from vifamily.families.mean_field import MeanField
from vifamily.families.mixture import Mixture
from vifamily.rng import draw_noise
from vifamily.types import Capability, LatentSpec


def built(dim=1, **options):
    return Mixture(**options).build(LatentSpec(dim), generator=torch.Generator().manual_seed(0))


def noise(family, num, seed=1):
    return draw_noise(family.noise_spec, (num,), torch.Generator().manual_seed(seed))


def test_each_component_draws_from_each_row_of_noise():
    family = built(2, components=3)
    with torch.no_grad():
        family.logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    rows = noise(family, 5)
    draw = family(rows)
    assert draw.z.shape == (15, 2)
    for k, part in enumerate(family.parts):
        torch.testing.assert_close(draw.z.reshape(5, 3, 2)[:, k], part(rows).z)
    weight = draw.log_weight.exp().reshape(5, 3)
    torch.testing.assert_close(weight.sum(0), family.logits.softmax(0))
    assert weight.sum().item() == pytest.approx(1, abs=1e-12)


def test_the_gradient_of_the_weights_flows_through_log_weight():
    # E_q z in one dimension is sum_k w_k mean_k: its gradient in the logits is exact given the component means
    family = built(components=2)
    with torch.no_grad():
        family.parts[0].loc.fill_(-3.0)
        family.parts[1].loc.fill_(5.0)
        family.logits.copy_(torch.tensor([0.3, -0.4]))
    rows = noise(family, 4)
    rows = torch.cat([rows, -rows])
    draw = family(rows)
    (gradient,) = torch.autograd.grad((draw.log_weight.exp() * draw.z[:, 0]).sum(), family.logits)
    w = family.logits.softmax(0)
    expected = w * (torch.tensor([-3.0, 5.0], dtype=torch.float64) - (w * torch.tensor([-3.0, 5.0])).sum())
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-10)


def test_the_stratified_bound_on_the_family_itself_is_zero():
    # against the mixture's own density the bound is zero, and so is the expectation of its gradient
    family = built(components=2)
    with torch.no_grad():
        family.logits.copy_(torch.tensor([0.5, -0.5]))
    target = family.copy()
    draw = family(noise(family, 40_000))
    bound = (draw.log_weight.exp() * (target.log_prob(draw.z) - draw.log_q)).sum()
    assert bound.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(bound, family.logits)
    assert gradient.abs().max().item() < 5 / math.sqrt(40_000)


def test_components_start_apart_around_the_mean():
    family = built(2, components=4)
    family.start_at(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0]))
    locations = torch.stack([part.loc for part in family.parts]).detach()
    mean, covariance = family.moments()
    assert mean.tolist() == pytest.approx([1, 2])
    assert covariance.diagonal().tolist() == pytest.approx([1, 100])
    assert torch.pdist(locations / torch.tensor([1.0, 10.0])).min() > 0.1


def test_one_component_is_that_family():
    family = built(2, components=1, of="full_rank")
    alone = FullRank().build(LatentSpec(2), generator=torch.Generator())
    rows = noise(family, 4)
    torch.testing.assert_close(family(rows).log_q, alone(rows).log_q)


def test_resampling_follows_the_weights():
    family = built(components=2)
    with torch.no_grad():
        family.parts[0].loc.fill_(-30.0)
        family.parts[1].loc.fill_(30.0)
        family.logits.copy_(torch.tensor([math.log(0.2), math.log(0.8)]))
    z = family.sample(10_000, generator=torch.Generator().manual_seed(0))
    assert abs((z > 0).double().mean().item() - 0.8) < 5 * 0.4 / 100
    assert len(z.unique()) == 10_000


def test_components_are_given_as_spec_string_or_entry():
    nested = registry.build("families", "mixture(components=2, of=low_rank(rank=1))")
    assert nested.of.rank == 1
    assert Mixture(of=MeanField(student_t=3)).of.student_t == 3
    assert Mixture(of="mean_field").restrict_scale
    assert not Mixture(of="full_rank").restrict_scale


@pytest.mark.parametrize("components", [0, -2, 1.0, True])
def test_bad_numbers_of_components_are_refused(components):
    with pytest.raises(ConfigError, match="components"):
        Mixture(components=components)


@pytest.mark.parametrize("of", ["mixture", "ensemble", "implicit", "categorical", "ensemble(jitter=0.1)"])
def test_families_that_cannot_be_components_are_refused(of):
    with pytest.raises(IncompatibleError, match="a mixture cannot be made of"):
        Mixture(of=of)


def test_what_is_no_family_is_refused():
    with pytest.raises(ConfigError, match="of must be a family"):
        Mixture(of=3)
    with pytest.raises(UnknownNameError, match="mean_field"):
        Mixture(of="mean_filed")


def test_capabilities_follow_the_components():
    assert Capability.CHEAP_LOG_Q in Mixture(of="full_rank").capabilities
    assert Capability.CHEAP_LOG_Q not in Mixture(of="flow").capabilities
