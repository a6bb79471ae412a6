"""A normal law with equal correlations."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.models import Density
from vifamily.problems._base import NUM_DRAWS, Problem, Reference, exact_draws, indexed
from vifamily.registry import register

__all__ = ["correlated_normal"]


@register("problems", "correlated_normal")
def correlated_normal(*, dim: int = 2, correlation: float = 0.9, mean: float = 1.0) -> Problem:
    r"""Normal law with unit variances and one correlation between all coordinates.

    .. math:: p(z) = N(z;\ m \mathbf 1,\ (1 - \rho) I + \rho \mathbf 1 \mathbf 1^T)

    The smallest target that a mean-field family cannot hold: under the reverse Kullback-Leibler divergence it lands on
    the conditional standard deviation :math:`(\Lambda_{ii})^{-1/2}` instead of 1. The density is normalised, so the log
    evidence is 0.

    Args:
        dim: Number of coordinates.
        correlation: :math:`\rho`, between ``-1 / (dim - 1)`` and 1.
        mean: :math:`m`, the mean of every coordinate.

    Returns:
        The problem, with exact moments and independent draws.

    Raises:
        ConfigError: If the dimension is not positive or the covariance would not be positive definite.

    Example:
        >>> problem = correlated_normal(dim=3, correlation=0.5)
        >>> problem.model.dim, problem.reference.sd
        (3, array([1., 1., 1.]))
    """
    if dim < 1:
        raise ConfigError(f"dim must be at least 1, got {dim}.")
    lowest = -1.0 / (dim - 1) if dim > 1 else -1.0
    if not lowest < correlation < 1:
        raise ConfigError(f"correlation must lie strictly between {lowest:.4g} and 1 for dim={dim}, got {correlation}.")
    covariance = torch.full((dim, dim), float(correlation), dtype=torch.float64).fill_diagonal_(1.0)
    factor: Tensor = torch.linalg.cholesky(covariance)
    precision = torch.cholesky_inverse(factor)
    log_normaliser = 0.5 * dim * math.log(2 * math.pi) + float(factor.diagonal().log().sum())

    def log_prob(z: Tensor) -> Tensor:
        centred = z - mean
        squares = (centred * (centred @ precision)).sum(-1)
        return -0.5 * squares - log_normaliser

    def draw(source: torch.Generator) -> Tensor:
        return mean + torch.randn(NUM_DRAWS, dim, generator=source, dtype=torch.float64) @ factor.T

    reference = Reference(
        "analytic",
        indexed("z", dim),
        np.full(dim, float(mean)),
        np.ones(dim),
        exact_draws("correlated_normal", draw),
        0.0,
        "closed form; independent draws",
    )
    return Problem(
        "correlated_normal",
        Density(log_prob, dim=dim, name="correlated_normal"),
        reference,
        f"Normal law in {dim} dimensions with correlation {correlation}: what mean-field loses, in closed form.",
    )
