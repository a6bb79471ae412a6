"""Imbalanced classification on tasks with rare positives: two steps beside cross-entropy and losses of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from vifamily.numerics.kernel_angle import robust_scale
from vifamily.rng import generator
from vifamily.roc._classifier import NETWORK_SCALE, Stretched, sine_loss, tanh_loss, weighted_auc
from vifamily.roc._training import (
    Loss,
    Perceptron,
    Sample,
    Schedule,
    arc_loss,
    hold_out,
    sample_of,
    scores_of,
    train,
    weighted_mean,
)

__all__ = ["BATCH_SIZE", "METHODS", "TASKS", "Prepared", "Split", "auc_of", "method_aucs", "prepare"]

Array = NDArray[np.float64]
_HIDDEN = [32, 32]


@dataclasses.dataclass(frozen=True)
class Split:
    """One draw of a task: positives and negatives to train on, then those to judge by."""

    pos: Array
    neg: Array
    test_pos: Array
    test_neg: Array


# -- tasks -------------------------------------------------------------------------------------------------------------
def normals(fraction: float, seed: int) -> Split:
    """Two normals in ten dimensions whose scales are 1.5 and 1: the best score is a square, and its AUC 0.891490."""
    rng = np.random.default_rng(seed)
    num = round(3000 * fraction)
    pos, neg = rng.normal(0, 1.5, (num, 10)), rng.normal(size=(3000 - num, 10))
    return Split(pos, neg, rng.normal(0, 1.5, (4000, 10)), rng.normal(size=(4000, 10)))


def _thinned(x: Array, positive: NDArray[np.bool_], fraction: float, seed: int) -> Split:
    """Half of each class to train on, its positives thinned to a fraction; the other half to judge by."""
    rng = np.random.default_rng(seed)
    pos, neg = (rng.permutation(x[mask]) for mask in (positive, ~positive))
    half_pos, half_neg = len(pos) // 2, len(neg) // 2
    keep = max(3, round(fraction / (1 - fraction) * half_neg))
    return Split(pos[: min(keep, half_pos)], neg[:half_neg], pos[half_pos:], neg[half_neg:])


def digits(fraction: float, seed: int) -> Split:
    """Handwritten eights among ones, threes and nines, 8 by 8 pixels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, [1, 3, 8, 9])
    return _thinned(x[kept] / 16.0, y[kept] == 8, fraction, seed)


def breast_cancer(fraction: float, seed: int) -> Split:
    """Malignant among benign masses, thirty measurements."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _thinned(x, y == 0, fraction, seed)


TASKS: Mapping[str, Callable[[float, int], Split]] = {
    "normals": normals, "digits": digits, "breast cancer": breast_cancer,
}  # fmt: skip


# -- losses ------------------------------------------------------------------------------------------------------------
def cross_entropy(prior: float) -> Loss:
    """Cross-entropy at a fraction of positives; batches hold the classes evenly, so it enters as a weight."""

    def loss(g_pos: Tensor, g_neg: Tensor, w_pos: Tensor, w_neg: Tensor) -> Tensor:
        return prior * weighted_mean(softplus(-g_pos), w_pos) + (1 - prior) * weighted_mean(softplus(g_neg), w_neg)

    return loss


def pairwise_logistic(g_pos: Tensor, g_neg: Tensor, w_pos: Tensor, w_neg: Tensor) -> Tensor:
    """Mean of ``log(1 + exp(-(g - g')))`` over pairs."""
    return softplus(g_neg - g_pos.unsqueeze(-1)).mean()


def pairwise_hinge(g_pos: Tensor, g_neg: Tensor, w_pos: Tensor, w_neg: Tensor) -> Tensor:
    """Mean of the squared hinge of ``1 - (g - g')`` over pairs."""
    return (1 + g_neg - g_pos.unsqueeze(-1)).clamp_min(0).square().mean()


def auc_margin(g_pos: Tensor, g_neg: Tensor, w_pos: Tensor, w_neg: Tensor) -> Tensor:
    """The AUC-margin loss with its inner problems solved: variances within the classes and a hinge between means."""
    return g_pos.var(correction=0) + g_neg.var(correction=0) + (1 + g_neg.mean() - g_pos.mean()).clamp_min(0).square()


METHODS = (
    "cross-entropy", "balanced cross-entropy", "pairwise logistic", "pairwise squared hinge", "AUC margin",
    "arc length alone", "two steps, tanh", "two steps, sine",
)  # fmt: skip

_SCALES = {"pairwise logistic": NETWORK_SCALE}
"""Losses of pairs that rank better at the scale of the two steps, and so have it; chosen on tasks other than these."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A split as every method gets it.

    Attributes:
        pos: Positives to train on, scaled.
        neg: Negatives to train on.
        held: Held-out positives and negatives.
        start: Weights at which every network starts.
        tests: Positives and negatives to judge by, scaled.
        prior: Fraction of positives.
    """

    pos: Sample
    neg: Sample
    held: tuple[Sample, Sample]
    start: dict[str, Tensor]
    tests: tuple[Tensor, Tensor]
    prior: float


BATCH_SIZE = 256


def prepare(split: Split, seed: int) -> Prepared:
    """Scale a split, hold a fifth of it out and draw the start, all from one seed."""
    scale = robust_scale(np.concatenate([split.pos, split.neg]))
    source = generator(seed, "reproduce/roc")
    (pos, held_pos), (neg, held_neg) = (
        hold_out(sample_of(scale(x), None), 0.2, source) for x in (split.pos, split.neg)
    )
    start = Perceptron(split.pos.shape[1], _HIDDEN, source).state_dict()
    tests = torch.from_numpy(scale(split.test_pos)), torch.from_numpy(scale(split.test_neg))
    prior = len(split.pos) / (len(split.pos) + len(split.neg))
    return Prepared(pos, neg, (held_pos, held_neg), start, tests, prior)


def auc_of(g_pos: Array, g_neg: Array) -> float:
    """Area under the curve of scores of positives and negatives."""
    return weighted_auc(g_pos, np.ones(len(g_pos)), g_neg, np.ones(len(g_neg)))


def method_aucs(split: Split, seed: int, *, max_iter: int = 2000) -> dict[str, float]:
    """AUC on the points to judge by of every method, from one start and one held-out part.

    Args:
        split: The task.
        seed: Seed of the start, the held-out part and the minibatches.
        max_iter: Largest number of steps of each loss.
    """
    data = prepare(split, seed)
    start, prior, schedule = data.start, data.prior, Schedule(batch_size=BATCH_SIZE, max_iter=max_iter)

    def run(loss: Loss, begin: Any, scale: float = 1.0, *, stretched: bool = False) -> Perceptron:
        module = Perceptron(split.pos.shape[1], _HIDDEN, generator(0, "reproduce/roc/unused"), scale=scale)
        module.load_state_dict(begin)
        trained = Stretched(module) if stretched else module
        train(trained, data.pos, data.neg, data.held, loss, loss, schedule, seed, "reproduce/roc/batches")
        return module

    def judged(module: Perceptron) -> float:
        return auc_of(*(scores_of(module, x).numpy() for x in data.tests))

    single = (cross_entropy(prior), cross_entropy(0.5), pairwise_logistic, pairwise_hinge, auc_margin)
    found = {
        name: judged(run(loss, start, _SCALES.get(name, 1.0))) for name, loss in zip(METHODS, single, strict=False)
    }
    first = run(arc_loss, start, NETWORK_SCALE)
    found["arc length alone"] = judged(first)
    found["two steps, tanh"] = judged(run(tanh_loss, first.state_dict(), NETWORK_SCALE))
    found["two steps, sine"] = judged(run(sine_loss, first.state_dict(), NETWORK_SCALE, stretched=True))
    return found
