"""Discrete coordinates."""

import itertools
import math

import pytest
import torch

from vifamily.errors import ConfigError
from vifamily.families.categorical import Categorical
from vifamily.rng import draw_noise
from vifamily.types import Capability, LatentSpec, Space


def built(categories, *, seed=0, move=1.0, **options):
    latent = LatentSpec(len(categories), space=Space.DISCRETE, num_categories=categories)
    family = Categorical(**options).build(latent, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        family.logits.add_(
            move * torch.randn(family.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        )
    return family


def test_few_states_are_enumerated_exactly():
    family = built((2, 3, 1))
    draw = family(torch.zeros(1, 0, dtype=torch.float64))
    assert [tuple(int(v) for v in row) for row in draw.z] == list(itertools.product(range(2), range(3), range(1)))
    assert draw.log_weight.logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    assert torch.equal(draw.log_weight, draw.log_q)
    assert {Capability.ENUMERATED, Capability.WEIGHTED} <= family.capabilities
    entropy = -(draw.log_q.exp() * draw.log_q).sum()
    assert family.entropy().item() == pytest.approx(entropy.item(), abs=1e-12)


def test_enumerated_expectations_have_the_exact_gradient():
    family = built((2, 3))
    draw = family(torch.zeros(1, 0, dtype=torch.float64))
    value = (draw.log_weight.exp() * (draw.z[:, 0] * draw.z[:, 1].square())).sum()
    (gradient,) = torch.autograd.grad(value, family.logits)
    p = family.log_probabilities().exp().detach()
    inner = (p[1] * torch.tensor([0.0, 1.0, 4.0])).sum()
    expected = p[0, 1] * (1 - p[0, 1]) * inner
    assert gradient[0, 1].item() == pytest.approx(expected.item(), abs=1e-12)
    assert gradient[0, 2].item() == 0  # the first coordinate has no third category


def test_many_states_are_drawn_by_their_probabilities():
    family = built((2, 5, 3), max_states=10)
    assert Capability.ENUMERATED not in family.capabilities
    assert family.noise_spec.law == "uniform"
    num = 40_000
    draw = family(draw_noise(family.noise_spec, (num,), torch.Generator().manual_seed(1)))
    p = family.log_probabilities().exp().detach()
    for i, size in enumerate((2, 5, 3)):
        for c in range(size):
            frequency = (draw.z[:, i] == c).double().mean().item()
            assert abs(frequency - p[i, c].item()) < 5 * math.sqrt(p[i, c].item() * (1 - p[i, c].item()) / num)
    assert not draw.z.requires_grad
    error = draw.log_q.std().item() / math.sqrt(num)
    assert abs(family.entropy().item() + draw.log_q.mean().item()) < 5 * error


def test_score_function_gradient_points_the_right_way():
    family = built((3, 4), max_states=0)
    exact = built((3, 4))
    num = 100_000
    draw = family(draw_noise(family.noise_spec, (num,), torch.Generator().manual_seed(2)))
    value = draw.z[:, 0] * draw.z[:, 1]
    centred = value - value.mean()
    (score,) = torch.autograd.grad((centred * draw.log_q).mean(), family.logits)
    all_states = exact(torch.zeros(1, 0, dtype=torch.float64))
    (truth,) = torch.autograd.grad((all_states.log_weight.exp() * all_states.z.prod(-1)).sum(), exact.logits)
    assert (score - truth).abs().max().item() < 5 * value.std().item() / math.sqrt(num)


def test_uniform_noise_of_one_stays_inside():
    family = built((2, 5), max_states=0)
    draw = family(torch.ones(1, 2, dtype=torch.float64))
    assert draw.z.tolist() == [[1, 4]]
    assert torch.isfinite(draw.log_q).all()


def test_points_that_are_no_states_have_probability_zero():
    family = built((2, 3))
    z = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert torch.isfinite(family.log_prob(z)).tolist() == [True, False, False, False]


def test_moments_are_those_of_the_codes():
    family = built((2, 4))
    draw = family(torch.zeros(1, 0, dtype=torch.float64))
    mean, covariance = family.moments()
    torch.testing.assert_close(mean, draw.log_weight.exp() @ draw.z)
    torch.testing.assert_close(covariance.diagonal(), draw.log_weight.exp() @ (draw.z - mean) ** 2)


@pytest.mark.parametrize("categories", [None, (2,), (2, 0)])
def test_missing_categories_are_refused(categories):
    latent = LatentSpec(2, space=Space.DISCRETE, num_categories=categories)
    with pytest.raises(ConfigError, match="number of categories"):
        Categorical().build(latent, generator=torch.Generator())


def test_stacked_probabilities_under_vmap_equal_a_loop():
    members = [built((2, 5, 3), seed=s, max_states=10) for s in range(2)]
    noise = torch.rand(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters, buffers = torch.func.stack_module_state(members)

    def call(p, b, n):
        draw = torch.func.functional_call(members[0], (p, b), (n,))
        return draw.z, draw.log_q

    z, log_q = torch.vmap(call)(parameters, buffers, noise)
    for r, member in enumerate(members):
        assert torch.equal(z[r], member(noise[r]).z)
        torch.testing.assert_close(log_q[r], member(noise[r]).log_q)
