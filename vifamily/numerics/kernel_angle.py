r"""The arctangent likelihood ratio of two samples, fitted with a Gaussian kernel.

.. math:: \max_u \; \sum_i w_i\, S(u(x_i)) + \sum_j v_j\, C(u(x'_j)) - \lambda \|u\|^2

with u a kernel expansion plus a constant, weights that sum to one within each class, and S, C the concave extensions of
sine and cosine (:mod:`vifamily.numerics.arctangent_ratio`): a concave problem without constraints, solved in
:mod:`vifamily.numerics.penalised_angle`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist

from vifamily.numerics.penalised_angle import ClassFeatures, LinearAngle, best_penalty, fit_linear_angle

__all__ = [
    "KernelAngle",
    "KernelFeatures",
    "RobustScale",
    "balanced_size",
    "class_mean_weights",
    "kernel_angle",
    "kernel_features",
    "robust_scale",
]

Array = NDArray[np.float64]
_ROWS = 8192
_CHOSEN_ON = 5000


@dataclasses.dataclass(frozen=True)
class RobustScale:
    """The arctangent of each feature in units of its spread about its median.

    Strictly monotone in each feature, so that the arc length is that of the features themselves, while heavy tails are
    brought within the reach of one bandwidth.

    Attributes:
        location: ``(feature,)``.
        scale: ``(feature,)``, positive.
    """

    location: Array
    scale: Array

    def __call__(self, x: Array) -> Array:
        """Return the scaled points, ``(sample, feature)``."""
        out: Array = np.arctan((x - self.location) / self.scale)
        return out


def _quantiles(x: Array, levels: tuple[float, ...], weight: Array | None) -> Array:
    if weight is None:
        plain: Array = np.quantile(x, levels, axis=0, method="inverted_cdf")
        return plain
    order = np.argsort(x, axis=0, kind="stable")
    mass = np.cumsum(weight[order], axis=0)
    # a hair below each level, so that rounding of the sums never skips a point
    rows = [(mass < (level - 1e-12) * mass[-1]).sum(0) for level in levels]
    return np.stack([np.take_along_axis(x, order, 0)[row, np.arange(x.shape[1])] for row in rows])


def robust_scale(x: Array, weight: Array | None = None) -> RobustScale:
    """Median and twice the interquartile range of each feature; where that is zero the standard deviation, then 1.

    Twice, since a scale that is too small hides what differs in the tails: with once, two normals in five dimensions
    whose scales are 1 and 1.5 come out twice as far below their arc length.

    Args:
        x: ``(sample, feature)``.
        weight: ``(sample,)``, repetitions of each point; None for one each.

    Example:
        >>> robust_scale(np.arange(5.0)[:, None]).scale
        array([4.])
    """
    low, middle, high = _quantiles(x, (0.25, 0.5, 0.75), weight)
    off = np.abs(x - np.average(x, 0, weight))
    # in units of the largest, whose square does not overflow
    unit = np.where((largest := off.max(0)) > 0, largest, 1.0)
    spread, deviation = 2 * (high - low), unit * np.sqrt(np.average((off / unit) ** 2, 0, weight))
    return RobustScale(middle, np.where(spread > 0, spread, np.where(deviation > 0, deviation, 1.0)))


@dataclasses.dataclass(frozen=True)
class KernelFeatures:
    """Features whose plain norm is the norm of the kernel's space, on the span of some centres.

    Attributes:
        scaling: Map of the points, or None.
        centers: ``(center, feature)``, scaled.
        bandwidth: Bandwidth of the kernel, in scaled units.
        whitening: ``(center, kept)``.
    """

    scaling: RobustScale | None
    centers: Array
    bandwidth: float
    whitening: Array

    def __call__(self, x: Array) -> Array:
        """Return the features of points, ``(sample, kept)``."""
        return self.expand(x, self.whitening)

    def expand(self, x: Array, coefficients: Array) -> Array:
        """Kernels of points and centres times coefficients ``(center, ...)``; in blocks of rows, to bound memory."""
        blocks = [x[i : i + _ROWS] for i in range(0, max(len(x), 1), _ROWS)]
        scaled = (block if self.scaling is None else self.scaling(block) for block in blocks)
        return np.concatenate([_kernel(z, self.centers, self.bandwidth) @ coefficients for z in scaled])


def kernel_features(
    x: Array, source: np.random.Generator, *, weight: Array | None = None, num_centers: int = 100,
    bandwidth: float = 1.0, robust: bool = True,
) -> KernelFeatures:  # fmt: skip
    """Choose centres, a bandwidth and a scaling from points of both classes.

    Args:
        x: ``(sample, feature)``.
        source: Randomness of the choice of centres.
        weight: ``(sample,)``, repetitions of each point, positive; None for one each.
        num_centers: Largest number of centres, drawn from the distinct points.
        bandwidth: Bandwidth in multiples of the median distance between centres.
        robust: Whether features are scaled by :func:`robust_scale`.

    Example:
        >>> x = np.linspace(0, 1, 5)[:, None]
        >>> phi = kernel_features(x, np.random.default_rng(0), num_centers=5)(x)
        >>> bool(np.allclose((phi**2).sum(1), 1))  # the kernel of a point with itself
        True
    """
    scaling = robust_scale(x, weight) if robust else None
    centers = _centers(x if scaling is None else scaling(x), num_centers, source)
    apart = pdist(centers)
    apart = apart[apart > 0]
    width = bandwidth * float(np.median(apart)) if apart.size else 1.0
    level, vectors = np.linalg.eigh(_kernel(centers, centers, width))
    keep = level > 1e-10 * level[-1]
    return KernelFeatures(scaling, centers, width, vectors[:, keep] / np.sqrt(level[keep]))


@dataclasses.dataclass(frozen=True)
class KernelAngle:
    """A fitted angle; a callable from points to u, not yet clipped to ``[0, pi/2]``.

    Attributes:
        features: Centres, bandwidth and scaling.
        coefficients: ``(center,)``.
        intercept: Constant.
        alpha: Penalty.
        steps: Newton steps.
        shortfall: Estimate of how far noise of the fit brings the length of fresh points below the arc length; see
            :mod:`vifamily.numerics.penalised_angle`.
    """

    features: KernelFeatures
    coefficients: Array
    intercept: float
    alpha: float
    steps: int
    shortfall: float = 0.0

    def __call__(self, x: Array) -> Array:
        """Return u at points ``(sample, feature)``, ``(sample,)``."""
        return self.features.expand(x, self.coefficients) + self.intercept


def _kernel(z: Array, centers: Array, bandwidth: float) -> Array:
    out: Array = np.exp(-0.5 / bandwidth**2 * cdist(z, centers, "sqeuclidean"))
    return out


def class_mean_weights(weight: Array | None, size: int) -> Array:
    """Weights of a class mean, ``(size,)``, that sum to one."""
    if weight is None:
        return np.full(size, 1 / size)
    out: Array = weight / weight.sum()
    return out


def balanced_size(positives: float, negatives: float) -> float:
    """Harmonic mean of the class sizes: what the accuracy of two class means goes by.

    Example:
        >>> balanced_size(100, 100)
        100.0
    """
    return 2 / (1 / positives + 1 / negatives)


def kernel_angle(
    x_pos: Array,
    x_neg: Array,
    source: np.random.Generator,
    *,
    weight_pos: Array | None = None,
    weight_neg: Array | None = None,
    num_centers: int = 100,
    bandwidth: float = 1.0,
    alpha: float | None = None,
    robust: bool = True,
) -> KernelAngle:
    """Fit the angle.

    Args:
        x_pos: ``(positive, feature)``.
        x_neg: ``(negative, feature)``.
        source: Randomness of the choice of centres.
        weight_pos: ``(positive,)``, repetitions of each point, positive; None for one each.
        weight_neg: ``(negative,)``, likewise.
        num_centers: Largest number of centres, drawn from the distinct points of both classes.
        bandwidth: Bandwidth in multiples of the median distance between centres.
        alpha: Penalty; None chooses one by leaving points out, in units of ``1 / sqrt(n)``, n the harmonic mean of the
            class sizes; on at most 5,000 points of each class.
        robust: Whether features are scaled by :func:`robust_scale`.

    Example:
        >>> x = np.linspace(0, 1, 50)[:, None]
        >>> bool(kernel_angle(x + 2, x, np.random.default_rng(0))(np.array([[3.0]]))[0] > 1)
        True
    """
    x = np.concatenate([x_pos, x_neg])
    weight = None
    if weight_pos is not None and weight_neg is not None:
        weight = np.concatenate([weight_pos, weight_neg])
    features = kernel_features(x, source, weight=weight, num_centers=num_centers, bandwidth=bandwidth, robust=robust)
    phi = np.column_stack([np.ones(len(x)), features(x)])
    pos, neg = (
        ClassFeatures(part, class_mean_weights(given, len(part)), float(len(part) if given is None else given.sum()))
        for part, given in ((phi[: len(x_pos)], weight_pos), (phi[len(x_pos) :], weight_neg))
    )
    found = _at_chosen_penalty(pos, neg, source) if alpha is None else fit_linear_angle(pos, neg, alpha)
    at = found.coefficients
    return KernelAngle(features, features.whitening @ at[1:], float(at[0]), found.alpha, found.steps, found.shortfall)


def _at_chosen_penalty(pos: ClassFeatures, neg: ClassFeatures, source: np.random.Generator) -> LinearAngle:
    """The fit at the penalty that is best on a part of the points, in units of the inverse root of their number."""
    parts = [
        each if len(each.phi) <= _CHOSEN_ON else each.rows(source.choice(len(each.phi), _CHOSEN_ON, replace=False))
        for each in (pos, neg)
    ]
    some, every = balanced_size(parts[0].size, parts[1].size), balanced_size(pos.size, neg.size)
    chosen = best_penalty(parts[0], parts[1], some)
    if parts[0] is pos and parts[1] is neg:
        return chosen
    return fit_linear_angle(pos, neg, chosen.alpha * math.sqrt(some / every), chosen.coefficients)


def _centers(z: Array, count: int, source: np.random.Generator) -> Array:
    if len(z) > 50 * count:  # distinct points of a large sample: a part of it is enough to find them in
        z = z[source.choice(len(z), 50 * count, replace=False)]
    distinct = np.unique(z, axis=0)
    if len(distinct) <= count:
        return distinct
    out: Array = distinct[np.sort(source.permutation(len(distinct))[:count])]
    return out
