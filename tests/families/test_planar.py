"""Planar layers: the determinant, the inverse, and what keeps them one to one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vifamily.errors import IncompatibleError
from vifamily.families._planar import Planar
from vifamily.families.flow import Flow
from vifamily.types import LatentSpec


def _planar(generator: torch.Generator, dim: int = 4, transforms: int = 3, size: float = 2.0) -> Planar:
    layers = Planar(dim, transforms, generator=generator, dtype=torch.float64, device="cpu", start=1e-2)
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layers


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_the_log_determinant_is_that_of_the_jacobian(generator: torch.Generator) -> None:
    layers = _planar(generator)
    x = _normal(generator, 5, 4)
    _, log_det = layers.call_and_ladj(x)
    for row, got in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: layers.call_and_ladj(v)[0], row)
        determinant = torch.linalg.det(jacobian)
        assert determinant > 0
        torch.testing.assert_close(got, determinant.log(), rtol=0, atol=1e-8)


def test_one_layer_by_hand() -> None:
    layers = _planar(torch.Generator().manual_seed(0), 2, 1)
    with torch.no_grad():
        layers.direction.copy_(torch.tensor([[2.0, 0.0]]))
        layers.bend.copy_(torch.tensor([[-1.0, 3.0]]))
        layers.offset.fill_(0.5)
    y, log_det = layers.call_and_ladj(torch.tensor([0.25, -1.0], dtype=torch.float64))
    # w'u = -2 is not allowed: log(1 + (e - 1) e^-2) - 1 takes its place, in the first coordinate of u alone
    product = math.log1p((math.e - 1) * math.exp(-2)) - 1
    height = math.tanh(1.0)
    want = torch.tensor([0.25 + product / 2 * height, -1.0 + 3 * height], dtype=torch.float64)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det.item(), math.log(1 + product * (1 - height**2)), rtol=0, atol=1e-12)


def test_the_inverse_and_its_derivatives(generator: torch.Generator) -> None:
    layers = _planar(generator, size=1.0)
    x = _normal(generator, 6, 4)
    y = layers.call_and_ladj(x)[0]
    torch.testing.assert_close(layers.inv(y), x, rtol=0, atol=1e-8)
    forward = torch.autograd.functional.jacobian(lambda v: layers.call_and_ladj(v)[0], x[0])
    backward = torch.autograd.functional.jacobian(layers.inv, y[0].detach())
    torch.testing.assert_close(forward @ backward, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_direction_of_length_zero_is_a_shift(generator: torch.Generator) -> None:
    layers = _planar(generator, transforms=1)
    with torch.no_grad():
        layers.direction.zero_()
    y, log_det = layers.call_and_ladj(_normal(generator, 3, 4))
    assert torch.isfinite(y).all() and not log_det.any()
    loss = y.sum()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(layers.parameters())))


def test_the_density_integrates_to_one(generator: torch.Generator) -> None:
    family = Flow(kind="planar", transforms=2).build(LatentSpec(1), generator=generator)
    with torch.no_grad():
        for p in family.parameters():
            p.add_(0.7 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    grid = torch.linspace(-40, 40, 40_001, dtype=torch.float64).unsqueeze(-1)
    total = torch.trapezoid(family.log_prob(grid).exp(), grid.squeeze(-1)).detach()
    assert abs(float(total) - 1) < 1e-5


def test_a_context_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(IncompatibleError, match="context"):
        Flow(kind="planar").build(LatentSpec(2, context_dim=3), generator=generator)
