"""Two normal modes on a line."""

from __future__ import annotations

import torch

from vifamily.errors import ConfigError
from vifamily.problems._base import Problem
from vifamily.problems._mixture import normal_mixture
from vifamily.registry import register

__all__ = ["bimodal"]


@register("problems", "bimodal")
def bimodal(*, weight: float = 0.5, separation: float = 3.0) -> Problem:
    r"""Mixture of two unit normal laws on a line.

    .. math:: p(z) = w\, N(z; -d, 1) + (1 - w)\, N(z; d, 1)

    Normalised, so the log evidence is 0; the mean is :math:`(1 - 2w) d` and the variance :math:`1 + 4 w (1 - w) d^2`.
    Objectives that see only the score :math:`\nabla \log p` can hardly tell one weight from another when the modes are
    apart.

    Args:
        weight: :math:`w`, the weight of the lower mode, strictly between 0 and 1.
        separation: :math:`d`, the distance of each mode from 0.

    Returns:
        The problem, with exact moments and independent draws.

    Raises:
        ConfigError: If the weight is not strictly between 0 and 1.

    Example:
        >>> bimodal().reference.sd.round(6)
        array([3.162278])
    """
    if not 0 < weight < 1:
        raise ConfigError(f"weight must lie strictly between 0 and 1, got {weight}.")
    weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
    means = torch.tensor([[-separation], [separation]], dtype=torch.float64)
    return normal_mixture(
        "bimodal", weights, means, 1.0, "Two separate modes on a line: a family with one mode must choose or blur."
    )
