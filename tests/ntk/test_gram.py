"""The tangent kernel's three routes agree with each other, with finite differences and with known answers."""

import pytest
import torch
from torch import nn

from vifamily.errors import ConfigError, DeviceError, IncompatibleError, ShapeError
from vifamily.ntk import jacobian_gram, largest_eigenvalue, layerwise_gram, ntk_product
from vifamily.rng import generator, scoped

DOUBLE = torch.float64


def dense(seed: int, sizes: tuple[int, ...] = (3, 7, 5, 4), activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    source = generator(seed, "net")
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layer = nn.utils.skip_init(nn.Linear, a, b, dtype=DOUBLE)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(b, a, generator=source, dtype=DOUBLE) / a**0.5)
            layer.bias.copy_(torch.randn(b, generator=source, dtype=DOUBLE))
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def normal(seed: int, name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, name), dtype=DOUBLE)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SiLU])
def test_routes_agree(seed, activation) -> None:
    net, x = dense(seed, activation=activation), normal(seed, "x", 6, 3)
    gram = jacobian_gram(net, x)
    assert gram.shape == (24, 24)
    torch.testing.assert_close(layerwise_gram(net, x), gram, rtol=0, atol=1e-10)
    columns = [ntk_product(net, x, v.reshape(6, 4)).flatten() for v in torch.eye(24, dtype=DOUBLE)]
    torch.testing.assert_close(torch.stack(columns, dim=1), gram, rtol=0, atol=1e-10)


def test_gram_equals_finite_differences(seed) -> None:
    net, x = dense(seed, (2, 3, 2)), normal(seed, "x", 3, 2)
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    step, slopes = 1e-5, []
    for direction in torch.eye(flat.numel(), dtype=DOUBLE):
        ends = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(flat + sign * step * direction, net.parameters())
            ends.append(net(x).detach().flatten())
        slopes.append((ends[0] - ends[1]) / (2 * step))
    nn.utils.vector_to_parameters(flat, net.parameters())
    jacobian = torch.stack(slopes, dim=1)
    torch.testing.assert_close(jacobian_gram(net, x), jacobian @ jacobian.T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_chunks_change_nothing(seed, chunk) -> None:
    net, x, y = dense(seed), normal(seed, "x", 5, 3), normal(seed, "y", 3, 3)
    v = normal(seed, "v", 3, 4)
    torch.testing.assert_close(jacobian_gram(net, x, chunk=chunk), jacobian_gram(net, x), rtol=0, atol=1e-12)
    cross = jacobian_gram(net, x, y)
    torch.testing.assert_close(jacobian_gram(net, x, y, chunk=chunk), cross, rtol=0, atol=1e-12)
    product = ntk_product(net, x, v, y, chunk=chunk)
    torch.testing.assert_close(product.flatten(), cross @ v.flatten(), rtol=0, atol=1e-10)


def test_linear_map_has_the_known_kernel(seed) -> None:
    # f = W x + b: K = (x . x' + 1) I
    net, x = dense(seed, (3, 2)), normal(seed, "x", 4, 3)
    known = torch.kron(x @ x.T + 1, torch.eye(2, dtype=DOUBLE))
    for gram in (jacobian_gram(net, x), layerwise_gram(net, x)):
        torch.testing.assert_close(gram, known, rtol=0, atol=1e-12)


def test_frozen_parameters_are_left_out(seed) -> None:
    net, x = dense(seed), normal(seed, "x", 4, 3)
    whole = jacobian_gram(net, x)
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    part = jacobian_gram(net, x)
    assert not torch.allclose(part, whole)
    torch.testing.assert_close(layerwise_gram(net, x), part, rtol=0, atol=1e-10)


def test_convolution_and_tied_weights_by_products(seed) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 3, 3, padding=1, dtype=DOUBLE)
            self.once = nn.Linear(3, 3, dtype=DOUBLE)

        def forward(self, x):
            h = torch.tanh(self.conv(x.unsqueeze(1)).mean(dim=-1))
            return self.once(torch.tanh(self.once(h)))

    with scoped(seed):
        net = Tied()
    x, v = normal(seed, "x", 4, 5), normal(seed, "v", 4, 3)
    gram = jacobian_gram(net, x)
    torch.testing.assert_close(ntk_product(net, x, v).flatten(), gram @ v.flatten(), rtol=0, atol=1e-10)
    with pytest.raises(IncompatibleError, match="conv.weight.*jacobian_gram"):
        layerwise_gram(net, x)
    net.conv.requires_grad_(False)
    with pytest.raises(IncompatibleError, match="'once' is not called once"):
        layerwise_gram(net, x)


def test_parameters_and_hooks_are_left_as_they_were(seed) -> None:
    net, x = dense(seed), normal(seed, "x", 4, 3)
    layerwise_gram(net, x)
    jacobian_gram(net, x)
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    with torch.no_grad():
        torch.testing.assert_close(layerwise_gram(net, x), jacobian_gram(net, x), rtol=0, atol=1e-10)


def test_one_output_without_its_axis(seed) -> None:
    net, x = nn.Sequential(dense(seed, (3, 5, 1)), nn.Flatten(0)), normal(seed, "x", 4, 3)
    torch.testing.assert_close(layerwise_gram(net, x), jacobian_gram(net, x), rtol=0, atol=1e-10)


def test_refusals(seed) -> None:
    net, x = dense(seed), normal(seed, "x", 4, 3)
    noisy = nn.Sequential(net, nn.Dropout(0.5))
    with pytest.raises(ConfigError, match="Dropout.*model.eval"):
        jacobian_gram(noisy, x)
    torch.testing.assert_close(jacobian_gram(noisy.eval(), x), jacobian_gram(net, x))
    with pytest.raises(DeviceError, match="float32"):
        jacobian_gram(net, x.float())
    with pytest.raises(ShapeError, match="at least one input"):
        layerwise_gram(net, x[:0])
    with pytest.raises(ShapeError, match="columns"):
        ntk_product(net, x, normal(seed, "v", 4, 3))
    with pytest.raises(ShapeError, match="with 4 inputs"):
        ntk_product(net, x, normal(seed, "v", 3, 4))
    with pytest.raises(ConfigError, match="chunk"):
        jacobian_gram(net, x, chunk=0)
    with pytest.raises(ConfigError, match="chunk"):
        ntk_product(net, x, normal(seed, "v", 4, 4), chunk=-1)
    with pytest.raises(ShapeError, match="Flatten"):
        jacobian_gram(nn.Sequential(net, nn.Unflatten(1, (2, 2))), x)
    with pytest.raises(ConfigError, match="requires a gradient"):
        jacobian_gram(net.requires_grad_(False), x)


@pytest.mark.parametrize("chunk", [None, 2])
def test_largest_eigenvalue_is_that_of_the_matrix(seed, chunk) -> None:
    net, x = dense(seed), normal(seed, "x", 5, 3)
    gram = jacobian_gram(net, x)
    found = largest_eigenvalue(net, x, chunk=chunk)
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(gram)[-1]), rel=1e-10)
    torch.testing.assert_close(gram @ found.vector, found.value * found.vector, rtol=0, atol=1e-6 * found.value)
    assert found.steps <= 20


def test_few_steps_give_a_lower_bound(seed) -> None:
    net, x = dense(seed), normal(seed, "x", 5, 3)
    best = float(torch.linalg.eigvalsh(jacobian_gram(net, x))[-1])
    assert 0 < largest_eigenvalue(net, x, max_steps=1).value <= best * (1 + 1e-12)
    with pytest.raises(ConfigError, match="max_steps"):
        largest_eigenvalue(net, x, max_steps=0)
