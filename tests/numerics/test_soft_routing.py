"""Soft routing: digits at small alpha, gradients, limits, weights, extremes."""

import math

import mpmath
import pytest
import torch

from vifamily.numerics.soft_routing import power_value, route

ALPHAS = [0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 2.5, 10.0]


def example(scale, generator, units=60):
    """Log likelihoods of eight members below zero, with unequal weights."""
    a = -200 * torch.rand(1, units, generator=generator) - scale * torch.randn(8, units, generator=generator).abs()
    return a, torch.randn(8, generator=generator)


def exact(a, logits, alpha):
    """The value of each unit in forty digits."""
    with mpmath.workdps(40):
        total = mpmath.log(sum(mpmath.exp(mpmath.mpf(float(x))) for x in logits))
        weights = [mpmath.exp(mpmath.mpf(float(x)) - total) for x in logits]
        out = []
        for column in a.T.tolist():
            if alpha == 0:
                out.append(-sum(w * mpmath.mpf(x) for w, x in zip(weights, column, strict=True)))
            else:
                powers = [w * mpmath.exp(alpha * mpmath.mpf(x)) for w, x in zip(weights, column, strict=True)]
                out.append(-mpmath.log(sum(powers)) / alpha)
        return torch.tensor([float(x) for x in out], dtype=torch.float64)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1000.0])
def test_no_digits_are_lost_at_any_alpha(alpha, scale, generator):
    a, logits = example(scale, generator)
    wanted = exact(a, logits, alpha)
    single = power_value(a, logits, alpha).double()
    double = power_value(a.double(), logits.double(), alpha)
    assert float(((single - wanted) / wanted).abs().max()) < 1e-6
    assert float(((double - wanted) / wanted).abs().max()) < 1e-14


def test_the_direct_form_would_fail_that():
    # the test above can fail: this is what a plain log-sum-exp makes of the same numbers
    a, logits = example(1.0, torch.Generator().manual_seed(0))
    direct = -torch.logsumexp(logits.log_softmax(0)[:, None] + 1e-6 * a, 0) / 1e-6
    assert float(((direct.double() - exact(a, logits, 1e-6)) / exact(a, logits, 1e-6)).abs().max()) > 1e-4


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_gradients_are_those_of_the_value(alpha, scale, generator):
    a, logits = (x.double() for x in example(scale, generator, 5))
    a, logits = a / 50, logits.requires_grad_()
    a.requires_grad_()
    inputs = (a, logits)
    first = torch.autograd.grad(power_value(*inputs, alpha).sum(), inputs, create_graph=True)
    along = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
    slope = sum((g * v).sum() for g, v in zip(first, along, strict=True))
    second = torch.autograd.grad(slope, inputs, allow_unused=True)

    def gradient_at(step):
        moved = [(x + step * v).detach().requires_grad_() for x, v in zip(inputs, along, strict=True)]
        value = power_value(*moved, alpha).sum()
        return value, torch.autograd.grad(value, moved)

    (above, up), (below, down) = gradient_at(1e-5), gradient_at(-1e-5)
    assert slope.item() == pytest.approx((above - below).item() / 2e-5, rel=1e-6, abs=1e-7)
    for curve, g, h in zip(second, up, down, strict=True):
        assert torch.allclose(torch.zeros_like(g) if curve is None else curve, (g - h) / 2e-5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_in_single_precision_are_responsibilities(alpha, generator):
    # in a log likelihood minus the responsibility, in a weight's logit (pi - w) / alpha summed over units
    a, logits = example(3.0, generator)
    a.requires_grad_()
    logits.requires_grad_()
    to_a, to_logits = torch.autograd.grad(power_value(a, logits, alpha).sum(), [a, logits])
    double, weights = a.detach().double(), logits.detach().double().softmax(0)
    w = route(double, weights.log(), alpha).responsibility
    assert torch.allclose(to_a.double(), -w, rtol=0, atol=2e-6)
    if alpha >= 1e-6:
        assert torch.allclose(to_logits.double(), ((weights[:, None] - w) / alpha).sum(1), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 1e-3, 0.3, 1.0, 4.0])
def test_fit_and_cost_add_up_and_are_what_they_are_called(alpha, generator):
    a, logits = (x.double() for x in example(5.0, generator))
    routed = route(a, logits, alpha)
    weights, w = logits.softmax(0)[:, None], routed.responsibility
    assert torch.allclose(w.sum(0), torch.ones(60, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(routed.fit + routed.cost, routed.value, rtol=1e-13)
    assert torch.allclose(routed.fit, -(w * a).sum(0), rtol=1e-13)
    assert bool((routed.cost >= 0).all())
    if alpha >= 1e-3:
        assert torch.allclose(routed.cost, (w * (w / weights).log()).sum(0) / alpha, rtol=1e-6, atol=1e-10)
    else:
        # half alpha times the variance over members, to first order
        spread = (weights * (a - (weights * a).sum(0)) ** 2).sum(0)
        assert torch.allclose(routed.cost, 0.5 * alpha * spread, rtol=1e-4, atol=1e-12)


def test_responsibilities_are_the_best_ones(generator):
    # any others give a larger sum of fit and cost
    a, logits = (x.double() for x in example(2.0, generator, 4))
    routed, weights = route(a, logits, 0.7), logits.softmax(0)[:, None]
    for _ in range(50):
        other = torch.rand(8, 4, generator=generator, dtype=torch.float64)
        other = other / other.sum(0)
        worse = -(other * a).sum(0) + (other * (other / weights).log()).sum(0) / 0.7
        assert bool((worse > routed.value).all())


def test_value_falls_with_alpha_between_mean_and_best(generator):
    a, _ = example(2.0, generator)
    logits = torch.zeros(8)
    values = torch.stack([power_value(a.double(), logits.double(), alpha) for alpha in (0.0, 1e-9, 0.01, 0.5, 1, 20)])
    assert bool((values[:-1] >= values[1:] - 1e-9).all())
    least = -a.double().amax(0)
    assert bool((values[-1] >= least - 1e-9).all())
    assert bool((values[-1] <= least + torch.tensor(8.0).log() / 20 + 1e-9).all())


@pytest.mark.parametrize("alpha", [1e-6, 0.5, 1.0])
def test_impossible_units_of_one_member_leave_value_and_gradient_finite(alpha):
    a = torch.tensor([[-torch.inf, -1.0], [-2.0, -1e4]], dtype=torch.float64, requires_grad=True)
    routed = route(a, torch.zeros(2, dtype=torch.float64), alpha)
    (gradient,) = torch.autograd.grad(routed.value.sum(), [a])
    assert bool(torch.isfinite(routed.value).all()) and bool(torch.isfinite(gradient).all())
    assert routed.value[0].item() == pytest.approx(2 + math.log(2) / alpha, rel=1e-12)
    assert torch.allclose(routed.fit + routed.cost, routed.value, rtol=1e-9)
    assert route(a, torch.zeros(2, dtype=torch.float64), 0.0).value[0].item() == math.inf


def test_leading_axes_are_carried(generator):
    a = torch.randn(3, 2, 5, 7, generator=generator, dtype=torch.float64)
    logits = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    together = route(a, logits, 0.6)
    assert together.value.shape == (3, 2, 7) and together.responsibility.shape == (3, 2, 5, 7)
    for i in range(3):
        for j in range(2):
            assert torch.allclose(together.value[i, j], power_value(a[i, j], logits[i, j], 0.6), atol=1e-13)
    mapped = torch.vmap(torch.vmap(lambda a, w: power_value(a, w, 0.6)))(a, logits)
    assert torch.allclose(mapped, together.value, atol=1e-13)
