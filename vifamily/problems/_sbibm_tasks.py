"""Tasks of the benchmark of simulation-based inference, as simulators, and their reference posteriors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Uniform

from vifamily.errors import ReferenceDataError
from vifamily.models import Simulator

__all__ = ["TASKS", "Observation", "Task", "observations"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        make: Returns its simulator.
        published: Published classifier accuracies of NPE with a neural spline flow, by number of simulations.
        bound: Accuracy at ten thousand simulations that is asked for here, or None.
    """

    make: Callable[[], Simulator]
    published: dict[int, float]
    bound: float | None


@dataclasses.dataclass(frozen=True)
class Observation:
    """One observation with draws of its posterior.

    Attributes:
        number: Its number in the benchmark.
        x: The data.
        draws: Reference draws, ``(draw, dim)``.
    """

    number: int
    x: Tensor
    draws: Tensor


def _box(low: float, high: float, dim: int) -> Distribution:
    return Independent(Uniform(low * torch.ones(dim), high * torch.ones(dim)), 1)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def _two_moons() -> Simulator:
    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        angle = math.pi * (torch.rand(len(theta), generator=generator) - 0.5)
        radius = 0.1 + 0.01 * torch.randn(len(theta), generator=generator)
        first = radius * angle.cos() + 0.25 - theta.sum(-1).abs() / math.sqrt(2)
        second = radius * angle.sin() + (theta[:, 1] - theta[:, 0]) / math.sqrt(2)
        return torch.stack([first, second], -1)

    return Simulator(_box(-1, 1, 2), simulate, batched=True, name="two_moons")


def _gaussian_linear() -> Simulator:
    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        return theta + math.sqrt(0.1) * _normal(theta, generator)

    prior = MultivariateNormal(torch.zeros(10), 0.1 * torch.eye(10))
    return Simulator(prior, simulate, batched=True, name="gaussian_linear")


def _gaussian_mixture() -> Simulator:
    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        wide = torch.rand(len(theta), 1, generator=generator) < 0.5
        return theta + torch.where(wide, 1.0, 0.1) * _normal(theta, generator)

    return Simulator(_box(-10, 10, 2), simulate, batched=True, name="gaussian_mixture")


def _slcp() -> Simulator:
    def simulate(theta: Tensor, generator: torch.Generator) -> Tensor:
        first, second, rho = theta[:, 2].square(), theta[:, 3].square(), theta[:, 4].tanh()
        below = rho * second
        left = (first.square() + 1e-6).sqrt()
        # the Cholesky factor of the covariance with its jitter
        cross = below * first / left
        right = (second.square() + 1e-6 - cross.square()).clamp_min(0).sqrt()
        noise = torch.randn(len(theta), 4, 2, generator=generator)
        x = theta[:, None, 0] + left[:, None] * noise[..., 0]
        y = theta[:, None, 1] + cross[:, None] * noise[..., 0] + right[:, None] * noise[..., 1]
        return torch.stack([x, y], -1).flatten(1)

    return Simulator(_box(-3, 3, 5), simulate, batched=True, name="slcp")


TASKS: dict[str, Task] = {
    "two_moons": Task(_two_moons, {1000: 0.725, 10_000: 0.606}, 0.60),
    "gaussian_linear": Task(_gaussian_linear, {1000: 0.694, 10_000: 0.552}, 0.55),
    "gaussian_mixture": Task(_gaussian_mixture, {1000: 0.716, 10_000: 0.615}, 0.62),
    "slcp": Task(_slcp, {1000: 0.975, 10_000: 0.901}, 0.88),
}
"""Published numbers: means over ten observations, from the benchmark's own tables (the rerun for gaussian_mixture)."""


def observations(folder: Path, name: str) -> list[Observation]:
    """Read the observations of a task and the draws of their posteriors.

    Raises:
        ReferenceDataError: If the file is not there or is not of this form.
    """
    file = folder / f"{name}.npz"
    try:
        with np.load(file, allow_pickle=False) as found:
            held: Any = found
            return [
                Observation(
                    int(i),
                    torch.as_tensor(held[f"obs{i}_observation"], dtype=torch.float32),
                    torch.as_tensor(held[f"obs{i}_samples"], dtype=torch.float32),
                )
                for i in held["observations"].tolist()
            ]
    except (OSError, KeyError, ValueError) as error:
        raise ReferenceDataError(
            f"cannot read the reference posteriors in {file} ({error}): give the folder with the npz files as --data."
        ) from error
