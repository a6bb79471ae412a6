"""A ring in two dimensions."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.models import Density
from vifamily.problems._base import NUM_DRAWS, Problem, Reference, exact_draws, indexed
from vifamily.registry import register

__all__ = ["ring"]


@register("problems", "ring")
def ring(*, radius: float = 2.0, width: float = 0.2) -> Problem:
    r"""Mass around a circle: no Gaussian covers it, and its middle is empty.

    .. math:: \log p(z) = -\frac{(\lVert z \rVert - R)^2}{2 w^2} - \log Z

    with the constant :math:`Z` left out, so that the log evidence is
    :math:`\log Z = \log 2\pi \int_0^\infty r\, e^{-(r-R)^2/2w^2} dr`. The mean is 0 by symmetry; the variance of each
    coordinate is half of :math:`E r^2`. Both integrals are one-dimensional and done by adaptive quadrature.

    Args:
        radius: :math:`R \ge 0`.
        width: :math:`w > 0`.

    Returns:
        The problem, with moments and log evidence by quadrature, and independent draws by inversion of the radius'
        distribution function.

    Raises:
        ConfigError: If the radius is negative or the width is not positive.

    Example:
        >>> round(ring().reference.log_evidence, 6)
        1.840525
    """
    if radius < 0 or not width > 0:
        raise ConfigError(
            f"radius must not be negative and width must be positive, got radius={radius}, width={width}."
        )

    def log_prob(z: Tensor) -> Tensor:
        # The tiny term keeps the first two derivatives finite at the origin, where the radius has a kink; it is below
        # rounding elsewhere.
        r = (z.square().sum(-1) + 1e-24).sqrt()
        return -0.5 * ((r - radius) / width).square()

    lowest, highest = max(0.0, radius - 12 * width), radius + 12 * width

    def moment(power: int) -> float:
        value, _ = integrate.quad(
            lambda r: r ** (power + 1) * math.exp(-0.5 * ((r - radius) / width) ** 2),
            lowest,
            highest,
            points=[radius],
            epsabs=0.0,
            epsrel=1e-12,
            limit=200,
        )
        return float(value)

    mass = moment(0)
    grid = np.linspace(lowest, highest, 20_001)
    density = grid * np.exp(-0.5 * ((grid - radius) / width) ** 2)
    cumulative = integrate.cumulative_trapezoid(density, grid, initial=0.0)

    def draw(source: torch.Generator) -> Tensor:
        uniform = torch.rand(NUM_DRAWS, 2, generator=source, dtype=torch.float64)
        r = torch.from_numpy(np.interp(uniform[:, 0].numpy() * cumulative[-1], cumulative, grid))
        angle = 2 * math.pi * uniform[:, 1]
        return torch.stack([r * angle.cos(), r * angle.sin()], dim=-1)

    reference = Reference(
        "quadrature",
        indexed("z", 2),
        np.zeros(2),
        np.full(2, math.sqrt(0.5 * moment(2) / mass)),
        exact_draws("ring", draw),
        math.log(2 * math.pi * mass),
        "one-dimensional adaptive quadrature of the radius; independent draws by inversion",
    )
    return Problem(
        "ring",
        Density(log_prob, dim=2, name="ring"),
        reference,
        "Mass around a circle: uncorrelated, dependent, empty in the middle.",
    )
