"""Layers with Walsh-Hadamard weights, against the weights written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vifamily.errors import VifamilyWarning
from vifamily.rng import scoped
from vifamily.weights._walsh_blocks import Blocks
from vifamily.weights._walsh_layer import IsotropicWalshLayer, WalshLayer

LINEAR = [(128, 128), (5, 3), (1, 40), (40, 1), (12, 5)]


def _make(module: nn.Module, generator: torch.Generator, layout: str = "auto", **settings: object) -> WalshLayer:
    kind = IsotropicWalshLayer if settings.pop("isotropic", False) else WalshLayer
    given = {"scale": 1.0, "gain": 2.0, "residual": False, "latent_bias": False, **settings}
    return kind(module, "a", Blocks.choose(tuple(module.weight.shape), layout), generator=generator, **given)


def _module(kind: type[nn.Module], *args: int, **settings: int) -> nn.Module:
    with scoped(0):
        return kind(*args, **settings).double()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("latent_bias", [False, True])
def test_linear_layer_is_that_of_its_written_out_weights(
    shape: tuple[int, int], residual: bool, latent_bias: bool, generator: torch.Generator
) -> None:
    layer = _make(_module(nn.Linear, shape[1], shape[0]), generator, residual=residual, latent_bias=latent_bias)
    z = _normal(generator, 3, 4, layer.dim)
    for lead in ((1, 4), (3, 4), (1, 4, 2)):
        x = _normal(generator, *lead, shape[1])
        for latent in (z, z[:, 0]):
            out = layer(x, latent)
            for s in range(3):
                for b in range(4):
                    made = layer.materialise(z[s, b] if latent.dim() == 3 else z[s, 0])
                    bias = made.get("a.bias", layer.module.bias)
                    want = functional.linear(x[s % len(x), b], made["a.weight"], bias)
                    torch.testing.assert_close(out[s, b], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["stack", "taps", "reshape"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_that_of_its_written_out_filter(layout: str, groups: int, generator: torch.Generator) -> None:
    module = _module(nn.Conv2d, 4, 6, 3, padding=1, groups=groups)
    layer = _make(module, generator, layout, latent_bias=True)
    z = _normal(generator, 3, 2, layer.dim)
    for x in (_normal(generator, 1, 2, 4, 5, 5), _normal(generator, 3, 2, 4, 5, 5)):
        for latent in (z, z[:, 0]):
            out = layer(x, latent)
            for s in range(3):
                for b in range(2):
                    made = layer.materialise(z[s, b] if latent.dim() == 3 else z[s, 0])
                    want = functional.conv2d(
                        x[s % len(x), b], made["a.weight"], made["a.bias"], padding=1, groups=groups
                    )
                    torch.testing.assert_close(out[s, b], want, rtol=0, atol=1e-10)


def test_weights_start_at_their_usual_spread(generator: torch.Generator) -> None:
    layer = _make(_module(nn.Linear, 100, 128), generator)
    mean, sd = layer.initial(generator)
    weight = layer.materialise(mean)["a.weight"]
    # 128 independent squares, each of variance 2: five standard errors of their mean
    assert abs(weight.square().mean() * 50 - 1) < 5 * (2 / 128) ** 0.5
    assert sd.unique().tolist() == [0.1]


def test_a_collapsed_start_warns(generator: torch.Generator) -> None:
    layer = _make(_module(nn.Linear, 16, 16), generator)
    with torch.no_grad():
        layer.left.mul_(0.001)
    with pytest.warns(VifamilyWarning, match="nearly nothing"):
        layer.initial(generator)


def test_isotropic_prior_at_the_start_is_the_latent_one(generator: torch.Generator) -> None:
    module = _module(nn.Linear, 16, 16)
    layer = _make(module, generator, isotropic=True, latent_bias=True)
    z, variance = _normal(generator, 5, layer.dim), _normal(generator, 5, layer.dim).exp()
    torch.testing.assert_close(layer.log_prior(z), WalshLayer.log_prior(layer, z), rtol=0, atol=1e-10)
    want = WalshLayer.cross_entropy(layer, z, variance)
    torch.testing.assert_close(layer.cross_entropy(z, variance, independent=True), want, rtol=0, atol=1e-9)
    assert layer.cross_entropy(z, variance) is None


def test_a_latent_for_each_datum_keeps_the_gradient_and_lowers_its_variance(generator: torch.Generator) -> None:
    layer = _make(_module(nn.Linear, 128, 128), generator)
    x, y = _normal(generator, 1, 64, 128), _normal(generator, 64, 128)
    mean = layer.initial(generator)[0].requires_grad_()
    rows = {}
    for each in (False, True):
        grads = []
        for _ in range(150):
            noise = 0.1 * _normal(generator, 1, *((64,) if each else ()), layer.dim)
            loss = (torch.relu(layer(x, mean + noise)) - y).square().mean()
            grads.append(torch.autograd.grad(loss, mean)[0])
        rows[each] = torch.stack(grads)
    spread = {k: v.var(0) for k, v in rows.items()}
    error = ((spread[False] + spread[True]) / 150).sqrt()
    assert ((rows[True].mean(0) - rows[False].mean(0)).abs() < 5 * error).all()
    assert spread[False].mean() > 4 * spread[True].mean()
