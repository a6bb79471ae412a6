"""The tolerances of the contract kit, in one table."""

from __future__ import annotations

import torch

__all__ = [
    "DENSITY_AT_DRAWS",
    "EXACT",
    "FINITE_DIFFERENCE",
    "INTEGRAL",
    "LOOP",
    "MOMENTS",
    "STANDARD_ERRORS",
    "loop",
]

EXACT = 1e-10
"""Identities that hold in exact arithmetic, in float64, relative to the size of what is compared."""
FINITE_DIFFERENCE = 1e-6
"""Gradients against central differences, relative to the largest component."""
DENSITY_AT_DRAWS = 2e-5
"""Log density of draws against the density at their points: flows invert themselves numerically."""
INTEGRAL = 2e-3
"""Total mass of a density by a rule on a grid."""
STANDARD_ERRORS = 5.0
"""Monte-Carlo comparisons; a correct entry then fails about once in two million comparisons."""
MOMENTS = 0.02
"""Fitted means in standard deviations, and log standard deviations."""
LOOP = {torch.float64: EXACT, torch.float32: 1e-6}
"""Several families run as one against one after the other, relative, by dtype."""


def loop(dtype: torch.dtype) -> float:
    """Return the tolerance between a loop and its vectorised form.

    Args:
        dtype: Floating dtype of the computation.

    Returns:
        A relative tolerance.

    Example:
        >>> loop(torch.float64)
        1e-10
    """
    return LOOP.get(dtype, 1e-6)
