"""Layers with Walsh-Hadamard weights, against the weights written out."""

from __future__ import annotations

import warnings

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
@pytest.mark.parametrize(
    "settings", [{}, {"residual": True, "latent_bias": True}, {"latent_scales": True}, {"latent_bias": True}], ids=str
)
def test_linear_layer_is_that_of_its_written_out_weights(
    shape: tuple[int, int], settings: dict[str, bool], generator: torch.Generator
) -> None:
    layer = _make(_module(nn.Linear, shape[1], shape[0]), generator, **settings)
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
@pytest.mark.parametrize("latent_scales", [False, True])
def test_convolution_is_that_of_its_written_out_filter(
    layout: str, groups: int, latent_scales: bool, generator: torch.Generator
) -> None:
    module = _module(nn.Conv2d, 4, 6, 3, padding=1, groups=groups)
    layer = _make(module, generator, layout, latent_bias=True, latent_scales=latent_scales)
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


def test_latent_diagonals_begin_where_the_others_do(generator: torch.Generator) -> None:
    layer = _make(_module(nn.Linear, 100, 128), generator, latent_scales=True)
    mean, sd = layer.initial(generator)
    assert not [name for name, _ in layer.named_parameters() if "module" not in name]
    assert layer.dim == 3 * 128
    left, core, right = mean[128:256], mean[:128], mean[256:]
    # s1 = +-1 and s2 = +-sqrt(2 P / D_in), as where they are points
    torch.testing.assert_close(left.abs(), torch.ones_like(left))
    torch.testing.assert_close(right.abs(), torch.full_like(right, (2 * 128 / 100) ** 0.5))
    torch.testing.assert_close(sd[:256].unique(), sd.new_tensor([0.1]))
    torch.testing.assert_close(sd[256:], 0.1 * right.abs())
    assert (left > 0).any() and (left < 0).any()
    weight = layer.materialise(mean)["a.weight"]
    # each row is +-right times the entries of one vector, H g / P: exclusive or only permutes them
    want = (core @ _matrix(128).T / 128)[torch.arange(128) ^ 5][:100] * right[:100] * left[5]
    torch.testing.assert_close(weight[5], want, rtol=0, atol=1e-10)


def _matrix(size: int) -> Tensor:
    index = torch.arange(size)
    bits = sum((index[:, None] & index) >> k & 1 for k in range(10))
    return 1.0 - 2.0 * (torch.as_tensor(bits) % 2).double()


def test_isotropic_prior_with_latent_diagonals_is_a_law_of_g_given_them(generator: torch.Generator) -> None:
    layer = _make(_module(nn.Linear, 4, 4), generator, isotropic=True, latent_scales=True)
    z = _normal(generator, layer.dim)
    core, left, right = z.view(3, 4)
    # g ~ N(0, tau^2 (A'A)^-1) with the columns of A = vec(diag(a) H diag(e_k) H diag(b)) written out
    hadamard = _matrix(4) / 2
    columns = torch.einsum("i,ik,kj,j->ijk", left, hadamard, hadamard, right).reshape(16, 4)
    tau = layer.right_sd
    law = torch.distributions.MultivariateNormal(torch.zeros(4).double(), precision_matrix=columns.T @ columns / tau**2)
    rest = torch.distributions.Normal(0.0, torch.tensor([1.0] * 4 + [tau] * 4, dtype=z.dtype)).log_prob(z[4:]).sum()
    torch.testing.assert_close(layer.log_prior(z), law.log_prob(core) + rest, rtol=0, atol=1e-10)
    assert layer.cross_entropy(z, z.exp(), independent=True) is None


def test_a_collapsed_start_warns(generator: torch.Generator) -> None:
    layer = _make(_module(nn.Linear, 16, 16), generator)
    with torch.no_grad():
        layer.left.mul_(0.001)
    with pytest.warns(VifamilyWarning, match="nearly nothing"):
        layer.initial(generator)


def test_the_size_of_a_start_is_that_of_its_draws(generator: torch.Generator) -> None:
    layer = _make(_module(nn.Linear, 16, 16), generator)
    with torch.no_grad():
        layer.left.mul_(0.05)
    mean = torch.zeros(layer.dim, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.check_start(mean, torch.full_like(mean, 0.25))  # weights of 0.05 times 0.25, above a hundredth
    with pytest.warns(VifamilyWarning, match="start at 1e-02|start at 9"):
        layer.check_start(mean, torch.full_like(mean, 0.19))


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
