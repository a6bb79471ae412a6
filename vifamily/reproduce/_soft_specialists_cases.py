"""Small models whose critical alpha is known, with data that have the moments the formulas ask for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import logsigmoid

from vifamily.models import LikelihoodModel

__all__ = [
    "Case",
    "closed_form_cases",
    "contradictory_groups",
    "flipped_labels",
    "grid",
    "location",
    "normal_quantiles",
    "outliers",
    "random_groups",
    "shared_sign",
    "skewed",
    "two_features",
]

F64 = torch.float64
Unit = Literal["datum", "group"]
_LOG_2PI = math.log(2 * math.pi)
_WIDE = (0.0, 1e6)
"""Mean and sd of the priors: so wide that they play no part."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with what is known of it.

    Attributes:
        name: For tables and figures.
        model: The model.
        centre: Where members collapse to, ``(dim,)``.
        alpha_star: The critical alpha in closed form, or None where it is computed from the data.
        unit: What is routed.
        num_members: Members to use.
    """

    name: str
    model: LikelihoodModel
    centre: Tensor
    alpha_star: float | None = None
    unit: Unit = "datum"
    num_members: int = 8


def normal_quantiles(size: int, variance: float = 1.0) -> Tensor:
    """Return quantiles of a centred normal law, scaled to their exact variance."""
    level = (torch.arange(size, dtype=F64) + 0.5) / size
    point = torch.special.ndtri(level)
    out: Tensor = point * (variance / point.square().mean()).sqrt()
    return out


def grid(*axes: Tensor) -> list[Tensor]:
    """Return all combinations of values, one vector for each axis."""
    return [part.reshape(-1) for part in torch.meshgrid(*axes, indexing="ij")]


def location(y: Tensor) -> LikelihoodModel:
    """Unit-variance normal data ``(datum, dim)`` about an unknown mean."""

    def log_likelihood(theta: Tensor, y: Tensor) -> Tensor:
        return (-0.5 * ((y - theta[:, None]).square() + _LOG_2PI)).sum(-1)

    return LikelihoodModel(_WIDE, log_likelihood, data=y, dim=y.shape[1])


def contradictory_groups(k: float, size: int = 20, *, inputs: Tensor | None = None) -> Case:
    """Two groups with opposite slopes, ``y = k x + e`` and ``y = -k x + e``, and one slope to explain them.

    The inputs take three values with the first five moments of a standard normal, so that the formula is exact; other
    ``inputs`` can be given.
    """
    x = torch.tensor([-math.sqrt(3.0), 0, 0, 0, 0, math.sqrt(3.0)], dtype=F64) if inputs is None else inputs
    x, e, sign = grid(x, normal_quantiles(size), torch.tensor([1.0, -1.0], dtype=F64))

    return _opposite_slopes(k, x, sign * k * x + e)


def random_groups(k: float, size: int, *, seed: int) -> Case:
    """The same two groups with inputs and errors drawn at random; the threshold is that of the population."""
    generator = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, size, generator=generator, dtype=F64)
    sign = torch.tensor([1.0, -1.0], dtype=F64).repeat(size)[:size]
    return _opposite_slopes(k, x, sign * k * x + e)


def _opposite_slopes(k: float, x: Tensor, y: Tensor) -> Case:
    def log_likelihood(theta: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return -0.5 * ((y - theta * x).square() + _LOG_2PI)

    model = LikelihoodModel(_WIDE, log_likelihood, data=(x, y), dim=1)
    centre = ((x * y).sum() / x.square().sum())[None]
    return Case(f"two groups, k = {k:g}", model, centre, 1 / (1 + 3 * k**2))


def two_features(k: float, b: float) -> Case:
    """Regression on two features: the groups contradict each other in the first and agree in the second."""
    three = torch.tensor([-math.sqrt(3.0), 0, 0, 0, 0, math.sqrt(3.0)], dtype=F64)
    x1, x2, e, sign = grid(three, three, normal_quantiles(8), torch.tensor([1.0, -1.0], dtype=F64))

    def log_likelihood(theta: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return -0.5 * ((y - theta @ x.T).square() + _LOG_2PI)

    data = (torch.stack([x1, x2], -1), sign * k * x1 + b * x2 + e)
    centre = torch.tensor([0.0, b], dtype=F64)
    return Case("two features", LikelihoodModel(_WIDE, log_likelihood, data=data, dim=2), centre, 1 / (1 + 3 * k**2))


def shared_sign(length: int, *, seed: int, num_sequences: int = 1000, logit: float = 3.0) -> Case:
    """Sequences of binary tokens that share a hidden sign, and a model of single tokens; a unit is a sequence.

    Each sequence comes with its mirror image, so that the best logit is zero. The threshold is that of the correlation
    in these data.
    """
    generator = torch.Generator().manual_seed(seed)
    sign = torch.where(torch.rand(num_sequences, 1, generator=generator) < 0.5, -1.0, 1.0)
    chance = 1 / (1 + math.exp(-logit))
    agree = torch.where(torch.rand(num_sequences, length, generator=generator) < chance, 1.0, -1.0)
    y = torch.cat([sign * agree, -sign * agree]).to(F64)
    rho = float((y.sum(1).square().mean() - length) / (length * (length - 1)))

    def log_likelihood(theta: Tensor, y: Tensor) -> Tensor:
        return logsigmoid(theta * y)

    units = torch.arange(2 * num_sequences).repeat_interleave(length)
    model = LikelihoodModel(_WIDE, log_likelihood, data=y.reshape(-1), dim=1, groups=units)
    return Case(
        f"sequences, T = {length}",
        model,
        torch.zeros(1, dtype=F64),
        1 / (1 + (length - 1) * rho),
        "group",
        num_members=4,
    )


def flipped_labels(noise: float, *, seed: int, size: int = 2000) -> Case:
    """Logistic regression, slope 3 on normal inputs, with labels flipped at random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=F64)
    y = torch.rand(size, generator=generator, dtype=F64) < torch.sigmoid(3 * x)
    flipped = torch.rand(size, generator=generator, dtype=F64) < noise
    sign = torch.where(y ^ flipped, 1.0, -1.0).to(F64)

    def log_likelihood(theta: Tensor, signed: Tensor) -> Tensor:
        return logsigmoid(theta * signed)

    model = LikelihoodModel(_WIDE, log_likelihood, data=x * sign, dim=1)
    return Case(f"flipped labels, {100 * noise:g} %", model, _best_logit(x * sign))


def _best_logit(signed: Tensor) -> Tensor:
    slope = torch.zeros(1, dtype=F64)
    for _ in range(100):
        p = torch.sigmoid(-slope * signed)
        step = (p * signed).mean() / (p * (1 - p) * signed.square()).mean()
        slope = slope + step
        if float(step.abs()) < 1e-14:
            break
    return slope


def skewed(size: int = 1000, variance: float = 2.0) -> Case:
    """Location of skewed data: gamma of shape 2, centred and scaled."""
    y = torch.from_numpy(stats.gamma.ppf(((torch.arange(size, dtype=F64) + 0.5) / size).numpy(), 2.0))
    y = y - y.mean()
    y = y * (variance / y.square().mean()).sqrt()
    return Case("skewed", location(y[:, None]), torch.zeros(1, dtype=F64), 1 / variance)


def outliers(size: int = 1000, share: float = 0.1, far: float = 10.0) -> Case:
    """Standard normal data with a share of outliers about a far point, and one location."""
    count = round(share * size)
    y = torch.cat([normal_quantiles(size - count), far + normal_quantiles(count)])
    variance = 1 + share * (1 - share) * far**2
    return Case("outliers", location(y[:, None]), y.mean()[None], 1 / variance)


def closed_form_cases(*, seed: int, quick: bool = False) -> Sequence[Case]:
    """Every case in which collapse below and spread above the critical alpha are tried."""
    turned = torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]], dtype=F64)
    plane = torch.stack(grid(normal_quantiles(24, 4.0), normal_quantiles(24, 1.5)), -1) @ turned.T
    zero = torch.zeros(2, dtype=F64)
    cases = [
        *(
            Case(f"location, variance {v:g}", location(normal_quantiles(400, v)[:, None]), zero[:1], 1 / v)
            for v in (0.5, 1.0, 2.0, 4.0)
        ),
        Case("location in the plane", location(plane), zero, 0.25, num_members=12),
        *(contradictory_groups(k) for k in (0.5, 1.0, 2.0, 4.0)),
        *(shared_sign(t, seed=seed + t, num_sequences=200 if quick else 1000) for t in (2, 4, 8, 16)),
        *(flipped_labels(noise, seed=seed + 100, size=500 if quick else 2000) for noise in (0.05, 0.125, 0.25)),
    ]
    return cases
