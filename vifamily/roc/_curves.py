"""ROC curves from scores: the staircase, its concave hull, and the curve that angles imply."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["concave_hull", "fitted_curve", "polyline_area", "polyline_length", "staircase"]

Array = NDArray[np.float64]


def staircase(score_pos: Array, score_neg: Array) -> tuple[Array, Array]:
    """The empirical ROC curve: rates of false and of true positives, each ``(threshold,)`` from (0, 0) to (1, 1).

    Tied scores are one step, joined by a straight segment. Without ties its length is 2 whatever the scores: never
    estimate an arc length from it.
    """
    both = np.concatenate([score_pos, score_neg])
    order = np.argsort(-both, kind="stable")
    is_pos = order < len(score_pos)
    last = np.append(np.flatnonzero(np.diff(both[order])), len(both) - 1)
    true, false = np.cumsum(is_pos)[last] / len(score_pos), np.cumsum(~is_pos)[last] / len(score_neg)
    return np.append(0.0, false), np.append(0.0, true)


def concave_hull(fpr: Array, tpr: Array) -> tuple[Array, Array]:
    """The least concave curve over points of a ROC curve, which randomised thresholds attain."""
    kept: list[int] = []
    for i in range(len(fpr)):
        while len(kept) > 1:
            j, k = kept[-2], kept[-1]
            if (tpr[k] - tpr[j]) * (fpr[i] - fpr[j]) > (tpr[i] - tpr[j]) * (fpr[k] - fpr[j]):
                break
            kept.pop()
        kept.append(i)
    return fpr[kept], tpr[kept]


def fitted_curve(angle_pos: Array, angle_neg: Array) -> tuple[Array, Array, Array]:
    r"""The optimal ROC curve that angles imply, from all points: a check of their calibration.

    Each point of the sample with even classes stands for the masses :math:`2 \sin u / (\sin u + \cos u)` of positives
    and :math:`2 \cos u / (\sin u + \cos u)` of negatives. Both are bounded, unlike the ratio itself. Where the angles
    are right, this curve and the hull of the staircase lie on each other.

    Returns:
        Rates of false and of true positives, ``(1 + points,)``, and the angle of each segment, ``(points,)``.
    """
    u = np.concatenate([angle_pos, angle_neg])
    weight = np.repeat([0.5 / len(angle_pos), 0.5 / len(angle_neg)], [len(angle_pos), len(angle_neg)])
    order = np.argsort(-u, kind="stable")
    u, weight = u[order], weight[order]
    total = np.sin(u) + np.cos(u)
    curves = [np.append(0.0, np.cumsum(weight * f(u) / total)) for f in (np.cos, np.sin)]
    return curves[0] / curves[0][-1], curves[1] / curves[1][-1], u


def polyline_length(fpr: Array, tpr: Array) -> float:
    """Length of a curve given by its corners."""
    return float(np.hypot(np.diff(fpr), np.diff(tpr)).sum())


def polyline_area(fpr: Array, tpr: Array) -> float:
    """Area under a curve given by its corners."""
    return float((np.diff(fpr) * (tpr[1:] + tpr[:-1])).sum() / 2)
