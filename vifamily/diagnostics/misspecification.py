"""Whether observed data look like anything that the simulator makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics.classifier_tests import NullTest
from vifamily.errors import ConfigError, ShapeError
from vifamily.numerics.kernels import checked_pair, median_bandwidth

__all__ = ["misspecification_mmd"]


def misspecification_mmd(
    observed: Any, simulated: Any, *, generator: torch.Generator, embedding: Callable[[Tensor], Tensor] | None = None,
    num_null: int = 500,
) -> NullTest:  # fmt: skip
    r"""Test whether data sets are like prior-predictive ones (Schmitt et al. 2023).

    An amortised posterior is trained where the prior predictive has mass and can be arbitrarily wrong elsewhere. The
    statistic is the squared maximum mean discrepancy, Gaussian kernel, between the m observed data sets and half of
    the simulated ones; the null values are those of m sets taken at random from the other half. Small p-values say that
    no parameter of the prior makes data like these, and that the posterior at them should not be trusted; large ones
    do not say that the model is right.

    Args:
        observed: One data set ``(feature,)`` or several ``(set, feature)``, or summaries of them.
        simulated: Data of simulations from the prior, ``(simulation, feature)``.
        generator: Randomness of the halves and of the null values.
        embedding: From data to the features to be compared, such as a trained encoder; None compares the data. The
            features are scaled by the standard deviations of the simulated ones.
        num_null: Number of null values.

    Returns:
        Statistic, null values and p-value.

    Raises:
        ShapeError: If shapes disagree or there are too few simulations.
        DataError: If a value is not finite.
        ConfigError: If ``num_null`` is below 1.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(400, 2, generator=g)
        >>> misspecification_mmd(torch.tensor([8.0, 8.0]), x, generator=g).p_value < 0.01
        True
    """
    if isinstance(num_null, bool) or not isinstance(num_null, int) or num_null < 1:
        raise ConfigError(f"num_null must be an integer of 1 or more, got {num_null!r}.")
    at, made = torch.as_tensor(observed), torch.as_tensor(simulated)
    at = at[None] if at.dim() == made.dim() - 1 else at
    if embedding is not None:
        with torch.no_grad():
            at, made = embedding(at), embedding(made)
    a, b = checked_pair(at, made)
    size = len(a)
    half = len(b) // 2
    if half < max(10, 2 * size):
        raise ShapeError(
            f"{size} observed data sets need {max(20, 4 * size)} simulations or more to be compared with, got {len(b)}."
        )
    b = b[torch.randperm(len(b), generator=generator)]
    sd = b.std(0)
    a, b = a / torch.where(sd > 0, sd, torch.ones_like(sd)), b / torch.where(sd > 0, sd, torch.ones_like(sd))
    reference, other = b[:half], b[half:]
    width = median_bandwidth(reference, reference)
    within = _kernel(other, other, width)
    across = _kernel(other, reference, width).mean(1)
    null = torch.empty(num_null, dtype=torch.float64)
    for index in range(num_null):
        chosen = torch.randperm(len(other), generator=generator)[:size]
        null[index] = within[chosen][:, chosen].mean() - 2 * across[chosen].mean()
    seen = float(_kernel(a, a, width).mean() - 2 * _kernel(a, reference, width).mean())
    level = float(_kernel(reference, reference, width).mean())
    return NullTest.of(seen + level, null + level)


def _kernel(x: Tensor, y: Tensor, width: float) -> Tensor:
    return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * width**2))
