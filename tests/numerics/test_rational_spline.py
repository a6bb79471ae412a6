"""Rational-quadratic splines: zuko's values, gradients of every kind."""

import pytest
import torch
import zuko

from vifamily.numerics.rational_spline import rational_spline
from vifamily.rng import scoped

BINS = 6


def made(seed: int, *shape: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(*shape, generator=source, dtype=torch.float64)
    return x, 2 * torch.randn(*shape, 3 * BINS - 1, generator=source, dtype=torch.float64)


def theirs(parameters: torch.Tensor) -> zuko.transforms.MonotonicRQSTransform:
    return zuko.transforms.MonotonicRQSTransform(*parameters.split([BINS, BINS, BINS - 1], -1))


def test_values_are_those_of_zuko() -> None:
    x, parameters = made(0, 200, 3)
    y, log_slope = rational_spline(x, parameters)
    wanted, wanted_slope = theirs(parameters).call_and_ladj(x)
    assert (x.abs() > 5).any()
    assert (y - wanted).abs().max() < 1e-10
    assert (log_slope - wanted_slope).abs().max() < 1e-10


def test_gradients_are_those_of_zuko() -> None:
    x, parameters = (v.requires_grad_() for v in made(1, 100, 2))
    source = torch.Generator().manual_seed(2)
    weights = torch.randn(2, 100, 2, generator=source, dtype=torch.float64)
    found = torch.autograd.grad(rational_spline(x, parameters), (x, parameters), tuple(weights))
    wanted = torch.autograd.grad(theirs(parameters).call_and_ladj(x), (x, parameters), tuple(weights))
    for mine, right in zip(found, wanted, strict=True):
        assert (mine - right).abs().max() < 1e-10 * max(1.0, float(right.abs().max()))


def test_gradients_once_and_twice_against_finite_differences() -> None:
    x, parameters = (v.requires_grad_() for v in made(3, 4, spread=2.0))
    # the checks draw their directions from the global stream
    with scoped(torch.Generator()):
        assert torch.autograd.gradcheck(rational_spline, (x, parameters))
        assert torch.autograd.gradgradcheck(rational_spline, (x, parameters))


def test_only_one_side_is_differentiated() -> None:
    x, parameters = made(4, 5)
    parameters.requires_grad_()
    (grad,) = torch.autograd.grad(rational_spline(x, parameters)[1].sum(), parameters, create_graph=True)
    (again,) = torch.autograd.grad(rational_spline(x, parameters)[1].sum(), parameters)
    assert (grad - again).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_transforms_of_torch_func() -> None:
    x, parameters = made(5, 7)
    each = torch.func.vmap(torch.func.grad(lambda v, p: rational_spline(v, p)[0] + rational_spline(v, p)[1]))
    wide = x.clone().requires_grad_()
    y, log_slope = rational_spline(wide, parameters)
    (wanted,) = torch.autograd.grad((y + log_slope).sum(), wide)
    assert (each(x, parameters) - wanted).abs().max() < 1e-10
    _, tangent = torch.func.jvp(lambda v: rational_spline(v, parameters)[0], (x,), (torch.ones_like(x),))
    assert (tangent - rational_spline(x, parameters)[1].exp()).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_points_and_extreme_parameters_stay_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e6, -5.0, -4.999999, 0.0, 4.999999, 5.0, 1e6], dtype=dtype, requires_grad=True)
    parameters = (1e4 * torch.randn(7, 3 * BINS - 1, generator=torch.Generator().manual_seed(6))).to(dtype)
    parameters.requires_grad_()
    y, log_slope = rational_spline(x, parameters)
    (y.sum() + log_slope.sum()).backward()
    assert y.isfinite().all()
    assert log_slope.isfinite().all()
    assert x.grad is not None
    assert parameters.grad is not None
    assert x.grad.isfinite().all()
    assert parameters.grad.isfinite().all()
    assert torch.equal(x.grad[[0, -1]], torch.ones(2, dtype=dtype))
