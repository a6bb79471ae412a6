"""Log densities of the usual laws, elementwise, without the costly checks of a distribution object."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "bounded_exp",
    "half_cauchy_log_density",
    "half_normal_log_density",
    "log_normal_log_density",
    "normal_log_density",
    "student_t_log_density",
]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def normal_log_density(x: Tensor, mean: Tensor | float = 0.0, sd: Tensor | float = 1.0) -> Tensor:
    """Return the log density of a normal law."""
    log_sd = sd.log() if isinstance(sd, Tensor) else math.log(sd)
    return -0.5 * ((x - mean) / sd).square() - log_sd - _HALF_LOG_TWO_PI


def half_cauchy_log_density(x: Tensor, scale: float) -> Tensor:
    """Return the log density of a Cauchy law on the positive half-line, finite also where ``x ** 2`` overflows."""
    log_ratio = x.log() - math.log(scale)
    return math.log(2 / (math.pi * scale)) - torch.nn.functional.softplus(2 * log_ratio)


def half_normal_log_density(x: Tensor, sd: float) -> Tensor:
    """Return the log density of a zero-mean normal law on the positive half-line."""
    return normal_log_density(x, 0.0, sd) + math.log(2)


def log_normal_log_density(x: Tensor, mean: Tensor | float, sd: Tensor | float) -> Tensor:
    """Return the log density of a variable whose log is normal."""
    log_x = x.log()
    return normal_log_density(log_x, mean, sd) - log_x


def student_t_log_density(x: Tensor, df: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the log density of Student's t law with ``df`` degrees of freedom."""
    half = 0.5 * (df + 1)
    constant = torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * (df * math.pi).log() - scale.log()
    return constant - half * torch.log1p(((x - mean) / scale).square() / df)


def bounded_exp(x: Tensor, limit: float = 40.0) -> Tensor:
    """Return ``exp(x)``, continued by its tangent above ``limit``.

    A Poisson rate ``exp(x)`` overflows for far starting points, and an infinite value has a NaN gradient. A clamp would
    drop the gradient that leads back; the tangent keeps it. With ``limit=40`` the rate is above 1e17 there, where no
    posterior of these problems has mass.

    Example:
        >>> import torch
        >>> bounded_exp(torch.tensor([0.0, 50.0]), limit=1.0).round(decimals=3)
        tensor([  1.0000, 135.9140])
    """
    return x.clamp(max=limit).exp() * (1 + torch.relu(x - limit))
