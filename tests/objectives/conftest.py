"""Tools of the tests of objectives: Gaussians on mixtures, gradients of many replicates."""

import math

import pytest
import torch

from vifamily import registry
from vifamily.testing._tools import flat_gradient, replicate
from vifamily.types import Draw, LatentSpec


def gaussian(mean, sd, spec="mean_field"):
    """A Gaussian family at given moments."""
    mean = torch.as_tensor(mean, dtype=torch.float64).reshape(-1)
    family = registry.build("families", spec).build(
        LatentSpec(mean.shape[0]), generator=torch.Generator().manual_seed(0)
    )
    family.start_at(mean, torch.as_tensor(sd, dtype=torch.float64).reshape(mean.shape))
    return family


def quadrature_noise(num):
    """Normal noise whose equal-weight sums are integrals: mid-points of equal probability, (num, 1)."""
    points = torch.special.ndtri((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    return (points / points.square().mean().sqrt())[:, None]


class GridGaussian(torch.nn.Module):
    """A normal law in one dimension as a weighted grid of points: sums over it are integrals, tails included."""

    def __init__(self, mean, sd, half_width=40.0, points=8001):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(float(mean), dtype=torch.float64))
        self.log_sd = torch.nn.Parameter(torch.tensor(math.log(sd), dtype=torch.float64))
        self.grid = torch.linspace(-half_width, half_width, points, dtype=torch.float64)[:, None]

    def __call__(self, noise, context=None):
        log_q = self.log_prob(self.grid)
        return Draw(self.grid, log_q, log_q.log_softmax(-1))

    def log_prob(self, z, context=None, *, frozen=False):
        scaled = (z[..., 0] - self.mean) / self.log_sd.exp()
        return -0.5 * scaled**2 - self.log_sd - 0.5 * math.log(2 * math.pi)

    def moments(self):
        return self.mean[None], (2 * self.log_sd).exp()[None, None]


def minimum(objective, model, family, noise, rounds=20):
    """Minimise on fixed noise by L-BFGS; returns mean, sd and value."""
    parameters = [p for p in family.parameters() if p.numel()]
    optimiser = torch.optim.LBFGS(parameters, max_iter=20, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimiser.zero_grad()
        loss = objective.loss(family, model, noise)
        loss.surrogate.backward()
        return loss.surrogate.detach()

    for _ in range(rounds):
        optimiser.step(closure)
    mean, covariance = family.moments()
    value = float(objective.loss(family, model, noise).value)
    return float(mean.detach()[0]), math.sqrt(float(covariance.detach()[0, 0])), value


def replicated_gradient(objective, model, family, draws, copies, seed=0):
    """Gradient of each of many replicates on independent noise, (copies, size), and their values."""
    stack = replicate(family, copies)
    shape = (copies, draws, *family.noise_spec.shape)
    maker = torch.randn if family.noise_spec.law == "normal" else torch.rand
    noise = maker(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = objective.loss(stack, model, noise)
    return flat_gradient(loss, stack, copies), loss.value


def same_mean(a, b, errors=5.0):
    """Whether two samples have the same mean over their first axis, within standard errors."""
    error = (a.var(0) / a.shape[0] + b.var(0) / b.shape[0]).sqrt()
    return bool(((a.mean(0) - b.mean(0)).abs() <= errors * error + 1e-12).all())


@pytest.fixture
def tools():
    class Tools:
        gaussian = staticmethod(gaussian)
        on_grid = GridGaussian
        quadrature_noise = staticmethod(quadrature_noise)
        minimum = staticmethod(minimum)
        replicated_gradient = staticmethod(replicated_gradient)
        same_mean = staticmethod(same_mean)

    return Tools
