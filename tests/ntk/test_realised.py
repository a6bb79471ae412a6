"""A network beside the flow of its kernel: close where it is wide, and with each condition that fails in words."""

import math

import pytest
import torch

from vifamily.errors import ConfigError, DataError
from vifamily.ntk import TwoLayerReLU, compare_flow, layerwise_gram
from vifamily.rng import generator

DOUBLE = torch.float64
MEAN = math.exp(-0.5 * 0.5**2)  # mean resultant length of a rotation with noise of 0.5
BEST = 4.575082


def circle(count):
    angle = 2 * math.pi * torch.arange(count, dtype=DOUBLE) / count
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def von_mises(x):
    def loss(eta):
        length = (eta.square().sum(1) + 1e-20).sqrt()
        return torch.special.i0e(length).log() + length - MEAN * (eta * x).sum(1)

    return loss


def compared(seed, width=2048, **options):
    x = circle(12)
    net = TwoLayerReLU(2, width, 2, generator=generator(seed, "net", width))
    options = {"loss": von_mises(x), "time": 40.0, "best": BEST * x, "records": 4, "route": layerwise_gram} | options
    return compare_flow(net, x, **options), net


def test_a_wide_network_follows_its_kernel(seed) -> None:
    report, net = compared(seed)
    assert report.convex and report.gradient_flow and report.flat == (0, 0)
    # drift at 2048 units is near 0.02 here, and takes the outputs along by less
    assert float(report.gap.max()) < 0.05 and float(report.drift[-1]) < 0.1
    assert float(report.step_gap.max()) < 0.05
    assert report.excess is not None and report.bound is not None and report.excess <= report.bound.bound
    for words in ("close to gradient flow", "convex in the outputs", "stay within", "holds"):
        assert words in report.note().replace("\n", " "), words
    assert not net.readout.weight.any()  # the network itself was not trained
    assert len(report.times) == 5 and report.rates is not None
    assert len(report.plot().axes) == 2 and report.to_dict()["kernel"]["inputs"] == 12


def test_a_narrow_network_leaves_its_kernel_and_the_report_says_why(seed) -> None:
    report, _ = compared(seed, width=16, time=400.0)
    assert float(report.gap.max()) > 0.05 and float(report.drift[-1]) > 0.1
    assert "the kernel, which moves" in report.note()
    assert "wider" in report.note()


def test_adam_is_named(seed) -> None:
    report, _ = compared(seed, width=64, time=1.0, optimiser=lambda p: torch.optim.Adam(p, lr=0.02))
    assert not report.gradient_flow and report.step_size == 0.02
    assert "Adam with these settings is not gradient flow" in report.note()


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"weight_decay": 0.1}])
def test_momentum_and_decay_are_named(seed, options) -> None:
    report, _ = compared(seed, width=16, time=1.0, optimiser=lambda p: torch.optim.SGD(p, lr=0.1, **options))
    assert not report.gradient_flow


def test_a_clamped_domain_is_named(seed) -> None:
    x = circle(8)

    def clamped(eta):  # minimum outside of what the clamp lets through; zero, the start, lies below it
        return 0.5 * (eta.clamp(0.5, 1.0) - 2.0).square().sum(1)

    report, _ = compared(seed, width=32, loss=clamped, best=None, time=1.0)
    assert len(x) and report.flat[0] == 24  # of 12 inputs and two outputs
    assert "exactly flat in 24 entries" in report.note() and "barrier" in report.note()


def test_a_loss_that_is_not_convex_is_named(seed) -> None:
    report, _ = compared(seed, width=64, loss=lambda f: (f - 0.3).cos().sum(1), best=None, time=5.0)
    assert not report.convex and "not convex" in report.note()


def test_too_large_a_step_is_named(seed) -> None:
    y = circle(12)
    report, _ = compared(
        seed, width=64, loss=lambda f: 0.5 * (f - y).square().sum(1), best=y, time=40.0, step_size=13.0
    )
    assert report.step_size > report.stable_step
    assert "above the largest stable one" in report.note()


REFUSED = {
    "time": ({"time": -1.0}, ConfigError, "time must be"),
    "step": ({"step_size": 0.0}, ConfigError, "step_size must be"),
    "records": ({"records": 0}, ConfigError, "records"),
    "steps": ({"time": 1e9}, ConfigError, "more than 200000"),
    "both": ({"step_size": 0.1, "optimiser": lambda p: torch.optim.SGD(p, lr=0.1)}, ConfigError, "not both"),
    "domain": ({"loss": lambda f: (f - 1).sum(1).log()}, DataError, "domain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(seed, name) -> None:
    options, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        compared(seed, width=8, **options)
