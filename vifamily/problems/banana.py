"""A bent normal law in two dimensions."""

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

__all__ = ["banana"]


@register("problems", "banana")
def banana(*, curvature: float = 0.25, width: float = 2.0) -> Problem:
    r"""Two-dimensional normal law bent along a parabola.

    .. math:: z_0 \sim N(0, w), \qquad z_1 \mid z_0 \sim N(b\,(z_0^2 - w^2),\ 1)

    A shear of a normal law, so it is normalised (log evidence 0) and :math:`E z = 0`, :math:`\mathrm{sd}(z_0) = w`,
    :math:`\mathrm{sd}(z_1) = \sqrt{1 + 2 b^2 w^4}`, without linear correlation. The shape is the one of Haario, Saksman
    and Tamminen, "Adaptive proposal distribution for random walk Metropolis algorithm", Computational Statistics 14
    (1999).

    Args:
        curvature: :math:`b`, the strength of the bend; 0 gives a normal law.
        width: :math:`w > 0`, the standard deviation along the banana.

    Returns:
        The problem, with exact moments and independent draws.

    Raises:
        ConfigError: If ``width`` is not positive.

    Example:
        >>> banana().reference.sd.round(4)
        array([2.    , 1.7321])
    """
    if not width > 0:
        raise ConfigError(f"width must be positive, got {width}.")

    def log_prob(z: Tensor) -> Tensor:
        first, second = z.unbind(-1)
        return normal_log_density(first, 0.0, width) + normal_log_density(
            second, curvature * (first.square() - width**2)
        )

    def draw(source: torch.Generator) -> Tensor:
        noise = torch.randn(NUM_DRAWS, 2, generator=source, dtype=torch.float64)
        first = width * noise[:, 0]
        return torch.stack([first, noise[:, 1] + curvature * (first.square() - width**2)], dim=-1)

    reference = Reference(
        "analytic",
        indexed("z", 2),
        np.zeros(2),
        np.array([width, math.sqrt(1 + 2 * curvature**2 * width**4)]),
        exact_draws("banana", draw),
        0.0,
        "closed form; independent draws",
    )
    return Problem(
        "banana",
        Density(log_prob, dim=2, name="banana"),
        reference,
        "Normal law bent along a parabola: dependence without linear correlation.",
    )
