"""Two-step classification for imbalanced classes: the arctangent ratio, then a lower bound of the maximal AUC."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from vifamily.errors import ConfigError, DataError
from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE
from vifamily.numerics.kernel_angle import kernel_features, robust_scale
from vifamily.rng import generator
from vifamily.roc._arc_length import ArcLength, arc_length_from_angles
from vifamily.roc._checks import check_fraction, check_positive, check_whole, check_widths, one_label_each
from vifamily.roc._decisions import RatioDecisions
from vifamily.roc._ratio import two_classes
from vifamily.roc._training import (
    Loss,
    Perceptron,
    Sample,
    Schedule,
    arc_loss,
    hold_out,
    root_seed,
    sample_of,
    scores_of,
    train,
    weighted_mean,
)

__all__ = ["AUCBoundClassifier"]

Array = NDArray[np.float64]
_KERNEL_RATE = 10.0
"""The kernel's coefficients are many times those of a network, and its problem is smooth: so are its steps."""
_PAIRED = 2000
"""Held-out points of each class whose pairs are watched. All pairs of the held-out part, every few steps, would take
longer than the steps; that part is in random order, so the first ones are a sample of it."""
NETWORK_SCALE = 4.0
"""Units of log ratio in one unit of a network's output. Losses that want scores of several units are otherwise stopped
early while the network has learned noise alone, above all where the signal is not in the means of the features."""


class AUCBoundClassifier(RatioDecisions):
    r"""A scoring classifier for imbalanced classes, in two steps.

    Step 1 fits :math:`g = \log p/q` by the arc length of the optimal ROC curve, :math:`\max_g \mathbb{E}_p[\sin u] +
    \mathbb{E}_q[\cos u]` with :math:`u = \arctan e^g`. Step 2 starts there and maximises a lower bound of the maximal
    AUC, which holds for every bounded odd function of the difference of two scores:

    - ``"tanh"``: :math:`\tfrac12 + \tfrac12 \mathbb{E}[\tanh((g(x) - g(x'))/2)]` over the pairs of a minibatch;
    - ``"sine"``: the same with the sine of the difference of two angles, which is a product of four means and needs no
      pairs: :math:`\tfrac12 + \tfrac12 (\mathbb{E}_p[\sin u]\,\mathbb{E}_q[\cos u] -
      \mathbb{E}_p[\cos u]\,\mathbb{E}_q[\sin u])`, with angles that may leave ``[0, pi/2]``;
    - ``"none"``: ranks by step 1.

    Means are taken within each class and every minibatch holds both, so that no imbalance, however great, hides the
    rarer one. At the end the scores are calibrated by a line on held-out points. That there are two steps, the first
    the arctangent ratio and the second a lower bound of the maximal AUC, is the source's; the objectives of step 2 and
    everything else here are derived.

    Args:
        model: ``"network"`` or ``"kernel"`` (linear in the features of a Gaussian kernel).
        step2: ``"tanh"``, ``"sine"`` or ``"none"``.
        hidden: Widths of the network's layers.
        num_centers: Largest number of kernel centres.
        bandwidth: Kernel bandwidth in multiples of the median distance of the centres.
        learning_rate: Of both steps; ten times it for the kernel.
        batch_size: Points of each class in a minibatch; a class that has fewer comes in whole.
        max_iter: Largest number of steps of each of the two.
        patience: Steps without gain on the held-out part before a step ends.
        validation_fraction: Part of each class that is held out.
        random_state: Seed; None draws a fresh one.

    Attributes:
        classes_: The two labels, the positive one last.
        prior_: Fraction of positives in the training data.
        auc_bound_: Value of the bound of step 2 on the held-out part; of the tanh form where there is no step 2.
        validation_auc_: AUC on the held-out part after each step.
        kept_step_: The step whose scores are used: step 2, unless it made the AUC of the held-out part worse.
        n_iter_: Steps taken in all.

    Source: Liu (2022), "Estimating the arc length of the optimal ROC curve and lower bounding the maximal AUC".

    Example:
        >>> x = np.random.default_rng(0).normal(size=(300, 2))
        >>> y = x[:, 0] > 1.5
        >>> classifier = AUCBoundClassifier("kernel", max_iter=100, random_state=0).fit(x, y)
        >>> bool(classifier.decision_function(x)[y].min() > classifier.decision_function(x)[~y].mean())
        True
    """

    def __init__(
        self,
        model: str = "network",
        *,
        step2: str = "tanh",
        hidden: Sequence[int] = (32, 32),
        num_centers: int = 100,
        bandwidth: float = 1.0,
        learning_rate: float = 5e-3,
        batch_size: int = 256,
        max_iter: int = 2000,
        patience: int = 60,
        validation_fraction: float = 0.2,
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.step2 = step2
        self.hidden = hidden
        self.num_centers = num_centers
        self.bandwidth = bandwidth
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> AUCBoundClassifier:  # noqa: N803
        """Fit the scores.

        Args:
            X: ``(sample, feature)``.
            y: ``(sample,)``, two labels; the larger one is the positive class.
            sample_weight: ``(sample,)``, weights within the classes.

        Raises:
            ConfigError: If a setting cannot be used.
            DataError: If there are not two classes, or a weight is negative.
            ValueError: If a value is not finite or lengths differ, in scikit-learn's words.
        """
        self._check()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weight = np.ones(len(y)) if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        if (weight < 0).any():
            raise DataError(f"sample weights must not be negative, got {weight.min():.3g}.")
        X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
        self.classes_ = two_classes(y)
        positive = y == self.classes_[1]
        self.prior_ = float(np.average(positive, weights=weight))
        seed = root_seed(self.random_state)
        source = generator(seed, "roc/classifier")
        self._map = self._features(X, weight, seed)
        z = self._map(X)
        samples = (sample_of(z[mask], weight[mask]) for mask in (positive, ~positive))
        (pos, held_pos), (neg, held_neg) = (hold_out(s, self.validation_fraction, source) for s in samples)
        scale = 1.0 if self.model == "kernel" else NETWORK_SCALE
        self._module = Perceptron(z.shape[1], self._widths(), source, scale=scale)
        self._train(pos, neg, (held_pos, held_neg), seed)
        # the line is fitted on the held-out part: at the points of the fit scores are too sure
        self.slope_, self.offset_ = calibrating_line(*(self._scored(s) for s in (held_pos, held_neg)))
        return self

    def _check(self) -> None:
        if self.model not in ("network", "kernel"):
            raise ConfigError(f'model must be "network" or "kernel", got {self.model!r}.')
        if self.step2 not in ("tanh", "sine", "none"):
            raise ConfigError(f'step2 must be "tanh", "sine" or "none", got {self.step2!r}.')
        for name in ("num_centers", "batch_size", "max_iter", "patience"):
            check_whole(name, getattr(self, name))
        for name in ("bandwidth", "learning_rate"):
            check_positive(name, getattr(self, name))
        check_fraction("validation_fraction", self.validation_fraction)
        check_widths(self.hidden, 0)

    def _widths(self) -> list[int]:
        return [] if self.model == "kernel" else [int(width) for width in self.hidden]

    def _features(self, x: Array, weight: Array, seed: int) -> Any:
        if self.model == "network":
            return robust_scale(x, weight)
        return kernel_features(
            x, np.random.default_rng(seed), weight=weight, num_centers=self.num_centers, bandwidth=self.bandwidth
        )

    def _train(self, pos: Sample, neg: Sample, held: tuple[Sample, Sample], seed: int) -> None:
        rate = self.learning_rate * (_KERNEL_RATE if self.model == "kernel" else 1.0)
        how = Schedule(rate, self.batch_size, self.max_iter, self.patience)
        self.n_iter_ = train(self._module, pos, neg, held, arc_loss, arc_loss, how, seed, "roc/classifier/first")
        aucs, self.kept_step_ = [self._held_auc(held)], 1
        trained: nn.Module = self._module
        if self.step2 != "none":
            kept = copy.deepcopy(self._module.state_dict())
            loss: Loss = tanh_loss
            watched = held[0][:_PAIRED], held[1][:_PAIRED]
            if self.step2 == "sine":
                loss, trained, watched = sine_loss, Stretched(self._module), held
            self.n_iter_ += train(trained, pos, neg, watched, loss, loss, how, seed, "roc/classifier/second")
            aucs.append(self._held_auc(held))
            self.kept_step_ = 2 if aucs[1] >= aucs[0] else 1
            if self.kept_step_ == 1:
                self._module.load_state_dict(kept)
        g_pos, g_neg = (scores_of(trained, s.x) for s in held)
        bound = sine_loss if self.step2 == "sine" else tanh_loss
        self.auc_bound_ = -float(bound(g_pos, g_neg, held[0].weight, held[1].weight))
        self.validation_auc_ = tuple(aucs)

    def _scored(self, sample: Sample) -> tuple[Array, Array]:
        return scores_of(self._module, sample.x).numpy(), sample.weight.numpy()

    def _held_auc(self, held: tuple[Sample, Sample]) -> float:
        return weighted_auc(*self._scored(held[0]), *self._scored(held[1]))

    def log_density_ratio(self, X: Any) -> Array:  # noqa: N803
        """Return the calibrated score, an estimate of log p / q, ``(sample,)``."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        scores = scores_of(self._module, torch.from_numpy(np.ascontiguousarray(self._map(x)))).numpy()
        out: Array = self.slope_ * scores + self.offset_
        return out

    def angle(self, X: Any) -> Array:  # noqa: N803
        """Return the arctangent of the density ratio, ``(sample,)``, in ``[0, pi/2]``."""
        g = self.log_density_ratio(X)
        out: Array = np.arctan2(np.exp(np.minimum(g, 0.0)), np.exp(np.minimum(-g, 0.0)))
        return out

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Return the likelier class of each row, ``(sample,)``; ``score`` is the accuracy of these.

        Where positives are rare, few points are likelier positive than not: judge by a ``prior`` of your own, or by
        the ranking of :meth:`decision_function`.
        """
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    def certify(self, X: Any, y: Any, *, level: float = 0.95) -> ArcLength:  # noqa: N803
        """Bound the maximal AUC from below at points that had no part in the fit.

        Args:
            X: ``(sample, feature)``.
            y: ``(sample,)``, labels.
            level: Level of the bounds.

        Returns:
            The arc length of the calibrated score with ``auc_lower_bound`` and its ``certificate``.

        Raises:
            ShapeError: If there is not one label for each point.
            DataError: If a label is unknown, or a class has fewer than two points.
        """
        check_is_fitted(self)
        y = np.asarray(y)
        one_label_each(X, y)
        if not np.isin(y, self.classes_).all():
            raise DataError(f"labels must be among {self.classes_.tolist()}, got {np.unique(y).tolist()}.")
        sizes = [int((y == label).sum()) for label in self.classes_]
        if min(sizes) < 2:
            raise DataError(f"two points of each class are needed to bound the AUC, got {sizes[1]} and {sizes[0]}.")
        u = self.angle(X)
        return arc_length_from_angles(u[y == self.classes_[1]], u[y == self.classes_[0]], level=level)


class Stretched(nn.Module):
    """Angles that may leave ``[0, pi/2]``: those of a log ratio about pi/4, stretched by a factor that is learned."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.log_factor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return angles, ``(point,)``."""
        # arctan e^g = pi/4 + arctan(tanh(g/2))
        return RIGHT_ANGLE / 2 + self.log_factor.exp() * torch.atan(torch.tanh(0.5 * self.module(x)))


def sine_loss(u_pos: Tensor, u_neg: Tensor, w_pos: Tensor, w_neg: Tensor) -> Tensor:
    """Minus the bound of the maximal AUC from four weighted means of angles."""
    gain = weighted_mean(u_pos.sin(), w_pos) * weighted_mean(u_neg.cos(), w_neg)
    return -0.5 - 0.5 * (gain - weighted_mean(u_pos.cos(), w_pos) * weighted_mean(u_neg.sin(), w_neg))


def tanh_loss(g_pos: Tensor, g_neg: Tensor, w_pos: Tensor, w_neg: Tensor) -> Tensor:
    """Minus the bound of the maximal AUC from the hyperbolic tangent of every pair; in blocks, to bound memory."""
    total = g_pos.new_zeros(())
    for block, weight in zip(g_pos.split(1024), w_pos.split(1024), strict=True):
        total = total + weight @ torch.tanh(0.5 * (block.unsqueeze(-1) - g_neg)) @ w_neg
    return -0.5 - 0.5 * total / (w_pos.sum() * w_neg.sum())


def weighted_auc(s_pos: Array, w_pos: Array, s_neg: Array, w_neg: Array) -> float:
    """Area under the ROC curve of weighted points, ties counted as a half."""
    order = np.argsort(s_neg)
    below = np.append(0.0, np.cumsum(w_neg[order]))
    wins = [below[np.searchsorted(s_neg[order], s_pos, side=side)] for side in ("left", "right")]
    return float(w_pos @ (wins[0] + wins[1]) / (2 * w_pos.sum() * w_neg.sum()))


def calibrating_line(pos: tuple[Array, Array], neg: tuple[Array, Array]) -> tuple[float, float]:
    """Slope and offset that turn scores into log density ratios: logistic regression on even classes.

    A standard normal prior on the logarithm of the slope and on the offset, of the weight of one point, holds both
    where a class has few points; the order of the scores is kept.

    Args:
        pos: Scores of positives and their weights.
        neg: Scores of negatives and their weights.
    """
    means = [w / w.sum() for _, w in (pos, neg)]
    # of the effective sizes, so that the prior fades as points come in
    size = 2 / sum((m**2).sum() for m in means)

    def loss(at: Array) -> float:
        slope = math.exp(at[0])
        misses = [np.logaddexp(0, sign * (slope * s + at[1])) for sign, (s, _) in ((-1, pos), (1, neg))]
        return float(sum(m @ miss for m, miss in zip(means, misses, strict=True)) + (at @ at) / (2 * size))

    found = optimize.minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-5, 5), (-20, 20)])
    return math.exp(found.x[0]), float(found.x[1])
