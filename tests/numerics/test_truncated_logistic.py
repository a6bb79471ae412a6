"""Normal scores under a logistic law that is cut to the unit interval."""

import itertools
import math

import pytest
import torch

from vifamily.numerics.truncated_logistic import truncated_logistic_inverse, truncated_logistic_score

LOCATIONS = (-5.0, -0.1, 0.0, 0.3, 0.98, 1.4, 6.0)
WIDTHS = (1e-3, 0.02, 0.16, 2.0, 50.0)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(("loc", "width"), list(itertools.product(LOCATIONS, WIDTHS)))
def test_the_inverse_is_one_and_the_jacobian_is_the_slope(loc, width):
    v = torch.linspace(-8, 8, 161, dtype=torch.float64).requires_grad_()
    z, log_slope = truncated_logistic_inverse(v, number(loc), number(width))
    (inverse_slope,) = torch.autograd.grad(z.sum(), v)
    assert float((log_slope.detach() + inverse_slope.log()).abs().max()) < 1e-7
    back, again = truncated_logistic_score(z, number(loc), number(width))
    assert float((back - v).detach().abs().max()) < 1e-7
    assert float((again - log_slope).detach().abs().max()) < 1e-7


@pytest.mark.parametrize(("loc", "width"), [(0.3, 0.2), (-0.5, 0.1), (1.0, 0.05)])
def test_a_normal_score_has_the_cut_logistic_density(loc, width):
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    z = torch.logit(t)
    v, log_slope = truncated_logistic_score(z, number(loc), number(width))
    density = (torch.distributions.Normal(0.0, 1.0).log_prob(v) + log_slope).exp() / (t * (1 - t))
    r = (t - loc) / width
    plain = torch.sigmoid(r) * torch.sigmoid(-r) / width
    mass = torch.sigmoid(number((1 - loc) / width)) - torch.sigmoid(number(-loc / width))
    torch.testing.assert_close(density, plain / mass, rtol=1e-9, atol=0)


def test_inside_the_interval_it_is_nearly_linear():
    t = torch.linspace(0.47, 0.53, 13, dtype=torch.float64)
    v, _ = truncated_logistic_score(torch.logit(t), number(0.5), number(0.02))
    slope = v.diff() / t.diff()
    assert float(slope.max() / slope.min()) < 1.2


def test_single_precision_and_the_ends_of_the_interval_stay_finite():
    z = torch.tensor([-87.0, -20.0, 0.0, 16.0, 80.0], requires_grad=True)
    for loc, width in itertools.product(LOCATIONS, WIDTHS):
        place, size = torch.tensor(loc, requires_grad=True), torch.tensor(width, requires_grad=True)
        v, log_slope = truncated_logistic_score(z, place, size)
        assert v.dtype == log_slope.dtype == torch.float32
        assert bool(v.isfinite().all()) and bool(log_slope.isfinite().all())
        gradients = torch.autograd.grad(v.sum() + log_slope.sum(), [z, place, size])
        assert all(bool(g.isfinite().all()) for g in gradients)


def test_gradients_are_those_of_finite_differences():
    z = torch.tensor([-3.0, -0.2, 0.4, 2.5], dtype=torch.float64, requires_grad=True)
    loc = torch.tensor([0.2, 0.5, 1.1, -0.2], dtype=torch.float64, requires_grad=True)
    width = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(truncated_logistic_score, (z, loc, width))
    assert torch.autograd.gradcheck(truncated_logistic_inverse, (z, loc, width))


def test_it_passes_through_vmap():
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    mapped = torch.func.vmap(lambda one: truncated_logistic_score(one, number(0.4), number(0.2))[0])(z)
    torch.testing.assert_close(mapped, truncated_logistic_score(z, number(0.4), number(0.2))[0])
    assert math.isfinite(float(mapped.sum()))
