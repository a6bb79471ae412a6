"""Distances between two samples: sliced Wasserstein, maximum mean discrepancy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics.bounds import Estimate
from vifamily.errors import ConfigError
from vifamily.numerics.kernels import checked_pair, median_bandwidth

__all__ = ["median_bandwidth", "mmd", "sliced_wasserstein", "wasserstein_1d"]

_CHUNK = 1024


def wasserstein_1d(x: Tensor, y: Tensor, *, order: float = 2.0) -> Tensor:
    r"""Wasserstein distance of each column, exact for samples of any two sizes.

    :math:`W_p^p = \int_0^1 |F^{-1}(u) - G^{-1}(u)|^p du`, a finite sum over the steps of both quantile functions.

    Args:
        x: ``(draw, column)``.
        y: ``(other draw, column)``.
        order: ``p``, at least 1.

    Returns:
        ``(column,)``.

    Example:
        >>> wasserstein_1d(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]), order=1)
        tensor([2.5000])
    """
    m, n = x.shape[0], y.shape[0]
    x, y = x.sort(dim=0).values, y.sort(dim=0).values
    # Knots of both step functions in units of 1 / (m n), so that equal knots are equal integers.
    knots = torch.unique(torch.cat([torch.arange(m + 1) * n, torch.arange(n + 1) * m]))
    left, width = knots[:-1], knots.diff().to(x.dtype) / (m * n)
    gap = (x[left // n] - y[left // m]).abs() ** order
    power: Tensor = width @ gap
    return power.pow(1 / order)


def sliced_wasserstein(
    x: Any, y: Any, *, generator: torch.Generator, num_projections: int = 256, order: float = 2.0
) -> Estimate:
    r"""Sliced Wasserstein distance between two samples.

    :math:`\big(E_\omega W_p^p(\omega^\top x, \omega^\top y)\big)^{1/p}` over directions uniform on the sphere (Bonneel
    et al. 2015). Scale the quantities first (for example by the reference standard deviations): directions weigh all
    units alike. Two finite samples of one distribution are a little apart: compare with the distance of two halves.

    Args:
        x: ``(draw, quantity)``, array or tensor.
        y: ``(other draw, quantity)``.
        generator: Randomness of the directions; not used for one quantity.
        num_projections: Number of directions.
        order: ``p``, at least 1.

    Returns:
        The distance, in the units of the quantities; the error is that of the finite number of directions alone.

    Raises:
        ShapeError: If a sample is not a matrix, is empty, or their columns differ.
        DataError: If a value is not finite.
        ConfigError: If ``num_projections`` or ``order`` is below 1.

    Example:
        >>> x = torch.zeros(5, 1)
        >>> sliced_wasserstein(x, x + 2, generator=torch.Generator()).value
        2.0
    """
    a, b = checked_pair(x, y)
    if num_projections < 1 or order < 1:
        raise ConfigError(f"num_projections and order must be at least 1, got {num_projections} and {order}.")
    if a.shape[1] == 1:
        return Estimate(float(wasserstein_1d(a, b, order=order)), 0.0)
    direction = torch.randn(a.shape[1], num_projections, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=0)
    power = torch.cat([wasserstein_1d(a @ d, b @ d, order=order) for d in direction.split(64, dim=1)]) ** order
    mean = float(power.mean())
    error = float(power.std()) / math.sqrt(num_projections) if num_projections > 1 else math.nan
    value = mean ** (1 / order)
    return Estimate(value, error * value / (order * mean) if mean > 0 else 0.0)


def mmd(x: Any, y: Any, *, bandwidth: float | None = None) -> Estimate:
    r"""Squared maximum mean discrepancy with a Gaussian kernel, unbiased.

    :math:`\mathrm{MMD}^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)` over distinct pairs,
    :math:`k = \exp(-\|x - y\|^2 / 2 h^2)` (Gretton et al. 2012, equation 3). Unbiased, so it can be negative where the
    samples agree.

    Args:
        x: ``(draw, quantity)``, at least two draws.
        y: ``(other draw, quantity)``, at least two draws.
        bandwidth: ``h`` in the units of the quantities; by default the median heuristic.

    Returns:
        The squared discrepancy, without unit, and its standard error from the first two terms of the variance of a
        U-statistic.

    Raises:
        ShapeError: If a sample is not a matrix, has fewer than two draws, or their columns differ.
        DataError: If a value is not finite.
        ConfigError: If the bandwidth is not positive.

    Example:
        >>> x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
        >>> mmd(x, x + 3).value > 0.5
        True
    """
    a, b = checked_pair(x, y, fewest=2)
    width = median_bandwidth(a, b) if bandwidth is None else float(bandwidth)
    if not 0 < width < math.inf:
        raise ConfigError(f"the bandwidth must be positive and finite, got {bandwidth}.")
    m, n = a.shape[0], b.shape[0]
    (xx, xx2), (yy, yy2), (xy, xy2), (yx, _) = (_row_sums(p, q, width) for p, q in ((a, a), (b, b), (a, b), (b, a)))
    # means over the other points; the pairs of a point with itself are left out
    xx, yy, xy, yx = (xx - 1) / (m - 1), (yy - 1) / (n - 1), xy / n, yx / m
    value = float(xx.mean() + yy.mean() - 2 * xy.mean())
    # Variance of a U-statistic: that of its projections on single points, and that of the rest, which is all there is
    # where the samples agree. The projections are means themselves, whose own noise is taken off.
    rest_x = _rest(float(xx2.sum() - m) / (m * (m - 1)), xx, xx)
    rest_y = _rest(float(yy2.sum() - n) / (n * (n - 1)), yy, yy)
    rest_xy = _rest(float(xy2.sum()) / (m * n), xy, yx)
    first_x = float((xx - xy).var()) - rest_x / (m - 1) - rest_xy / n
    first_y = float((yy - yx).var()) - rest_y / (n - 1) - rest_xy / m
    second = 2 * rest_x / (m * (m - 1)) + 2 * rest_y / (n * (n - 1)) + 4 * rest_xy / (m * n)
    return Estimate(value, math.sqrt(4 * max(first_x, 0.0) / m + 4 * max(first_y, 0.0) / n + second))


def _rest(mean_square: float, rows: Tensor, columns: Tensor) -> float:
    """Variance of a kernel after its row and column means are taken off."""
    level = float(rows.mean())
    return max(mean_square - float((rows**2).mean()) - float((columns**2).mean()) + level**2, 0.0)


def _row_sums(x: Tensor, y: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Sums over ``y`` of the kernel and of its square, ``(draw of x,)`` each; in chunks, to bound memory."""
    sums, squares = [], []
    for chunk in x.split(_CHUNK):
        kernel = torch.exp(-(torch.cdist(chunk, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * width**2))
        sums.append(kernel.sum(1))
        squares.append((kernel**2).sum(1))
    return torch.cat(sums), torch.cat(squares)
