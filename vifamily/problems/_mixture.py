"""Mixtures of normal laws with equal standard deviations: the pieces that the multimodal problems share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vifamily.models import Density
from vifamily.problems._base import NUM_DRAWS, Problem, Reference, exact_draws, indexed

__all__ = ["normal_mixture"]


def normal_mixture(name: str, weights: Tensor, means: Tensor, sd: float, description: str) -> Problem:
    r"""Build the problem with density :math:`\sum_k w_k N(z; m_k, s^2 I)`.

    Args:
        name: Registered name.
        weights: :math:`w`, shape ``(component,)``, summing to 1.
        means: :math:`m`, shape ``(component, dim)``.
        sd: :math:`s`, one standard deviation for all.
        description: What makes it hard.
    """
    dim = means.shape[1]
    log_weight = weights.log() - dim * (math.log(sd) + 0.5 * math.log(2 * math.pi))

    def log_prob(z: Tensor) -> Tensor:
        squares = ((z.unsqueeze(-2) - means) / sd).square().sum(-1)
        return torch.logsumexp(log_weight - 0.5 * squares, dim=-1)

    def draw(source: torch.Generator) -> Tensor:
        component = torch.multinomial(weights, NUM_DRAWS, replacement=True, generator=source)
        return means[component] + sd * torch.randn(NUM_DRAWS, dim, generator=source, dtype=torch.float64)

    mean = weights @ means
    variance = sd**2 + weights @ (means - mean).square()
    reference = Reference(
        "analytic",
        indexed("z", dim),
        np.asarray(mean),
        np.asarray(variance.sqrt()),
        exact_draws(name, draw),
        0.0,
        "closed form; independent draws",
    )
    return Problem(name, Density(log_prob, dim=dim, name=name), reference, description)
