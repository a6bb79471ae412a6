"""The linearised network is linear, tangent where it starts, and keeps its kernel while it is trained."""

import pytest
import torch
from torch import nn

from vifamily.ntk import LinearisedNetwork, TwoLayerReLU, jacobian_gram
from vifamily.rng import generator

DOUBLE = torch.float64


@pytest.fixture
def net(seed) -> nn.Module:
    return TwoLayerReLU(3, 8, 2, generator=generator(seed, "net"), readout="normal")


def test_error_is_of_second_order(seed, net) -> None:
    x = torch.randn(5, 3, generator=generator(seed, "x"), dtype=DOUBLE)
    linear = LinearisedNetwork(net)
    torch.testing.assert_close(linear(x), net(x), rtol=0, atol=1e-12)
    moves = [torch.randn(p.shape, generator=generator(seed, "move"), dtype=DOUBLE) for p in net.parameters()]
    errors = []
    for size in (1e-4, 1e-5):
        moved = TwoLayerReLU(3, 8, 2, generator=generator(seed, "net"), readout="normal")
        with torch.no_grad():
            for p, d, move in zip(moved.parameters(), linear.displacement, moves, strict=True):
                p.add_(size * move)
                d.copy_(size * move)
        errors.append(float((moved(x) - linear(x)).abs().max().detach()))
    assert 50 < errors[0] / errors[1] < 200  # a hundred for a tenth of the move


def test_gradient_descent_on_squares_is_that_of_the_kernel(seed, net) -> None:
    x = torch.randn(5, 3, generator=generator(seed, "x"), dtype=DOUBLE)
    y = torch.randn(5, 2, generator=generator(seed, "y"), dtype=DOUBLE)
    gram, linear = jacobian_gram(net, x), LinearisedNetwork(net)
    known, rate = net(x).detach().flatten(), 0.02
    optimiser = torch.optim.SGD(linear.parameters(), lr=rate)
    for _ in range(10):
        known = known - rate * gram @ (known - y.flatten())
        optimiser.zero_grad()
        (0.5 * (linear(x) - y).square().sum()).backward()
        optimiser.step()
    torch.testing.assert_close(linear(x).detach().flatten(), known, rtol=0, atol=1e-10)
    torch.testing.assert_close(jacobian_gram(linear, x), gram, rtol=0, atol=1e-10)
