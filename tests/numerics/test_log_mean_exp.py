"""log_mean_exp: value, overflow, axes."""

import math

import pytest
import torch

from vifamily.errors import ShapeError
from vifamily.numerics.log_mean_exp import log_mean_exp


def test_equals_the_direct_formula_on_each_axis(generator):
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    for dim in range(-3, 3):
        torch.testing.assert_close(log_mean_exp(x, dim), x.exp().mean(dim).log(), atol=1e-12, rtol=0)
    assert log_mean_exp(x, 1, keepdim=True).shape == (3, 1, 5)


def test_does_not_overflow_and_keeps_minus_infinity():
    x = torch.tensor([2000.0, -math.inf], dtype=torch.float64)
    assert float(log_mean_exp(x)) == pytest.approx(2000 - math.log(2), abs=1e-10)
    assert float(log_mean_exp(torch.tensor([-math.inf, -math.inf]))) == -math.inf


def test_gradient_is_the_softmax(generator):
    x = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_mean_exp(x, 0), x)
    torch.testing.assert_close(gradient, x.detach().softmax(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("x", [torch.empty(0), torch.empty(3, 0), torch.tensor(1.0)])
def test_nothing_to_average_is_refused(x):
    with pytest.raises(ShapeError, match="at least one number"):
        log_mean_exp(x)
