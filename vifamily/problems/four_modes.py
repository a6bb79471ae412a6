"""Four normal modes in the plane."""

from __future__ import annotations

import torch

from vifamily.errors import ConfigError
from vifamily.problems._base import Problem
from vifamily.problems._mixture import normal_mixture
from vifamily.registry import register

__all__ = ["four_modes"]


@register("problems", "four_modes")
def four_modes(*, separation: float = 3.0, sd: float = 0.7) -> Problem:
    r"""Mixture of four equal normal laws at the corners of a square.

    .. math:: p(z) = \tfrac14 \sum_{s, t \in \{-1, 1\}} N(z;\ (s d, t d),\ \sigma^2 I)

    Normalised, so the log evidence is 0; the mean is 0 and the variance of each coordinate :math:`\sigma^2 + d^2`.

    Args:
        separation: :math:`d`, half the side of the square.
        sd: :math:`\sigma > 0`.

    Returns:
        The problem, with exact moments and independent draws.

    Raises:
        ConfigError: If ``sd`` is not positive.

    Example:
        >>> four_modes().reference.sd.round(4)
        array([3.0806, 3.0806])
    """
    if not sd > 0:
        raise ConfigError(f"sd must be positive, got {sd}.")
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    return normal_mixture(
        "four_modes", weights, separation * corners, sd, "Four separate modes at the corners of a square."
    )
