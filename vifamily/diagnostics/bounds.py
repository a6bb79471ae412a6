"""Bounds on the log evidence from draws of a family, each with its Monte-Carlo standard error."""

from __future__ import annotations

import dataclasses
import math
import warnings

import torch
from torch import Tensor

from vifamily.errors import ConfigError, ShapeError, VifamilyWarning
from vifamily.numerics.log_mean_exp import log_mean_exp
from vifamily.numerics.psis import FEWEST_DRAWS, psis

__all__ = ["Estimate", "cubo", "divergence_bound", "elbo", "iwae", "log_evidence", "wasserstein_bounds"]

_LARGEST_K = 0.7
"""k-hat above which moments of order two of the weights are out of reach of any number of draws in practice."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its Monte-Carlo standard error.

    Attributes:
        value: The estimate.
        error: Its standard error, NaN where it cannot be told.
    """

    value: float
    error: float

    def __str__(self) -> str:
        """Return for example ``-3.21 +- 0.02``."""
        return f"{self.value:.4g} ± {self.error:.2g}"


def _checked(log_ratio: Tensor) -> Tensor:
    if log_ratio.dim() != 1 or log_ratio.shape[0] < 2:
        raise ShapeError(
            f"a bound needs log ratios of shape (draw,) with two draws or more, got {tuple(log_ratio.shape)}."
        )
    return log_ratio.detach().to("cpu", torch.float64)


def elbo(log_ratio: Tensor) -> Estimate:
    """Evidence lower bound: the mean of ``log p(z, y) - log q(z)`` over draws of ``q``.

    Args:
        log_ratio: ``log p(z, y) - log q(z)`` in nats, ``(draw,)``.

    Returns:
        The bound and its standard error, in nats.

    Raises:
        ShapeError: If there are fewer than two draws, or more than one axis.

    Example:
        >>> print(elbo(torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)))
        -2 ± 0.58
    """
    x = _checked(log_ratio)
    return Estimate(float(x.mean()), float(x.std()) / math.sqrt(x.shape[0]))


def log_evidence(log_ratio: Tensor) -> Estimate:
    """Importance-sampling estimate of the log evidence, ``log mean exp(log p(z, y) - log q(z))``.

    The error is by the delta method, ``sd(w) / (mean(w) sqrt(S))``; it means nothing where k-hat is above its
    threshold.

    Args:
        log_ratio: In nats, ``(draw,)``.

    Returns:
        The estimate and its standard error, in nats.

    Raises:
        ShapeError: If there are fewer than two draws, or more than one axis.

    Example:
        >>> log_evidence(torch.full((10,), 3.0)).value
        3.0
    """
    x = _checked(log_ratio)
    weight = (x - x.max()).exp()
    return Estimate(float(log_mean_exp(x)), float(weight.std() / weight.mean()) / math.sqrt(x.shape[0]))


def iwae(log_ratio: Tensor, importance_draws: int) -> Estimate:
    """Importance-weighted bound of K draws, ``E log mean_K exp(log p - log q)`` (Burda et al. 2016, equation 8).

    Args:
        log_ratio: In nats, ``(draw,)``; cut into groups of K, what is left over is not used.
        importance_draws: ``K``, at least 1; at least two groups must fit.

    Returns:
        The bound and its standard error, in nats.

    Raises:
        ConfigError: If fewer than two groups fit.

    Example:
        >>> x = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> elbo(x).value < iwae(x, 10).value < log_evidence(x).value + 1e-9
        True
    """
    x = _checked(log_ratio)
    groups = x.shape[0] // importance_draws if importance_draws >= 1 else 0
    if groups < 2:
        raise ConfigError(f"{x.shape[0]} draws do not hold two groups of {importance_draws}: give more draws.")
    return elbo(log_mean_exp(x[: groups * importance_draws].reshape(groups, importance_draws), -1))


def cubo(log_ratio: Tensor, order: float = 2.0) -> Estimate:
    """Chi upper bound, ``log mean exp(n (log p - log q)) / n`` (Dieng et al. 2017, equation 5).

    From finitely many draws the estimate lies below the bound on average, the more so the heavier the tail.

    Args:
        log_ratio: In nats, ``(draw,)``.
        order: ``n``, above 1.

    Returns:
        The bound and its standard error by the delta method, in nats.

    Raises:
        ConfigError: If ``order`` is not above 1.

    Example:
        >>> x = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> cubo(x).value > log_evidence(x).value
        True
    """
    if not order > 1:
        raise ConfigError(f"order of the chi bound must be above 1, got {order}.")
    power = log_evidence(order * _checked(log_ratio))
    return Estimate(power.value / order, power.error / order)


def divergence_bound(log_ratio: Tensor) -> Estimate:
    r"""Upper bound on the Rényi divergence of order two between posterior and approximation.

    :math:`D_2(p \| q) = 2 (\mathrm{CUBO}_2 - \log p(y)) \le 2 (\mathrm{CUBO}_2 - \mathrm{ELBO})`.
    Huggins et al. 2020, Validated variational inference via practical posterior error bounds, section 4.

    Args:
        log_ratio: In nats, ``(draw,)``.

    Returns:
        The bound in nats; errors of the two parts are added, for both come from the same draws.

    Example:
        >>> divergence_bound(torch.zeros(10)).value
        0.0
    """
    upper, lower = cubo(log_ratio), elbo(log_ratio)
    return Estimate(2 * (upper.value - lower.value), 2 * (upper.error + lower.error))


def wasserstein_bounds(z: Tensor, log_ratio: Tensor) -> dict[str, float]:
    r"""Bounds on how wrong the moments of an approximation are, from its draws alone.

    :math:`W_p \le 2\, C_{2p}^{1/2p} (e^{D_2} - 1)^{1/2p}` with :math:`C_{2p}` the centred moment
    :math:`E\|z - \bar z\|^{2p}` of the approximation; the error of each mean is at most ``W_1``, of each standard
    deviation at most ``W_2``, of each covariance ``2 (sd W_2 + W_2^2)`` (Huggins et al. 2020, theorem 3.4 and
    proposition 3.1). Loose in many dimensions. The estimate of :math:`D_2` is too low where the weights have heavy
    tails, so the numbers bound nothing where k-hat is above 0.7, nor where q misses a mode.

    Args:
        z: Draws of the approximation, ``(draw, dim)``.
        log_ratio: ``log p - log q`` of these draws, ``(draw,)``.

    Returns:
        ``d2``, ``w1``, ``w2``, ``mean_error``, ``sd_error``, ``covariance_error``, in the units of ``z`` (squared for
        the last), and ``k_hat`` (NaN of fewer than 25 draws).

    Raises:
        ShapeError: If the two do not have the same draws.

    Warns:
        VifamilyWarning: If k-hat is above 0.7, so that these are no bounds.

    Example:
        >>> z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> wasserstein_bounds(z, torch.zeros(50))["w2"]
        0.0
    """
    if z.dim() != 2 or log_ratio.shape != z.shape[:1]:
        raise ShapeError(
            f"bounds need draws (draw, dim) and ratios (draw,), got {tuple(z.shape)} and {tuple(log_ratio.shape)}."
        )
    d2 = max(divergence_bound(log_ratio).value, 0.0)
    k = psis(log_ratio).k_hat if len(log_ratio) >= FEWEST_DRAWS else math.nan
    if k > _LARGEST_K:
        warnings.warn(
            f"k-hat {k:.2f} is above {_LARGEST_K}: the divergence of order two cannot be estimated from these draws, "
            "so what follows from it bounds nothing. Use a richer family.",
            VifamilyWarning,
            stacklevel=2,
        )
    z = z.detach().to("cpu", torch.float64)
    square = ((z - z.mean(0)) ** 2).sum(-1)
    excess = math.expm1(d2) if d2 < 700 else math.inf
    w1 = 2 * math.sqrt(float(square.mean()) * excess)
    w2 = 2 * (float((square**2).mean()) * excess) ** 0.25
    sd = float(z.std(0).max())
    return {
        "d2": d2, "w1": w1, "w2": w2, "mean_error": w1, "sd_error": w2, "covariance_error": 2 * (sd * w2 + w2**2),
        "k_hat": k,
    }  # fmt: skip
