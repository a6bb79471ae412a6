"""Neal's funnel."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.models import Density
from vifamily.problems._base import NUM_DRAWS, Problem, Reference, exact_draws, indexed
from vifamily.problems._densities import normal_log_density
from vifamily.registry import register

__all__ = ["funnel"]


@register("problems", "funnel")
def funnel(*, dim: int = 10, scale: float = 3.0) -> Problem:
    r"""Neal's funnel: the first coordinate is the log variance of all others.

    .. math:: v \sim N(0, s), \qquad x_i \mid v \sim N(0, e^{v/2}), \quad i = 1, \dots, \mathrm{dim} - 1

    The density is normalised (log evidence 0); all means are 0, :math:`\mathrm{sd}(v) = s` and
    :math:`\mathrm{sd}(x_i) = e^{s^2/4}`. From R. M. Neal, "Slice sampling", Annals of Statistics 31 (2003), section 8,
    there with ``dim=10`` and ``scale=3``.

    Args:
        dim: Number of coordinates, at least 2.
        scale: :math:`s > 0`, the standard deviation of the log variance.

    Returns:
        The problem, with parameters ``v`` and ``x``, exact moments and independent draws.

    Raises:
        ConfigError: If ``dim`` is below 2 or ``scale`` is not positive.

    Example:
        >>> funnel(dim=3).reference.names
        ('v', 'x[0]', 'x[1]')
    """
    if dim < 2:
        raise ConfigError(f"dim must be at least 2, the log variance and one coordinate, got {dim}.")
    if not scale > 0:
        raise ConfigError(f"scale must be positive, got {scale}.")
    half_log_two_pi = 0.5 * math.log(2 * math.pi)

    def log_prob(theta: dict[str, Tensor]) -> Tensor:
        v, x = theta["v"], theta["x"]
        given_v = -0.5 * (-v).exp() * x.square().sum(-1) - (dim - 1) * (0.5 * v + half_log_two_pi)
        return normal_log_density(v, 0.0, scale) + given_v

    def draw(source: torch.Generator) -> Tensor:
        noise = torch.randn(NUM_DRAWS, dim, generator=source, dtype=torch.float64)
        v = scale * noise[:, :1]
        return torch.cat([v, (0.5 * v).exp() * noise[:, 1:]], dim=-1)

    reference = Reference(
        "analytic",
        ("v", *indexed("x", dim - 1)),
        np.zeros(dim),
        np.array([scale, *[math.exp(0.25 * scale**2)] * (dim - 1)]),
        exact_draws("funnel", draw),
        0.0,
        "closed form; independent draws (their sample sd of x converges slowly: the law has heavy tails)",
    )
    model = Density(log_prob, parameters={"v": "real", "x": ((dim - 1,), "real")}, name="funnel")
    return Problem(
        "funnel",
        model,
        reference,
        f"Neal's funnel in {dim} dimensions: the scale of most coordinates varies by orders of magnitude.",
    )
