"""Random Fourier features: the kernel in the mean over frequencies, whichever weights make them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vifamily.errors import ConfigError, ShapeError
from vifamily.models.random_features import RandomFourierFeatures, random_feature_network
from vifamily.weights import convert

LENGTHS = [0.7, 2.0, 1.3]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _kernel(x: Tensor, amplitude: float) -> Tensor:
    scaled = x / torch.tensor(LENGTHS, dtype=torch.float64)
    return amplitude**2 * torch.exp(-0.5 * torch.cdist(scaled, scaled).square())


def test_functions_of_the_prior_have_the_kernel(generator: torch.Generator) -> None:
    net = random_feature_network(
        3, 1, features=32, lengthscale=LENGTHS, amplitude=1.5, generator=generator, dtype=torch.float64
    )
    made = convert(net, "dense")
    mean, sd = made.prior()
    x = _normal(generator, 4, 3)
    z = mean + sd * _normal(generator, 8000, made.dim)
    f = made(x, z).squeeze(-1).detach()
    products = f.unsqueeze(-1) * f.unsqueeze(-2)
    error = products.std(0) / math.sqrt(len(z))
    assert ((products.mean(0) - _kernel(x, 1.5)).abs() < 5 * error).all()


@pytest.mark.parametrize("weights", ["dense", "walsh_hadamard"])
def test_features_of_the_prior_have_the_kernel(weights: str, generator: torch.Generator) -> None:
    net = RandomFourierFeatures(3, 32, lengthscale=LENGTHS, amplitude=1.5, generator=generator, dtype=torch.float64)
    made = convert(net, weights)
    assert made.report.converted == {"frequencies": 96 if weights == "dense" else 32}
    mean, sd = made.prior()
    x = _normal(generator, 4, 3)
    phi = made(x, mean + sd * _normal(generator, 4000, made.dim)).detach()
    products = phi @ phi.mT / 32
    error = products.std(0) / math.sqrt(len(products))
    assert ((products.mean(0) - _kernel(x, 1.5)).abs() < 5 * error + 1e-12).all()


def test_a_draw_of_the_frequencies_has_it_in_the_mean(generator: torch.Generator) -> None:
    x = _normal(generator, 4, 3)
    features = RandomFourierFeatures(
        3, 20_000, lengthscale=LENGTHS, amplitude=0.5, generator=generator, dtype=torch.float64
    )
    phi = features(x).detach()
    cosine, sine = phi.split(20_000, -1)
    each = cosine.unsqueeze(1) * cosine + sine.unsqueeze(1) * sine
    error = each.std(-1) / math.sqrt(20_000)
    assert ((each.mean(-1) - _kernel(x, 0.5)).abs() < 5 * error + 1e-12).all()


def test_by_hand(generator: torch.Generator) -> None:
    features = RandomFourierFeatures(
        2, 1, lengthscale=[0.5, 4.0], amplitude=2.0, generator=generator, dtype=torch.float64
    )
    with torch.no_grad():
        features.frequencies.weight.copy_(torch.tensor([[0.3, -0.8]]))
    # fan-in 2: weights of unit variance are frequencies in units of 1 / lengthscale
    phase = 0.3 * 1.5 / 0.5 - 0.8 * 3.0 / 4.0
    want = torch.tensor([2 * math.cos(phase), 2 * math.sin(phase)], dtype=torch.float64)
    torch.testing.assert_close(features(torch.tensor([1.5, 3.0]).double()), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"in_features": 0}, "in_features"),
        ({"features": 2.5}, "features"),
        ({"lengthscale": [1.0, 2.0]}, "lengthscale"),
        ({"lengthscale": -1.0}, "lengthscale"),
        ({"amplitude": 0.0}, "amplitude"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], what: str, generator: torch.Generator) -> None:
    given = {"in_features": 3, "features": 4, "generator": generator, **options}
    with pytest.raises(ConfigError, match=what):
        RandomFourierFeatures(**given)


def test_inputs_of_another_width_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ShapeError, match="3 numbers"):
        RandomFourierFeatures(3, 4, generator=generator)(torch.zeros(5, 2))
