"""How well draws can be told from a reference: the arc length of the optimal ROC curve."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vifamily.diagnostics.bounds import Estimate
from vifamily.errors import ConfigError, ShapeError
from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE
from vifamily.numerics.cross_fit import FittedAngle, cross_fit
from vifamily.numerics.kernel_angle import kernel_angle
from vifamily.numerics.kernels import checked_pair

__all__ = ["arc_length"]

_MOST_FITTED = 20_000


def arc_length(draws: Any, reference: Any, *, generator: torch.Generator, folds: int = 5) -> Estimate:
    r"""Arc length of the optimal ROC curve that tells draws from a reference, cross-fitted with a kernel.

    .. math:: L = \int \sqrt{p^2 + q^2} = \max_u \mathbb{E}_p[\sin u] + \mathbb{E}_q[\cos u],
              \qquad \sqrt2 \le L \le 2,

    ``sqrt(2)`` where the two distributions are equal and 2 where no draw of one could come from the other. Unlike the
    accuracy of a classifier it has no flat spots, it does not go by the sizes of the samples, and
    :math:`\sqrt{L - \sqrt2}` is a metric. An f-divergence by Liu (2022), "Estimating the arc length of the optimal ROC
    curve and lower bounding the maximal AUC"; the estimate is derived here. See :func:`vifamily.roc.arc_length` for
    intervals, other models and bounds on the area.

    Args:
        draws: ``(draw, quantity)``, independent.
        reference: ``(other draw, quantity)``, independent.
        generator: Randomness of folds and kernel centres.
        folds: Number of folds, at least 2.

    Returns:
        The length, noise of the fits made up for (it may fall a little below ``sqrt(2)``), and its standard error.

    Raises:
        ShapeError: If a sample is not a matrix, has fewer than two draws for each fold, or their columns differ.
        DataError: If a value is not finite.
        ConfigError: If folds is no integer of at least 2.

    Example:
        >>> x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
        >>> arc_length(x + 9, x, generator=torch.Generator().manual_seed(1)).value > 1.95
        True
    """
    if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)) or folds < 2:
        raise ConfigError(f"folds must be an integer of at least 2, got {folds!r}.")
    pair = checked_pair(draws, reference)
    if min(len(x) for x in pair) < 2 * folds:
        sizes = " and ".join(str(len(x)) for x in pair)
        raise ShapeError(f"{2 * folds} draws of each sample are needed for {folds} folds, got {sizes}.")
    source = np.random.default_rng(int(torch.randint(2**62, (), generator=generator, device=generator.device)))

    def fit(a: Any, b: Any) -> Any:
        # more points would not be felt: the error of the length is quadratic in that of the angle
        angle = kernel_angle(a[:_MOST_FITTED], b[:_MOST_FITTED], source)
        return FittedAngle(lambda x: np.clip(angle(x), 0.0, RIGHT_ANGLE), angle.shortfall)

    a, b = (x.numpy()[source.permutation(len(x))] for x in pair)
    return Estimate(*cross_fit(a, b, fit, folds, source).length())
