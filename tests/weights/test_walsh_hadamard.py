"""The entry of Walsh-Hadamard weights: what it converts, options, and whole networks against single calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vifamily.errors import ConfigError
from vifamily.rng import scoped
from vifamily.weights import NetworkWeights, convert
from vifamily.weights.walsh_hadamard import WalshHadamard


@pytest.fixture(autouse=True)
def own_stream():
    """Layers draw their first weights from torch's stream."""
    with scoped(0):
        yield


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(wide, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _settled(made: NetworkWeights, x: Tensor) -> NetworkWeights:
    assert made.settle(x) == "fold"
    return made


SPECS = [
    "walsh_hadamard",
    "walsh_hadamard(prior=isotropic, bias=gaussian)",
    "walsh_hadamard(scales=latent)",
    "walsh_hadamard(scales=latent, prior=isotropic)",
    "walsh_hadamard(residual=true)",
    "walsh_hadamard(layout=stack, gain=linear)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_network_for_all_draws_is_one_call_for_each(spec: str, generator: torch.Generator) -> None:
    net = _mlp(3, 16, 20, 2)
    x = _normal(generator, 6, 3)
    made = _settled(convert(net, spec), x)
    z = _normal(generator, 4, 6, made.dim)
    out, each = made(x, z[:, 0]), made(x, z)
    for s in range(4):
        want = functional_call(made.net, made.materialise(z[s, 0]), (x,))
        torch.testing.assert_close(out[s], want, rtol=0, atol=1e-10)
        for b in range(6):
            want = functional_call(made.net, made.materialise(z[s, b]), (x[b : b + 1],))
            torch.testing.assert_close(each[s, b : b + 1], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_against_finite_differences(spec: str, generator: torch.Generator) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = _normal(generator, 4, 3)
    made = _settled(convert(net, spec), x)
    z = made.initial(generator)[0].unsqueeze(0).requires_grad_()
    points = tuple(p for p in made.parameters() if p.requires_grad)

    def value(latent: Tensor, *_: Tensor) -> Tensor:
        return made(x, latent).square().sum() + made.log_prior(latent).sum()

    assert torch.autograd.gradcheck(value, (z, *points))
    assert points


@pytest.mark.parametrize("padding", [1, "same"])
def test_convolutions_of_two_dimensions_are_converted(padding: int | str, generator: torch.Generator) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip
    x = _normal(generator, 5, 3, 6, 6)
    made = _settled(convert(net.eval(), "walsh_hadamard"), x)
    # the first convolution by one stacked block of 32 for 27 weights of an output, or by 9 taps of 8: 32 is less
    assert made.report.converted == {"0": 32, "6": 8}
    assert made.report.skipped["3"].startswith("a convolution that pads with other than zeros")
    z = _normal(generator, 3, made.dim)
    out = made(x, z)
    for s in range(3):
        want = functional_call(made.net, made.materialise(z[s]), (x,))
        torch.testing.assert_close(out[s], want, rtol=0, atol=1e-10)


def test_it_needs_few_numbers() -> None:
    # 1 -> 128 and 128 -> 1 are reshaped blocks of 16 x 16, three numbers per row and column of a block with g, a and b
    report = convert(_mlp(1, 128, 128, 1), "walsh_hadamard").report
    assert report.converted == {"0": 16, "2": 128, "4": 16}
    assert report.point == 2 * (16 + 128 + 16) + 128 + 128 + 1
    everything = convert(_mlp(1, 128, 128, 1), "walsh_hadamard(scales=latent, bias=gaussian)").report
    assert everything.point == 0 and everything.latent == 3 * (16 + 128 + 16) + 128 + 128 + 1


def test_other_layers_are_left_with_a_reason() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    net[1].weight.requires_grad_(False)
    skipped = convert(net, "walsh_hadamard", exclude="4.*").report.skipped
    assert skipped["1"] == "its weight does not require gradients"
    assert skipped["0"] == skipped["2"] == "neither a linear layer nor a convolution over two dimensions"
    assert "1" in convert(net, "walsh_hadamard(residual=true)").report.converted
    with pytest.raises(ConfigError, match=r"3: its weight is not chosen"):
        convert(net, "walsh_hadamard", include="3.bias")


def test_on_top_of_a_trained_network_it_begins_there(generator: torch.Generator) -> None:
    net = _mlp(3, 16, 2)
    x = _normal(generator, 5, 3)
    made = convert(net, "walsh_hadamard(residual=true, prior=isotropic)")
    mean, sd = made.initial(generator)
    torch.testing.assert_close(made(x, mean.unsqueeze(0))[0], net(x), rtol=0, atol=1e-12)
    assert (sd > 0).all()


@pytest.mark.parametrize("spec", ["walsh_hadamard(prior=isotropic, bias=gaussian)", "walsh_hadamard(scales=latent)"])
def test_the_cross_entropy_is_that_of_draws(spec: str, generator: torch.Generator) -> None:
    made = convert(_mlp(3, 6, 2), spec)
    with torch.no_grad():  # off the start, where the isotropic prior is the one on the latent
        for p in made.parameters():
            p.mul_(torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.5)
    mean, sd = _normal(generator, made.dim), 0.5 * _normal(generator, made.dim).exp()
    value = made.cross_entropy(mean, sd.square(), independent=True)
    draws = -made.log_prior(mean + sd * _normal(generator, 20_000, made.dim)).detach()
    assert abs(draws.mean() - value.detach()) < 5 * draws.std() / 20_000**0.5
    if "isotropic" in spec:
        assert made.cross_entropy(mean, sd.square()) is None
        assert not made.gaussian_prior


@pytest.mark.parametrize(
    "options",
    [{"prior": "flat"}, {"scales": "fixed"}, {"layout": "rows"}, {"residual": "yes"}, {"bias": "none"},
     {"gain": "tanh"}, {"scale": 0.0}, {"scale": True}, {"scale": float("nan")}],
    ids=str,
)  # fmt: skip
def test_options_without_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
        WalshHadamard(**options)


@pytest.mark.parametrize("options", ["", "layout=stack", "layout=taps", "layout=stack, residual=true",
                                     "layout=stack, scales=latent, bias=gaussian"])  # fmt: skip
@pytest.mark.parametrize(
    "convolution",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "padding": "same"},
        {"kernel_size": 2, "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 2, "dilation": (2, 1), "bias": False},
        {"kernel_size": 3, "padding": 1, "groups": 2},
    ],
    ids=str,
)
def test_a_latent_for_each_datum_in_a_convolutional_network(
    generator: torch.Generator, convolution: dict[str, Any], options: str
) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 8, **convolution), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    ).double()  # fmt: skip
    x = _normal(generator, 5, 2, 8, 8)
    made = _settled(convert(net, f"walsh_hadamard({options})" if options else "walsh_hadamard"), x)
    z = _normal(generator, 2, 5, made.dim)
    each = torch.cat([made(x[i : i + 1], z[:, i]) for i in range(5)], 1)
    torch.testing.assert_close(made(x, z), each, rtol=1e-10, atol=1e-10)
    # kernels of each datum's own take several times as long as one for all: not what a fit takes unasked
    assert made.example_noise
    assert not made.cheap_example_noise


@pytest.mark.parametrize("layout", ["stack", "taps"])
def test_latents_of_each_datum_in_a_convolution_have_derivatives_and_run_under_restarts(
    generator: torch.Generator, layout: str
) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()
    x = _normal(generator, 3, 1, 4, 4)
    made = _settled(convert(net, f"walsh_hadamard(layout={layout})"), x)
    z = _normal(generator, 2, 3, made.dim)
    assert torch.autograd.gradcheck(lambda at: made(x, at), z.requires_grad_())
    many = _normal(generator, 4, 2, 3, made.dim)
    restarts = torch.vmap(lambda at: made(x, at))(many)
    torch.testing.assert_close(restarts, torch.stack([made(x, part) for part in many]), rtol=1e-10, atol=1e-10)
