r"""The angle that is linear in features: its penalised fit by Newton's method, and the penalty by leaving points out.

.. math:: \max_b \; \sum_i w_i\, S(\phi_i^\top b) + \sum_j v_j\, C(\phi_j'^\top b) - \lambda \|b\|^2

with weights that sum to one within each class, S and C the concave extensions of sine and cosine
(:mod:`vifamily.numerics.arctangent_ratio`), and a constant among the features that is not penalised. What goes beyond
the objective is derived here:

- **Leaving a point out** moves the maximiser by one Newton step, so that all leave-one-out angles cost one linear
  solve. The penalty is the one of a grid that is best by the length at those angles, which is the quantity wanted.
- **The shortfall.** A fit b with noise :math:`\delta` has, on fresh points, a length that is short by
  :math:`\tfrac12 \delta^\top H \delta`. With gradients of covariance V at the fit and the penalised curvature
  :math:`H_\lambda`, its expectation is :math:`\tfrac12 \operatorname{tr}(H_\lambda^{-1} H H_\lambda^{-1} V)`: the part
  of the gap to the arc length that comes of noise. What comes of the penalty is left in, so that a length with the
  shortfall added still errs downwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE

__all__ = ["PENALTIES", "ClassFeatures", "LinearAngle", "best_penalty", "extended_terms", "fit_linear_angle"]

Array = NDArray[np.float64]
PENALTIES = (0.5, 0.05, 5e-3, 5e-4, 5e-5, 5e-6)
"""Penalties to choose from, in units of ``1 / sqrt(n)``."""
_STEADY = 1e-9
_MOST_STEPS = 100


@dataclasses.dataclass(frozen=True)
class ClassFeatures:
    """Points of one class.

    Attributes:
        phi: Features, the constant first, ``(sample, 1 + feature)``.
        weight: Weights that sum to one, ``(sample,)``.
        size: Number of points, repetitions counted.
    """

    phi: Array
    weight: Array
    size: float

    def rows(self, chosen: NDArray[np.int64]) -> ClassFeatures:
        """Some of the points, as a sample of that many."""
        weight = self.weight[chosen]
        return ClassFeatures(self.phi[chosen], weight / weight.sum(), self.size * float(weight.sum()))


@dataclasses.dataclass(frozen=True)
class LinearAngle:
    """A fitted angle that is linear in features.

    Attributes:
        coefficients: ``(1 + feature,)``, the constant first.
        alpha: Penalty.
        left_out: Length at the angles that leave each point out, to first order.
        shortfall: Estimate of how far noise of the fit brings the length of fresh points below the arc length.
        steps: Newton steps.
    """

    coefficients: Array
    alpha: float
    left_out: float
    shortfall: float
    steps: int


def extended_terms(u: Array) -> tuple[Array, Array, Array]:
    """The concave extension of sine, its slope, and the size of its curvature, by hand: a fit is short.

    Args:
        u: Angles, any shape.

    Returns:
        Three arrays of that shape.
    """
    inside = np.clip(u, 0.0, RIGHT_ANGLE)
    sine = np.sin(inside)
    slope = np.where(u > RIGHT_ANGLE, 0.0, np.cos(inside))
    return sine + np.minimum(u, 0.0), slope, np.where(u > RIGHT_ANGLE, 0.0, sine)


@dataclasses.dataclass(frozen=True)
class _Point:
    """The objective at coefficients: its loss, and slopes and curvatures of each point."""

    loss: float
    gradient: Array
    slopes: tuple[Array, Array]
    curvatures: tuple[Array, Array]


def _evaluate(pos: ClassFeatures, neg: ClassFeatures, penalty: Array, at: Array) -> _Point:
    sine, rise, bend = extended_terms(pos.phi @ at)
    cosine, fall, bow = extended_terms(RIGHT_ANGLE - neg.phi @ at)
    loss = 0.5 * float(penalty * at @ at) - float(pos.weight @ sine) - float(neg.weight @ cosine)
    gradient = penalty * at - (pos.weight * rise) @ pos.phi + (neg.weight * fall) @ neg.phi
    return _Point(loss, gradient, (rise, fall), (bend, bow))


def _curvature(pos: ClassFeatures, neg: ClassFeatures, point: _Point) -> Array:
    bend, bow = point.curvatures
    out: Array = (pos.weight * bend * pos.phi.T) @ pos.phi + (neg.weight * bow * neg.phi.T) @ neg.phi
    return out


def fit_linear_angle(pos: ClassFeatures, neg: ClassFeatures, alpha: float, start: Array | None = None) -> LinearAngle:
    """Fit at one penalty.

    Args:
        pos: Positives.
        neg: Negatives.
        alpha: Penalty, positive.
        start: Coefficients to begin at; None is the constant pi / 4.

    Example:
        >>> one, zero = (ClassFeatures(np.array([[1.0, x]]), np.ones(1), 1.0) for x in (1.0, -1.0))
        >>> fit_linear_angle(one, zero, 1e-6).coefficients.round(2)  # angles of pi / 2 and 0 at the two points
        array([0.79, 0.79])
    """
    width = pos.phi.shape[1]
    penalty = np.append(0.0, np.full(width - 1, 2 * alpha))
    at = np.append(RIGHT_ANGLE / 2, np.zeros(width - 1)) if start is None else start
    here, steps = _evaluate(pos, neg, penalty, at), 0
    while True:
        bare = _curvature(pos, neg, here)
        full = bare + np.diag(penalty + _STEADY)
        step = np.linalg.solve(full, here.gradient)
        gain, length = float(here.gradient @ step), 1.0
        if gain < 1e-14 or steps == _MOST_STEPS:
            break
        there = _evaluate(pos, neg, penalty, at - step)
        # the curvature jumps where an angle passes 0 or pi / 2, so that a whole step may go too far
        while there.loss > here.loss - 1e-4 * length * gain and length > 1e-6:
            length /= 2
            there = _evaluate(pos, neg, penalty, at - length * step)
        if there.loss >= here.loss:
            break
        at, here, steps = at - length * step, there, steps + 1
    inverse: Array = np.asarray(np.linalg.inv(full), dtype=np.float64)
    return LinearAngle(
        at, alpha, _left_out(pos, neg, at, here, inverse), _shortfall(pos, neg, here, inverse, bare), max(steps, 1)
    )


def _left_out(pos: ClassFeatures, neg: ClassFeatures, at: Array, here: _Point, inverse: Array) -> float:
    """Length at the angles after one Newton step without each point."""
    total = 0.0
    for part, slope, bend, sign in zip((pos, neg), here.slopes, here.curvatures, (1.0, -1.0), strict=True):
        turned = part.phi @ inverse
        own = (turned * part.phi).sum(1)
        # without a point the mean of its class is over one fewer
        shift = (slope * own - turned @ ((part.weight * slope) @ part.phi)) / max(part.size - 1, 0.5)
        without = np.maximum(1 - bend * own / part.size, 0.1)
        angle = np.clip(part.phi @ at - sign * shift / without, 0.0, RIGHT_ANGLE)
        total += float(part.weight @ (np.sin(angle) if sign > 0 else np.cos(angle)))
    return total


def _shortfall(pos: ClassFeatures, neg: ClassFeatures, here: _Point, inverse: Array, bare: Array) -> float:
    """The expected loss of length by the noise of the fit; see the module."""
    noise = np.zeros_like(bare)
    for part, slope in zip((pos, neg), here.slopes, strict=True):
        gradient = slope[:, None] * part.phi
        gradient = gradient - part.weight @ gradient
        noise += (part.weight[:, None] * gradient).T @ gradient / part.size
    return max(0.5 * float(np.trace(inverse @ bare @ inverse @ noise)), 0.0)


def best_penalty(
    pos: ClassFeatures, neg: ClassFeatures, size: float, penalties: Sequence[float] = PENALTIES
) -> LinearAngle:
    """Fit at each penalty, from strong to weak, and keep the one whose leave-one-out length is the longest.

    Args:
        pos: Positives.
        neg: Negatives.
        size: The number n that penalties go by.
        penalties: In units of ``1 / sqrt(n)``, falling.
    """
    found: list[LinearAngle] = []
    for unit in penalties:
        # a fit begins where that at the stronger penalty ended
        start = found[-1].coefficients if found else None
        found.append(fit_linear_angle(pos, neg, unit / math.sqrt(size), start))
    return max(found, key=lambda fit: fit.left_out)
