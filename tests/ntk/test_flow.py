"""The flow of a kernel that stays: matrix exponentials, and the rotation toy at infinite width."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import nn

from vifamily.errors import ConfigError, DataError, NotAvailableError, ShapeError
from vifamily.ntk import jacobian_gram, ntk_product, predicted_flow, relu_kernel
from vifamily.ntk._loss import curvature_of, gradient_of
from vifamily.rng import generator, scoped

DOUBLE = torch.float64
MEAN = math.exp(-0.5 * 0.5**2)  # mean resultant length of a rotation with noise of 0.5


def squares(y):
    return lambda f: 0.5 * (f - y).square().sum(1)


def circle(count):
    angle = 2 * math.pi * torch.arange(count, dtype=DOUBLE) / count
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def von_mises(x):
    def loss(eta):
        length = (eta.square().sum(1) + 1e-20).sqrt()
        return torch.special.i0e(length).log() + length - MEAN * (eta * x).sum(1)

    return loss


@pytest.fixture
def net(seed):
    with scoped(generator(seed, "net")):
        return nn.Sequential(nn.Linear(3, 9, dtype=DOUBLE), nn.Tanh(), nn.Linear(9, 2, dtype=DOUBLE))


@pytest.mark.parametrize("route", ["matrix", "products"])
def test_squares_follow_the_matrix_exponential(seed, net, route) -> None:
    source = generator(seed, "x")
    x, y = (torch.randn(4, d, generator=source, dtype=DOUBLE) for d in (3, 2))
    gram, start = jacobian_gram(net, x), net(x).detach()
    kernel = gram if route == "matrix" else lambda v: ntk_product(net, x, v)
    times = [0.0, 0.3, 2.0]
    flow = predicted_flow(kernel, squares(y), start, times, tolerance=1e-9)
    for t, found in zip(times, flow.outputs, strict=True):
        known = y.reshape(-1) + torch.linalg.matrix_exp(-gram * t / 4) @ (start - y).reshape(-1)
        torch.testing.assert_close(found.reshape(-1), known, rtol=0, atol=1e-6)
    assert (flow.loss.diff() < 0).all()
    torch.testing.assert_close(flow.loss[0], squares(y)(start).mean(), rtol=0, atol=1e-12)


def test_outputs_elsewhere_are_those_of_a_linear_model(seed) -> None:
    source = generator(seed, "x")
    x, other = (torch.randn(n, 3, generator=source, dtype=DOUBLE) for n in (5, 4))
    y = torch.randn(5, 1, generator=source, dtype=DOUBLE)
    # weights follow w' = X^T (y - X w) / 5, in closed form through the eigenvectors of X^T X
    flow = predicted_flow(x @ x.T, squares(y), torch.zeros(5, 1, dtype=DOUBLE), [1.5], tolerance=1e-10)
    cross = x.T @ x
    weight = torch.linalg.solve(cross, (torch.eye(3, dtype=DOUBLE) - torch.linalg.matrix_exp(-0.3 * cross)) @ x.T @ y)
    found = flow.elsewhere(other @ x.T, torch.zeros(4, 1, dtype=DOUBLE))
    torch.testing.assert_close(found[0], other @ weight, rtol=0, atol=1e-7)


def test_the_rotation_toy_at_infinite_width_is_one_number() -> None:
    x, times = circle(24), np.array([1.0, 20.0, 200.0, 2000.0])
    gram = torch.kron(relu_kernel(x), torch.eye(2, dtype=DOUBLE))
    flow = predicted_flow(gram, von_mises(x), torch.zeros(24, 2, dtype=DOUBLE), times, tolerance=1e-10)
    # the first harmonic has eigenvalue 1/8 on the circle; 24 points add the alias of harmonics 23 and 25, of odd order
    known = integrate.solve_ivp(
        lambda _, c: (MEAN - special.i1e(c) / special.i0e(c)) / 8,
        (0, 2000),
        [0.0],
        t_eval=times,
        rtol=1e-10,
        atol=1e-12,
    ).y[0]
    for c, found in zip(known, flow.outputs, strict=True):
        torch.testing.assert_close(found, float(c) * x, rtol=0, atol=1e-5)


def test_derivatives_of_a_loss_are_those_of_finite_differences(seed) -> None:
    x = circle(6)
    loss, at = von_mises(x), torch.randn(6, 2, generator=generator(seed, "eta"), dtype=DOUBLE)
    slope, bend, h = gradient_of(loss, at), curvature_of(loss, at), 1e-5
    for i in range(2):
        step = torch.zeros(2, dtype=DOUBLE)
        step[i] = h
        torch.testing.assert_close(slope[:, i], (loss(at + step) - loss(at - step)) / (2 * h), rtol=0, atol=1e-8)
        change = (gradient_of(loss, at + step) - gradient_of(loss, at - step)) / (2 * h)
        torch.testing.assert_close(bend[:, i], change, rtol=0, atol=1e-8)


def test_a_linear_loss_has_no_curvature() -> None:
    assert not curvature_of(lambda f: f.sum(1), torch.ones(3, 2, dtype=DOUBLE)).any()


EYE, ONE = torch.eye(2, dtype=DOUBLE), torch.ones(2, 1, dtype=DOUBLE)
REFUSED = {
    "times": (lambda: predicted_flow(EYE, squares(ONE), ONE, [1.0, 0.5]), ConfigError, "ascend"),
    "no time": (lambda: predicted_flow(EYE, squares(ONE), ONE, [0.0]), ConfigError, "later than zero"),
    "tolerance": (lambda: predicted_flow(EYE, squares(ONE), ONE, [1.0], tolerance=0), ConfigError, "tolerance"),
    "mean": (lambda: predicted_flow(EYE, lambda f: f.mean(), ONE, [1.0]), ShapeError, "Leave out the mean"),
    "scalar kernel": (lambda: predicted_flow(EYE, squares(EYE), EYE, [1.0]), ShapeError, "torch.kron"),
    "flat start": (lambda: predicted_flow(EYE, squares(ONE), ONE[:, 0], [1.0]), ShapeError, "at the start"),
    "domain": (lambda: predicted_flow(EYE, lambda f: (1 - f.sum(1)).log(), ONE, [1.0]), DataError, "domain"),
    "rows": (
        lambda: predicted_flow(EYE, squares(ONE), ONE, [1.0]).elsewhere(EYE, torch.ones(1, 1, dtype=DOUBLE)),
        ShapeError,
        r"\(1, 2\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call()


def test_a_flow_that_ends_early_says_so() -> None:
    # the loss -f^3 / 3 has f' = f^2, which from one leaves every bound at time one
    with pytest.raises(NotAvailableError, match="could not be followed to time 2"):
        predicted_flow(lambda v: v, lambda f: -(f[:, 0] ** 3) / 3, ONE[:1], [2.0])
