"""Pareto-smoothed importance sampling: how far a posterior can be corrected, and the corrected weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError, ShapeError

__all__ = ["FEWEST_DRAWS", "Psis", "draws_needed", "k_hat_threshold", "psis"]

FEWEST_DRAWS = 25
"""Below this many draws the tail holds fewer than five weights and no Pareto distribution can be fitted."""


def k_hat_threshold(num_draws: int) -> float:
    """Largest k-hat at which this many draws still give reliable estimates.

    ``min(1 - 1 / log10(S), 0.7)`` (Vehtari et al. 2024, Pareto smoothed importance sampling, section 3.2.4).

    Args:
        num_draws: Number of draws ``S``, more than one.

    Returns:
        The threshold; 0.7 from 2,155 draws on.

    Raises:
        ConfigError: If there are fewer than two draws.

    Example:
        >>> round(k_hat_threshold(100), 3), k_hat_threshold(4000)
        (0.5, 0.7)
    """
    if num_draws < 2:
        raise ConfigError(f"a k-hat threshold needs two draws or more, got {num_draws}.")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def draws_needed(k_hat: float) -> float:
    """Number of draws from which an estimate with this k-hat is reliable, ``10 ** (1 / (1 - max(0, k)))``.

    Source: Vehtari et al. 2024, section 3.2.4.

    Args:
        k_hat: Tail index of the importance weights.

    Returns:
        A number of draws; infinite for ``k_hat >= 1`` or NaN, where no number suffices.

    Example:
        >>> round(draws_needed(0.5)), draws_needed(1.1)
        (100, inf)
    """
    if not k_hat < 1:
        return math.inf
    power = 1 / (1 - max(0.0, k_hat))
    return 10**power if power < 300 else math.inf


@dataclasses.dataclass(frozen=True)
class Psis:
    """Smoothed importance weights and what they say.

    Attributes:
        log_weight: Smoothed log weights, normalised to ``logsumexp = 0``, ``(draw,)``.
        k_hat: Tail index of the weights. Zero when all weights are equal, or their largest is shared by the whole tail:
            there is no tail to fit. Infinite when fewer than five weights are not negligible.
        k_hat_error: Its asymptotic standard error.
        ess: Effective number of draws, ``1 / sum(weight ** 2)``.
        num_draws: Number of draws.
        non_finite: Number of ratios that were NaN or plus infinity; they get weight zero.
    """

    log_weight: Tensor
    k_hat: float
    k_hat_error: float
    ess: float
    num_draws: int
    non_finite: int

    @property
    def threshold(self) -> float:
        """Largest k-hat at which this many draws give reliable estimates."""
        return k_hat_threshold(self.num_draws)

    @property
    def reliable(self) -> bool:
        """Whether k-hat is at or below its threshold."""
        return self.k_hat <= self.threshold


def psis(log_ratio: Tensor) -> Psis:
    r"""Smooth importance weights.

    The largest :math:`M = \lceil \min(S / 5, 3 \sqrt S) \rceil` weights are replaced by the order statistics of a
    generalised Pareto distribution fitted to them, whose shape is k-hat (Vehtari et al. 2024, through ArviZ). The
    standard error is that of the maximum-likelihood shape, :math:`(1 + k) / \sqrt M`, shrunk as the estimate is.

    Args:
        log_ratio: ``log p(z) - log q(z)`` up to a constant, ``(draw,)``, from draws of ``q``. Minus infinity is a
            weight of zero.

    Returns:
        Weights and k-hat.

    Raises:
        ShapeError: If the ratios are not one axis of at least 25 draws.

    Example:
        >>> uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> 0.4 < psis(-0.6 * uniform.log()).k_hat < 0.8  # a Pareto tail of index 0.6
        True
    """
    if log_ratio.dim() != 1 or log_ratio.shape[0] < FEWEST_DRAWS:
        raise ShapeError(f"PSIS needs log ratios of shape (draw,) with 25 draws or more, got {tuple(log_ratio.shape)}.")
    x = log_ratio.detach().to("cpu", torch.float64).numpy().copy()
    broken = np.isnan(x) | (x == np.inf)
    x[broken] = -np.inf
    size, top = x.size, x.max()
    if top == -np.inf:
        nothing = torch.full((size,), math.nan, dtype=torch.float64)
        return Psis(nothing, math.inf, math.nan, 0.0, size, int(broken.sum()))
    # Weights a rounding apart are equal: their "tail" would be that of the arithmetic.
    tied = x >= top - 1e-10 * max(1.0, abs(float(top)))
    tail = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    if int(tied.sum()) > tail:
        smoothed, k = x - top, 0.0
    else:
        smoothed, k = _smoothed(x)
    weight = np.exp(smoothed - smoothed.max())
    log_weight = np.where(weight > 0, smoothed - smoothed.max(), -np.inf) - np.log(weight.sum())
    error = max(1 + k, 0.5) * math.sqrt(tail) / (tail + 10) if math.isfinite(k) else math.nan
    ess = float(weight.sum() ** 2 / (weight**2).sum())
    return Psis(torch.from_numpy(log_weight), k, error, ess, size, int(broken.sum()))


def _smoothed(x: np.ndarray) -> tuple[np.ndarray, float]:
    import arviz

    with np.errstate(all="ignore"):  # extreme weights overflow inside the fit, which then reports infinity
        smoothed, k = arviz.psislw(x, normalize=False)
    return np.asarray(smoothed, dtype=np.float64), float(k)
