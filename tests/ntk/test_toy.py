"""The rotation toy: a von Mises posterior on the circle, whose flow at infinite width is known."""

import math

import numpy as np
import torch

from vifamily.ntk import TwoLayerReLU, circle_spectrum, layerwise_gram
from vifamily.rng import generator

DOUBLE = torch.float64
MEAN = math.exp(-0.5 * 0.5**2)  # mean resultant length of a rotation with noise of 0.5
STEP, STEPS = 0.25, 80


def circle(count: int) -> torch.Tensor:
    angle = 2 * math.pi * torch.arange(count, dtype=DOUBLE) / count
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def slope(outputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient by the natural parameters of the inclusive KL divergence: the mean under q minus the posterior's."""
    length = outputs.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.special.i1e(length) / torch.special.i0e(length) * outputs / length - MEAN * x


def trained(width: int, seed: int, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Outputs after training, and the relative drift of the kernel."""
    net = TwoLayerReLU(2, width, 2, generator=generator(seed, "toy", width))
    before = layerwise_gram(net, x)
    for _ in range(STEPS):
        out = net(x)
        grads = torch.autograd.grad(out, list(net.parameters()), slope(out.detach(), x) / len(x))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p.sub_(STEP * g)
    return net(x).detach(), float((layerwise_gram(net, x) - before).norm() / before.norm())


def test_a_wide_network_follows_the_flow_at_infinite_width(seed) -> None:
    x, c = circle(32), torch.zeros((), dtype=DOUBLE)
    rate = circle_spectrum(2)[1]
    for _ in range(STEPS):  # f(x) = c x: only the first harmonic ever moves
        c = c + STEP * rate * (MEAN - torch.special.i1e(c) / torch.special.i0e(c))
    wide = trained(16384, seed, x)[0]
    assert float(c) > 1.0
    assert float((wide - c * x).norm() / (c * x).norm()) < 0.05


def test_drift_falls_as_one_over_width(seed) -> None:
    x, widths = circle(32), [256, 1024, 4096]
    drifts = [float(np.mean([trained(width, seed + k, x)[1] for k in range(3)])) for width in widths]
    found = np.polyfit(np.log(widths), np.log(drifts), 1)[0]
    assert -1.15 < found < -0.85
