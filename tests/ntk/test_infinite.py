"""Closed-form kernels of wide ReLU networks against quadrature, Monte Carlo and finite networks."""

import math

import pytest
import torch

from vifamily.errors import ConfigError, DeviceError, ShapeError
from vifamily.ntk import TwoLayerReLU, circle_spectrum, layerwise_gram, relu_kernel
from vifamily.rng import generator

DOUBLE = torch.float64


def circle(count: int) -> torch.Tensor:
    angle = 2 * math.pi * torch.arange(count, dtype=DOUBLE) / count
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def normal(seed: int, name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, name), dtype=DOUBLE)


def test_kernel_is_the_expectation_over_features(seed) -> None:
    x, w = normal(seed, "x", 4, 3), normal(seed, "w", 200_000, 3)
    active = x @ w.T
    for readout in ("zero", "normal"):
        for i in range(4):
            for j in range(4):
                value = active[i].relu() * active[j].relu()
                if readout == "normal":
                    value = value + (active[i] > 0) * (active[j] > 0) * (x[i] @ x[j])
                error = value.std() / len(w) ** 0.5
                assert abs(value.mean() - relu_kernel(x, readout=readout)[i, j]) < 5 * error


@pytest.mark.parametrize("readout", ["zero", "normal"])
def test_circle_spectrum_is_that_of_the_gram(readout) -> None:
    count = 512
    row = relu_kernel(circle(count), readout=readout)[0]
    measured = torch.fft.rfft(row).real / count  # eigenvalues of a circulant matrix
    # aliasing adds harmonics near 512, which fall as k^-4 (zero) or k^-2 (normal)
    bound = 1e-9 if readout == "zero" else 1e-5
    torch.testing.assert_close(measured[:12], circle_spectrum(12, readout=readout), rtol=0, atol=bound)
    assert measured[3:200:2].abs().max() < 1e-14


def test_circle_spectrum_by_its_known_values() -> None:
    pi = math.pi
    known = [2 / pi**2, 1 / 8, 2 / (9 * pi**2), 0.0, 2 / (225 * pi**2), 0.0]
    torch.testing.assert_close(circle_spectrum(6), torch.tensor(known, dtype=DOUBLE), rtol=0, atol=1e-15)
    known = [0.304, 0.25, 0.0788, 0.0, 0.00856, 0.0]
    torch.testing.assert_close(
        circle_spectrum(6, readout="normal"), torch.tensor(known, dtype=DOUBLE), rtol=3e-3, atol=1e-12
    )


def test_gram_on_the_circle_is_singular_and_a_constant_coordinate_mends_it() -> None:
    x = circle(64)
    values = torch.linalg.eigvalsh(relu_kernel(x)) / 64
    assert int((values < 1e-12).sum()) == 30
    raised = torch.cat([x, torch.ones(64, 1, dtype=DOUBLE)], dim=1) / 2**0.5  # of norm one again
    values = torch.linalg.eigvalsh(relu_kernel(raised)) / 64
    assert 6e-8 < values.min() < 8e-8


@pytest.mark.parametrize(("readout", "published"), [
    ("zero", {64: 0.343, 256: 0.151, 1024: 0.052, 4096: 0.045}),
    ("normal", {64: 0.275, 256: 0.133, 1024: 0.060, 4096: 0.039}),
])  # fmt: skip
def test_finite_networks_approach_the_limit(seed, readout, published) -> None:
    x = circle(16)
    limit = torch.kron(relu_kernel(x, readout=readout), torch.eye(2, dtype=DOUBLE))
    for width, expected in published.items():
        gaps = []
        for k in range(5):
            net = TwoLayerReLU(2, width, 2, generator=generator(seed, "net", width, k), readout=readout)
            gaps.append(float((layerwise_gram(net, x) - limit).norm() / limit.norm()))
        assert sum(gaps) / 5 < 3 * expected


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_gap_to_the_limit_is_that_of_a_mean_over_units(seed, width) -> None:
    # with output weights at zero the kernel is a mean over units, so its squared gap is a variance over the width
    x = circle(16)
    limit = relu_kernel(x)
    active = torch.relu(normal(seed, "w", 100_000, 2) @ x.T)
    of_a_unit = (active[:, :, None] * active[:, None, :]).flatten(1).var(dim=0).sum() / width
    squares = []
    for k in range(200):
        net = TwoLayerReLU(2, width, 1, generator=generator(seed, "gap", width, k))
        squares.append((layerwise_gram(net, x) - limit).square().sum())
    found = torch.stack(squares)
    # the variance of a unit is known to about a hundredth
    assert abs(found.mean() - of_a_unit) < 5 * (found.std() / len(found) ** 0.5 + 0.01 * of_a_unit)


def test_output_weights_at_zero_give_a_scalar_kernel_times_the_identity(seed) -> None:
    net = TwoLayerReLU(3, 50, 2, generator=generator(seed, "net"))
    x = normal(seed, "x", 5, 3)
    assert torch.equal(net(x), torch.zeros(5, 2, dtype=DOUBLE))
    features = torch.relu(x @ net.hidden.weight.detach().T)
    known = torch.kron(features @ features.T / 50, torch.eye(2, dtype=DOUBLE))
    torch.testing.assert_close(layerwise_gram(net, x), known, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("hidden_layers", "width"),
    [(2, 512), (3, 512), pytest.param(2, 4096, marks=pytest.mark.slow), pytest.param(3, 4096, marks=pytest.mark.slow)],
)
def test_deep_kernel_against_wide_networks(seed, hidden_layers, width) -> None:
    class Deep(torch.nn.Module):
        def __init__(self, width: int, source: torch.Generator) -> None:
            super().__init__()
            sizes = [3, *[width] * hidden_layers, 1]
            self.layers = torch.nn.ModuleList()
            for a, b in zip(sizes[:-1], sizes[1:], strict=True):
                layer = torch.nn.utils.skip_init(torch.nn.Linear, a, b, bias=False, dtype=DOUBLE)
                with torch.no_grad():
                    layer.weight.copy_(torch.randn(b, a, generator=source, dtype=DOUBLE))
                self.layers.append(layer)

        def forward(self, x):
            h = self.layers[0](x)
            for layer in self.layers[1:]:
                h = layer(h.relu()) * (2.0 / layer.in_features) ** 0.5
            return h

    x, grams = normal(seed, "x", 4, 3), []
    for k in range(12):
        grams.append(layerwise_gram(Deep(width, generator(seed, "deep", k)), x))
    stacked = torch.stack(grams)
    error = stacked.std(dim=0) / len(grams) ** 0.5
    limit = relu_kernel(x, hidden_layers=hidden_layers, readout="normal", gain=2.0)
    # finite width biases the mean by order 1/width
    assert ((stacked.mean(dim=0) - limit).abs() < 5 * error + 10 / width * limit.abs().max()).all()


def test_diagonal_and_homogeneity_are_exact(seed) -> None:
    x = normal(seed, "x", 5, 3)
    square = x.square().sum(dim=1)
    for depth in (1, 2, 5):
        gram = relu_kernel(x, hidden_layers=depth, gain=2.0)
        torch.testing.assert_close(gram.diagonal(), square, rtol=1e-10, atol=0)
        gram = relu_kernel(x, hidden_layers=depth, gain=2.0, readout="normal")
        torch.testing.assert_close(gram.diagonal(), (depth + 1) * square, rtol=1e-10, atol=0)
    torch.testing.assert_close(relu_kernel(3 * x, x), 3 * relu_kernel(x), rtol=1e-10, atol=1e-12)


def test_zero_input_has_a_zero_row(seed) -> None:
    x = torch.cat([torch.zeros(1, 3, dtype=DOUBLE), normal(seed, "x", 2, 3)])
    for readout in ("zero", "normal"):
        assert torch.equal(relu_kernel(x, readout=readout)[0], torch.zeros(3, dtype=DOUBLE))


def test_refusals() -> None:
    x = circle(4)
    with pytest.raises(ConfigError, match="hidden_layers"):
        relu_kernel(x, hidden_layers=0)
    with pytest.raises(ConfigError, match="gain"):
        relu_kernel(x, gain=-1.0)
    with pytest.raises(ConfigError, match="readout"):
        circle_spectrum(3, readout="ones")
    with pytest.raises(ConfigError, match="width"):
        TwoLayerReLU(2, 0, 1, generator=torch.Generator())
    with pytest.raises(ShapeError, match="coordinates"):
        relu_kernel(x, x[:, :1])
    with pytest.raises(DeviceError, match="float32"):
        relu_kernel(x, x.float())
