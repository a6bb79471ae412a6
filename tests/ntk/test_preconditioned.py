"""Kernels of preconditioned flow, outputs in chunks, drift of Jacobians: known answers, and Adam as it was realised."""

import math

import pytest
import torch
from torch import nn

from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.ntk import (
    TwoLayerReLU,
    adam_scales,
    compare_kernels,
    jacobian_drift,
    jacobian_gram,
    kernel_drift,
    ntk_product,
)
from vifamily.rng import generator

DOUBLE = torch.float64


def normal(seed, name, *shape):
    return torch.randn(*shape, generator=generator(seed, name), dtype=DOUBLE)


def network(seed, outputs=5):
    source = generator(seed, "net")
    net = nn.Sequential(
        nn.utils.skip_init(nn.Linear, 3, 6, dtype=DOUBLE),
        nn.Tanh(),
        nn.utils.skip_init(nn.Linear, 6, outputs, dtype=DOUBLE),
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=DOUBLE))
    return net


@pytest.mark.parametrize(("chunk", "outputs"), [(None, 1), (None, 2), (2, 3), (3, 100), (1, 1)])
def test_outputs_in_chunks_change_nothing(seed, chunk, outputs) -> None:
    net, x, y = network(seed), normal(seed, "x", 5, 3), normal(seed, "y", 3, 3)
    parts = {"chunk": chunk, "output_chunk": outputs}
    torch.testing.assert_close(jacobian_gram(net, x, **parts), jacobian_gram(net, x), rtol=0, atol=1e-11)
    torch.testing.assert_close(jacobian_gram(net, x, y, **parts), jacobian_gram(net, x, y), rtol=0, atol=1e-11)


def test_scales_of_a_linear_map(seed) -> None:
    # f_a = sum_p w_ap x_p: K_ab(x, x') = [a = b] sum_p d_ap x_p x'_p
    net = nn.utils.skip_init(nn.Linear, 3, 2, bias=False, dtype=DOUBLE)
    nn.init.ones_(net.weight)
    x, scales = normal(seed, "x", 4, 3), normal(seed, "d", 2, 3).exp()
    wanted = torch.einsum("ip,ap,jp,ab->iajb", x, scales, x, torch.eye(2, dtype=DOUBLE)).reshape(8, 8)
    torch.testing.assert_close(jacobian_gram(net, x, scales={"weight": scales}), wanted, rtol=0, atol=1e-12)


def test_products_with_scales_are_those_of_the_matrix(seed) -> None:
    net, x, v = network(seed), normal(seed, "x", 4, 3), normal(seed, "v", 4, 5)
    scales = {name: normal(seed, name, *p.shape).exp() for name, p in net.named_parameters()}
    gram = jacobian_gram(net, x, chunk=3, output_chunk=2, scales=scales)
    found = ntk_product(net, x, v, chunk=2, scales=scales)
    torch.testing.assert_close(found.flatten(), gram @ v.flatten(), rtol=0, atol=1e-10)


def test_conjugate_gradients_need_products_alone(seed) -> None:
    net, x, y = network(seed, outputs=2), normal(seed, "x", 3, 3), normal(seed, "y", 3, 2)
    at, left = torch.zeros_like(y), y.clone()
    way, size = left.clone(), left.square().sum()
    for _ in range(30):
        pushed = ntk_product(net, x, way) + 0.1 * way
        step = size / (way * pushed).sum()
        at, left = at + step * way, left - step * pushed
        size, before = left.square().sum(), size
        if size < 1e-24:
            break
        way = left + size / before * way
    gram = jacobian_gram(net, x) + 0.1 * torch.eye(6, dtype=DOUBLE)
    torch.testing.assert_close(at.flatten(), torch.linalg.solve(gram, y.flatten()), rtol=1e-8, atol=1e-9)


class Product(nn.Module):
    """``f(x) = a b x``, with Jacobian ``(b x, a x)``."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=DOUBLE)) for v in (a, b))

    def forward(self, x):
        return self.a * self.b * x


def test_a_jacobian_that_turns_while_its_kernel_stays() -> None:
    x = torch.tensor([[1.0], [2.0], [-3.0]], dtype=DOUBLE)
    start, now = Product(3.0, 4.0), Product(4.0, 3.0)
    assert kernel_drift(jacobian_gram(now, x), jacobian_gram(start, x)).relative == pytest.approx(0, abs=1e-12)
    for chunk in (None, 2):
        assert jacobian_drift(now, start, x, chunk=chunk) == pytest.approx(math.sqrt(2) / 5, abs=1e-12)


def test_the_scaled_kernel_predicts_adam_and_the_plain_one_does_not(seed) -> None:
    angle = 2 * math.pi * torch.arange(8, dtype=DOUBLE) / 8
    x = torch.stack([angle.cos(), angle.sin()], 1)
    net = TwoLayerReLU(2, 1024, 1, generator=generator(seed, "net"), readout="normal")
    y = 1 + x[:, :1]

    def loss(f):
        return 0.5 * (f - y).square().sum(1)

    size, steps = 1e-5, 100
    adam = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.0, 1 - 1e-9))  # moments that stay, no momentum

    def step():
        adam.zero_grad()
        loss(net(x)).mean().backward()
        adam.step()

    step()
    adam.param_groups[0]["lr"] = size
    scales = adam_scales(net, adam)
    kernels = {"plain": jacobian_gram(net, x), "Adam": jacobian_gram(net, x, scales=scales)}
    path = [net(x).detach()]
    for _ in range(steps):
        step()
        path.append(net(x).detach())
    found = compare_kernels(kernels, loss, torch.stack(path), size * torch.arange(steps + 1, dtype=DOUBLE))
    assert found.best == "Adam"
    assert found.gaps["plain"] > 0.5
    assert "'Adam'" in found.note()


def test_refused(seed) -> None:
    net, x = network(seed), normal(seed, "x", 2, 3)
    with pytest.raises(ConfigError, match="output_chunk"):
        jacobian_gram(net, x, output_chunk=0)
    with pytest.raises(ConfigError, match="differ in 0.bias"):
        jacobian_gram(net, x, scales={n: torch.ones_like(p) for n, p in net.named_parameters() if n != "0.bias"})
    with pytest.raises(ConfigError, match="positive"):
        ntk_product(
            net, x, torch.ones(2, 5).double(), scales={n: -torch.ones_like(p) for n, p in net.named_parameters()}
        )
    with pytest.raises(NotAvailableError, match="SGD has no second moments"):
        adam_scales(net, torch.optim.SGD(net.parameters(), lr=1.0))
    with pytest.raises(ConfigError, match="does not train"):
        adam_scales(net, torch.optim.Adam([nn.Parameter(torch.ones(1))]))
    with pytest.raises(ConfigError, match="same trainable"):
        jacobian_drift(net, network(seed, 2), x)
    still = torch.zeros(3, 2, 1, dtype=DOUBLE)
    times = torch.arange(3, dtype=DOUBLE)
    kernel = {"one": torch.eye(2, dtype=DOUBLE)}
    with pytest.raises(NotAvailableError, match="ends where it starts"):
        compare_kernels(kernel, lambda f: f.square().sum(1), still, times)
    with pytest.raises(ShapeError, match="path"):
        compare_kernels(kernel, lambda f: f.square().sum(1), still[0], times)
    with pytest.raises(ConfigError, match="one kernel or more"):
        compare_kernels({}, lambda f: f.square().sum(1), still, times)
