r"""The arctangent likelihood ratio: the functions whose mean is the arc length of the optimal ROC curve.

With densities p of positives and q of negatives, :math:`u^* = \arctan(p/q)` is the angle of the tangent of the optimal
ROC curve, and the length of that curve is the largest value of

.. math:: J(u) = \mathbb{E}_p[\sin u] + \mathbb{E}_q[\cos u], \qquad
          L = J(u^*) = \int \sqrt{p^2 + q^2}, \qquad \sqrt2 \le L \le 2.

That the length is an f-divergence with a variational form for the arctangent ratio is the source's (Liu 2022,
"Estimating the arc length of the optimal ROC curve and lower bounding the maximal AUC"); the explicit J, the concave
extension, the form in logits, the sine bound and the range of areas are derived here and tested against quadrature.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize
from torch import Tensor

from vifamily.errors import DataError, ShapeError

__all__ = [
    "auc_range",
    "extended_cosine",
    "extended_sine",
    "largest_variance",
    "logit_terms",
    "population_curve",
    "sine_bound",
]

RIGHT_ANGLE = math.pi / 2
SHORTEST, LONGEST = math.sqrt(2.0), 2.0


def extended_sine(u: Tensor) -> Tensor:
    r"""Sine continued concavely beyond ``[0, pi/2]``: u below 0, 1 above pi/2; continuously differentiable.

    With it (and :func:`extended_cosine`) in place of sine and cosine, J stays concave for every real u and keeps its
    population maximiser, so a model that is linear in its parameters needs no constraints.

    Args:
        u: Angles, any shape.

    Returns:
        The same shape.

    Example:
        >>> extended_sine(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-1.,  0.,  1.])
    """
    return torch.where(u < 0, u, u.clamp(0.0, RIGHT_ANGLE).sin())


def extended_cosine(u: Tensor) -> Tensor:
    """Cosine continued concavely beyond ``[0, pi/2]``: ``extended_sine(pi/2 - u)``; see there.

    Example:
        >>> extended_cosine(torch.tensor([-1.0, 0.0]))
        tensor([1., 1.])
    """
    return extended_sine(RIGHT_ANGLE - u)


def logit_terms(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sine and cosine of :math:`\arctan e^g`, finite with their gradients for every finite g.

    Args:
        log_ratio: g, the logarithm of p / q, any shape.

    Returns:
        :math:`\sqrt{\sigma(2g)}` and :math:`\sqrt{\sigma(-2g)}`, each of the same shape.

    Example:
        >>> logit_terms(torch.tensor([0.0, 2000.0]))[0]
        tensor([0.7071, 1.0000])
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return (0.5 * log_sigmoid(2 * log_ratio)).exp(), (0.5 * log_sigmoid(-2 * log_ratio)).exp()


def sine_bound(u_pos: Tensor, u_neg: Tensor) -> Tensor:
    r"""Lower bound of the maximal AUC from four means, with no pairs.

    .. math:: \tfrac12 + \tfrac12\big(\mathbb{E}_p[\sin u]\,\mathbb{E}_q[\cos u]
              - \mathbb{E}_p[\cos u]\,\mathbb{E}_q[\sin u]\big) \le A^*

    for every real function u. The population value is the bound; means of finite samples estimate it.

    Args:
        u_pos: Angles at positives, ``(..., positive)``.
        u_neg: Angles at negatives, ``(..., negative)``.

    Returns:
        ``(...)``.

    Raises:
        DataError: If a class is empty: the mean over an absent class is not zero.

    Example:
        >>> sine_bound(torch.tensor([math.pi / 2]), torch.tensor([0.0]))
        tensor(1.)
    """
    if u_pos.shape[-1] == 0 or u_neg.shape[-1] == 0:
        raise DataError(
            f"both classes are needed, got {u_pos.shape[-1]} positives and {u_neg.shape[-1]} negatives: "
            "draw batches that hold both."
        )
    gain = u_pos.sin().mean(-1) * u_neg.cos().mean(-1) - u_pos.cos().mean(-1) * u_neg.sin().mean(-1)
    return 0.5 + 0.5 * gain


def population_curve(p: ArrayLike, q: ArrayLike) -> tuple[float, float]:
    r"""Arc length and area of the optimal ROC curve of two discrete distributions.

    :math:`L = \sum_i \sqrt{p_i^2 + q_i^2}`; the area is that under the segments in falling order of :math:`p_i/q_i`.
    Cells of two continuous distributions give lower bounds of both, with an error of the square of the cell's width.

    Args:
        p: Probabilities under the positives, ``(cell,)``.
        q: Probabilities under the negatives, ``(cell,)``.

    Returns:
        The length and the area (the maximal AUC).

    Raises:
        ShapeError: If the two are not vectors of one length.
        DataError: If a probability is negative or not finite, or a sum is not 1.

    Example:
        >>> [round(x, 6) for x in population_curve([0.8, 0.2], [0.3, 0.7])]
        [1.582411, 0.75]
    """
    a, b = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ShapeError(f"p and q must be vectors of one length, got shapes {a.shape} and {b.shape}.")
    for name, x in (("p", a), ("q", b)):
        if not np.isfinite(x).all() or (x < 0).any() or abs(x.sum() - 1) > 1e-6:
            raise DataError(f"{name} must hold probabilities that sum to 1, got a sum of {x.sum():.6g}: normalise it.")
    order = np.argsort(np.arctan2(a, b), kind="stable")
    a, b = a[order], b[order]
    return float(np.hypot(a, b).sum()), float((a * (np.cumsum(b) - b / 2)).sum())


def auc_range(length: float) -> tuple[float, float]:
    r"""The least and the largest maximal AUC that go with an arc length, whatever the distributions.

    The least is that of a triangle, :math:`\tfrac12 + (L^2 - 2) / (4 (L - 1))`; the largest that of a circular arc over
    the diagonal, with straight runs along the frame once the length exceeds pi / 2. The lower end is loose.

    Args:
        length: Arc length, in ``[sqrt(2), 2]``.

    Returns:
        The two ends.

    Raises:
        DataError: If the length is outside that range.

    Example:
        >>> [round(x, 4) for x in auc_range(1.546469)]
        [0.6791, 0.7603]
    """
    if not SHORTEST - 1e-12 <= length <= LONGEST + 1e-12:
        raise DataError(f"an arc length lies between sqrt(2) and 2, got {length!r}: clip an estimate to that range.")
    lower = 0.5 + max(length**2 - 2, 0.0) / (4 * (length - 1))
    if length > RIGHT_ANGLE:
        corner = (2 - length) / (2 - RIGHT_ANGLE)
        return lower, 1 - corner**2 * (1 - math.pi / 4)
    if length <= SHORTEST * (1 + 1e-14):
        return lower, max(lower, 0.5)
    half = float(optimize.brentq(lambda a: a - length / SHORTEST * math.sin(a), 1e-9, math.pi / 4 + 1e-9))
    radius = 1 / (SHORTEST * math.sin(half))
    return lower, 0.5 + radius**2 * (half - math.sin(half) * math.cos(half))


def largest_variance(length: float) -> float:
    r"""The largest variance that the terms of the length can have together, given the length.

    .. math:: \operatorname{Var}_p[\sin u^*] + \operatorname{Var}_q[\cos u^*] \le 3 - \frac{4}{L^2} - \frac{L^2}{2}

    Zero at both ends, and sharp to first order near equality. With :math:`t = \sin u^* + \cos u^*` the second moments
    sum to :math:`3 - \tfrac12 \int \rho t^3`, where :math:`\rho / L` is a density under which t has the mean
    :math:`2 / L`, and the squared means to at least :math:`L^2 / 2`. Derived here.

    Args:
        length: Arc length, in ``[sqrt(2), 2]``.

    Example:
        >>> round(largest_variance(1.546469), 4)  # two normals a unit apart have 0.0997
        0.1317
    """
    return max(3 - 4 / length**2 - length**2 / 2, 0.0)
