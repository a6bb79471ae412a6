"""A small model of each kind, on which it can be planned what meets what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vifamily.models import Density, LikelihoodModel, Model, Simulator

__all__ = ["KINDS", "ModelKind"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """A kind of model, by an example.

    Attributes:
        letter: What stands for it in tables.
        description: What it is, in a few words.
        make: Returns the example.
    """

    letter: str
    description: str
    make: Callable[[], Model]


_MEAN = (1.0, -0.5)
_FACTOR = ((1.0, 0.0), (0.6, 0.8))


def _normal(z: Tensor) -> Tensor:
    mean, factor = z.new_tensor(_MEAN), z.new_tensor(_FACTOR)
    whitened: Tensor = (z - mean) @ torch.linalg.inv(factor).mT
    return -0.5 * whitened.square().sum(-1)


def _density() -> Model:
    return Density(_normal, dim=2, name="correlated normal")


def _reference() -> Model:
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return _density().with_reference_draws(noise.new_tensor(_MEAN) + noise @ noise.new_tensor(_FACTOR).mT)


def _likelihood() -> Model:
    x = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64)
    y = 0.5 + x + 0.5 * torch.cos(9.0 * torch.arange(20, dtype=torch.float64))

    def log_likelihood(z: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        inputs, outputs = data
        return -0.5 * (outputs - z[:, :1] - z[:, 1:] * inputs).square() - _HALF_LOG_2PI

    def simulate(z: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(len(z), 20, generator=generator, dtype=torch.float64)
        return z[:, :1] + z[:, 1:] * x.to(z) + noise.to(z)

    return LikelihoodModel((0.0, 2.0), log_likelihood, data=(x, y), dim=2, simulate=simulate, name="linear regression")


def _local() -> Model:
    y = torch.tensor([-1.2, 0.4, 2.0, -0.3, 0.9, 1.5], dtype=torch.float64)

    def log_local(theta: dict[str, Tensor], local: dict[str, Tensor], data: Tensor) -> Tensor:
        code, mean, log_sd = local["code"], theta["mean"].unsqueeze(-1), theta["log_sd"].unsqueeze(-1)
        prior = -0.5 * (code - mean).square() - _HALF_LOG_2PI
        return prior - 0.5 * ((data - code) * (-log_sd).exp()).square() - log_sd - _HALF_LOG_2PI

    return LikelihoodModel(
        (0.0, 1.0), data=y, parameters={"mean": "real", "log_sd": "real"}, local={"code": ((), "real")},
        log_local=log_local, name="random effects",
    )  # fmt: skip


def _discrete() -> Model:
    table = torch.tensor([[0.3, -1.0, 0.6], [-0.7, 0.9, -0.2]], dtype=torch.float64)

    def log_prob(theta: dict[str, Tensor]) -> Tensor:
        return table[theta["a"].long(), theta["b"].long()]

    supports = {"a": "integer_interval(0, 1)", "b": "integer_interval(0, 2)"}
    return Density(log_prob, parameters=supports, name="two counts")


def _simulator() -> Model:
    prior = torch.distributions.Normal(torch.zeros(2), torch.ones(2))

    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        return theta + torch.randn(theta.shape, generator=generator)

    return Simulator(prior, simulate, batched=True, name="noisy observation")


KINDS: Mapping[str, ModelKind] = {
    "density": ModelKind("D", "a smooth log density on real space", _density),
    "likelihood": ModelKind("L", "a prior and a likelihood per datum", _likelihood),
    "local": ModelKind("P", "latents of each datum beside global ones", _local),
    "discrete": ModelKind("I", "integer latents", _discrete),
    "reference": ModelKind("R", "a density with reference draws of its posterior", _reference),
    "simulator": ModelKind("S", "a prior and a simulator, without a likelihood", _simulator),
}
"""Kinds of model on which :func:`vifamily.compatibility` plans; each has at least two coordinates."""
