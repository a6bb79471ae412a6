"""Whether numbers that ought to be uniform are: ranks by their ECDF and by bins, probabilities by their symmetry."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from vifamily.errors import ConfigError, ShapeError

__all__ = ["EcdfBand", "Symmetry", "bin_test", "ecdf_band", "ecdf_test", "symmetry_test"]

Array = NDArray[np.float64]

_MOST_POINTS = 100
_SIMULATED = 4000
_LEAST_EXPECTED = 5


@dataclasses.dataclass(frozen=True)
class EcdfBand:
    """A band that holds the whole ECDF of uniform ranks with a given probability.

    Attributes:
        points: Where the ECDF is looked at, fractions of the range, ``(point,)``.
        lower: Lower end of the band there.
        upper: Upper end.
        coverage: Probability that a uniform sample stays inside at all points.
    """

    points: Array
    lower: Array
    upper: Array
    coverage: float


@dataclasses.dataclass(frozen=True)
class Symmetry:
    """A test of symmetry about one half.

    Attributes:
        statistic: Kolmogorov-Smirnov distance between the numbers and one minus them.
        p_value: Probability of one as large where the law is symmetric.
    """

    statistic: float
    p_value: float


def ecdf_band(num_ranks: int, num_draws: int, *, coverage: float = 0.95, seed: int = 0) -> EcdfBand:
    """Return the simultaneous band of the ECDF of uniform ranks (Säilynoja, Bürkner and Vehtari 2022).

    At each point the count of ranks below is binomial; the band is made of quantiles of these at one common level, so
    chosen that a uniform sample stays inside everywhere with probability ``coverage``. The level is found by simulating
    uniform ranks.

    Args:
        num_ranks: Number of ranks.
        num_draws: Draws among which each was ranked; ranks go from 0 to this.
        coverage: Probability of the whole band.
        seed: Seed of the simulation.

    Returns:
        The band, at no more than a hundred points.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> band = ecdf_band(200, 99)
        >>> bool(((band.lower <= band.points) & (band.points <= band.upper)).all())
        True
    """
    if not 0 < coverage < 1:
        raise ConfigError(f"coverage must lie between 0 and 1, got {coverage!r}.")
    share = _shares(num_ranks, num_draws)
    level = float(np.quantile(_simulated_levels(num_ranks, num_draws, seed), 1 - coverage))
    lower = stats.binom.ppf(level / 2, num_ranks, share) / num_ranks
    upper = stats.binom.ppf(1 - level / 2, num_ranks, share) / num_ranks
    return EcdfBand(share, lower, upper, coverage)


def ecdf_test(ranks: ArrayLike, num_draws: int, *, seed: int = 0) -> float:
    """Return the p-value of uniformity by the ECDF: how rare so extreme a count is at the point where it is rarest.

    Args:
        ranks: Whole numbers from 0 to ``num_draws``, ``(simulation,)``.
        num_draws: Draws among which each was ranked.
        seed: Seed of the simulated null law.

    Returns:
        A p-value; below ``1 - coverage`` exactly where the ECDF leaves :func:`ecdf_band`, up to Monte-Carlo error.

    Raises:
        ShapeError: If the ranks are no vector, or lie outside their range.

    Example:
        >>> ecdf_test(np.arange(100), 99) > 0.9, ecdf_test(np.full(50, 3), 99) < 0.001
        (True, True)
    """
    values = _checked(ranks, num_draws)
    cuts = _cuts(len(values), num_draws)
    counts = (values[:, None] < cuts).sum(0)
    found = _levels(counts[None], len(values), num_draws)[0]
    null = _simulated_levels(len(values), num_draws, seed)
    return float((1 + (null <= found * (1 + 1e-9)).sum()) / (1 + len(null)))


def bin_test(ranks: ArrayLike, num_draws: int) -> float:
    """Return the p-value of the chi-square test of uniformity, on at most twenty bins of five expected or more.

    Args:
        ranks: Whole numbers from 0 to ``num_draws``, ``(simulation,)``.
        num_draws: Draws among which each was ranked.

    Returns:
        A p-value.

    Raises:
        ShapeError: If the ranks are no vector, or lie outside their range.

    Example:
        >>> bin_test(np.arange(100), 99)
        1.0
    """
    values = _checked(ranks, num_draws)
    bins = max(2, min(20, len(values) // _LEAST_EXPECTED, num_draws + 1))
    edges = np.round(np.linspace(0, num_draws + 1, bins + 1))
    counts, _ = np.histogram(values, bins=edges - 0.5)
    expected = len(values) * np.diff(edges) / (num_draws + 1)
    return float(stats.chisquare(counts, expected).pvalue)


def symmetry_test(probabilities: ArrayLike, *, seed: int = 0) -> Symmetry:
    """Test whether probabilities are distributed symmetrically about one half.

    The statistic is the Kolmogorov-Smirnov distance between ``p`` and ``1 - p``. As the two are the same numbers, its
    null law is not that of two samples; it is found by reflecting each number at random, which is exact.

    Args:
        probabilities: ``(simulation,)``, in [0, 1].
        seed: Seed of the reflections.

    Returns:
        The distance and its p-value.

    Raises:
        ShapeError: If they are no vector, or lie outside [0, 1].

    Example:
        >>> symmetry_test(np.linspace(0, 1, 50)).p_value > 0.9, symmetry_test(np.linspace(0, 0.6, 50)).p_value < 0.001
        (True, True)
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 1 or not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise ShapeError(f"symmetry is tested on a vector of numbers in [0, 1], got shape {p.shape}.")
    away = np.abs(p - 0.5)
    order = np.argsort(-away, kind="stable")
    away, side = away[order], np.sign(p - 0.5)[order]
    # the two distribution functions differ at 1/2 - u by the sum of the sides further out than u; ties go together
    last = np.append(np.abs(np.diff(away)) > 1e-12, True)
    found = np.abs(np.cumsum(side))[last].max()
    flips = 2 * np.random.default_rng(seed).integers(0, 2, size=(_SIMULATED, len(p)), dtype=np.int8) - 1
    null = np.abs(np.cumsum(flips * side, axis=1))[:, last].max(1)
    return Symmetry(float(found / len(p)), float((1 + (null >= found - 1e-9).sum()) / (1 + _SIMULATED)))


def _checked(ranks: ArrayLike, num_draws: int) -> NDArray[np.int64]:
    values = np.asarray(ranks)
    inside = values.ndim == 1 and len(values) > 0 and values.min() >= 0 and values.max() <= num_draws
    if not inside or not np.issubdtype(values.dtype, np.integer):
        raise ShapeError(f"ranks must be a vector of whole numbers from 0 to {num_draws}, got shape {values.shape}.")
    return values.astype(np.int64)


def _cuts(num_ranks: int, num_draws: int) -> NDArray[np.int64]:
    """Ranks below which is counted: no more of them than ranks, draws or a hundred."""
    if num_ranks < 1 or num_draws < 1:
        raise ConfigError(f"a band needs ranks and draws, got {num_ranks} and {num_draws}.")
    count = min(num_ranks, num_draws, _MOST_POINTS)
    return np.unique(np.round(np.linspace(1, num_draws, count)).astype(np.int64))


def _shares(num_ranks: int, num_draws: int) -> Array:
    """Probability of a rank below each cut."""
    return np.asarray(_cuts(num_ranks, num_draws) / (num_draws + 1), dtype=np.float64)


def _levels(counts: NDArray[np.int64], num_ranks: int, num_draws: int) -> Array:
    """Smallest two-sided tail probability over the points, for each row of counts ``(sample, point)``."""
    tail = _tails(num_ranks, num_draws)
    return np.asarray(tail[counts, np.arange(tail.shape[1])].min(1), dtype=np.float64)


@functools.lru_cache(maxsize=8)
def _tails(num_ranks: int, num_draws: int) -> Array:
    """Two-sided tail probability of each count at each point, ``(count, point)``."""
    share = _shares(num_ranks, num_draws)
    below = stats.binom.cdf(np.arange(num_ranks + 1)[:, None], num_ranks, share)
    above = stats.binom.sf(np.arange(num_ranks + 1)[:, None] - 1, num_ranks, share)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(below, above)), dtype=np.float64)


@functools.lru_cache(maxsize=8)  # every quantity of a calibration asks for the same
def _simulated_levels(num_ranks: int, num_draws: int, seed: int) -> Array:
    share = _shares(num_ranks, num_draws)
    between = np.diff(np.concatenate([[0.0], share, [1.0]]))
    drawn = np.random.default_rng(seed).multinomial(num_ranks, between, size=_SIMULATED)
    return _levels(np.cumsum(drawn, axis=1)[:, :-1], num_ranks, num_draws)
