"""The arctangent likelihood ratio as a scikit-learn classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from vifamily.errors import ConfigError, DataError
from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE
from vifamily.numerics.kernel_angle import KernelAngle, kernel_angle, robust_scale
from vifamily.rng import generator
from vifamily.roc._checks import check_fraction, check_positive, check_whole, check_widths
from vifamily.roc._decisions import RatioDecisions
from vifamily.roc._nuisance import ClassifierRatio
from vifamily.roc._training import Perceptron, Schedule, arc_loss, hold_out, root_seed, sample_of, scores_of, train

__all__ = ["ArcLengthRatio"]

Array = NDArray[np.float64]
_EDGE = 1e-6


class ArcLengthRatio(RatioDecisions):
    r"""The angle :math:`u(x) = \arctan(p(x)/q(x))` of positives p and negatives q, free of the class frequencies.

    .. math:: \max_u \; \mathbb{E}_p[\sin u(X)] + \mathbb{E}_q[\cos u(X)],

    whose largest value is the arc length of the optimal ROC curve. Means are taken within each class, so that
    imbalance plays no part. The objective and its consistency for the arctangent ratio are the source's; the three
    models, their defaults and the scaling are derived here.

    Models:

    - ``"kernel"``: a Gaussian kernel expansion plus a constant, with the concave extensions of sine and cosine, a
      ridge penalty and Newton's method: a concave problem without constraints.
    - ``"network"``: a tanh network for log p / q, trained by AdamW on minibatches that hold both classes, and stopped
      early on a held-out part. For many points or features.
    - a scikit-learn classifier with ``predict_proba``: its probabilities, with its class frequencies divided out. The
      area needs their order alone; the length needs them calibrated.

    Args:
        model: ``"kernel"``, ``"network"`` or a classifier.
        num_centers: Largest number of kernel centres, drawn from both classes. More of them help in many features.
        bandwidth: Kernel bandwidth in multiples of the median distance of the centres.
        alpha: Penalty of the kernel; None takes the best of six, from 0.5 to 5e-6 in units of ``1 / sqrt(n)``, n the
            harmonic mean of the class sizes: the one with the longest curve when each point is left out.
        max_samples: Points of each class that the kernel is fitted to, at most; drawn at random.
        scaling: ``"robust"`` for the arctangent of each feature about its median, in units of twice its interquartile
            range, or ``"none"``.
        hidden: Widths of the network's layers.
        learning_rate: Of the network.
        batch_size: Points of each class in a minibatch of the network.
        max_iter: Largest number of the network's steps.
        patience: Steps of the network without gain on the held-out part before it stops.
        validation_fraction: Part of each class that the network holds out.
        random_state: Seed; None draws a fresh one.

    Attributes:
        classes_: The two labels, the positive one last.
        prior_: Fraction of positives in the training data.
        n_iter_: Iterations taken.
        fitted_: The fitted model.
        shortfall_: By how much noise of the fit shortens the length of fresh points, estimated; 0 unless a kernel.

    Source: Liu (2022), "Estimating the arc length of the optimal ROC curve and lower bounding the maximal AUC".

    Example:
        >>> x = np.linspace(0, 1, 40)[:, None]
        >>> bool(np.diff(ArcLengthRatio().fit(x, x[:, 0] > 0.5).angle(x[[0, -1]]))[0] > 1)
        True
    """

    def __init__(
        self,
        model: Any = "kernel",
        *,
        num_centers: int = 100,
        bandwidth: float = 1.0,
        alpha: float | None = None,
        max_samples: int = 50_000,
        scaling: str = "robust",
        hidden: Sequence[int] = (32, 32),
        learning_rate: float = 5e-3,
        batch_size: int = 1024,
        max_iter: int = 2000,
        patience: int = 60,
        validation_fraction: float = 0.2,
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.num_centers = num_centers
        self.bandwidth = bandwidth
        self.alpha = alpha
        self.max_samples = max_samples
        self.scaling = scaling
        self.hidden = hidden
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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ArcLengthRatio:  # noqa: N803
        """Fit the angle.

        Args:
            X: ``(sample, feature)``.
            y: ``(sample,)``, two labels; the larger one is the positive class.
            sample_weight: ``(sample,)``, repetitions of each point, by scikit-learn's rule: give weights of
                importance a mean of one, since the penalty goes by their sum.

        Raises:
            ConfigError: If a setting cannot be used.
            DataError: If there are not two classes, or a weight is negative.
            ValueError: If a value is not finite or lengths differ, in scikit-learn's words.
        """
        self._check()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        if weight is not None:
            if (weight < 0).any():
                raise DataError(f"sample weights must not be negative, got {weight.min():.3g}.")
            # a point without weight is no point
            X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
        self.classes_ = two_classes(y)
        positive = y == self.classes_[1]
        self.prior_ = float(np.average(positive, weights=weight))
        seed, self.shortfall_ = root_seed(self.random_state), 0.0
        if self.model == "kernel":
            self._fit_kernel(X, positive, weight, seed)
        elif self.model == "network":
            self._fit_network(X, positive, weight, seed)
        else:
            self.fitted_: Any = ClassifierRatio(self.model, seed % 2**32).fit(X, positive, weight)
            self.n_iter_ = 1
        return self

    def _check(self) -> None:
        for name in ("num_centers", "max_samples", "batch_size", "max_iter", "patience"):
            check_whole(name, getattr(self, name))
        for name in ("bandwidth", "learning_rate"):
            check_positive(name, getattr(self, name))
        if self.alpha is not None:
            check_positive("alpha (or None for its default)", self.alpha)
        if self.scaling not in ("robust", "none"):
            raise ConfigError(f'scaling must be "robust" or "none", got {self.scaling!r}.')
        check_fraction("validation_fraction", self.validation_fraction)
        check_widths(self.hidden, 1)
        if isinstance(self.model, str) and self.model not in ("kernel", "network"):
            raise ConfigError(f'model must be "kernel", "network" or a classifier, got {self.model!r}.')

    def _fit_kernel(self, x: Array, positive: NDArray[np.bool_], weight: Array | None, seed: int) -> None:
        source = np.random.default_rng(seed)
        rows = []
        for mask in (positive, ~positive):
            found = np.flatnonzero(mask)
            few = len(found) <= self.max_samples
            rows.append(found if few else np.sort(source.choice(found, self.max_samples, replace=False)))
        weights = (None, None) if weight is None else (weight[rows[0]], weight[rows[1]])
        self.fitted_ = kernel_angle(
            x[rows[0]], x[rows[1]], source, weight_pos=weights[0], weight_neg=weights[1], num_centers=self.num_centers,
            bandwidth=self.bandwidth, alpha=self.alpha, robust=self.scaling == "robust",
        )  # fmt: skip
        self.n_iter_, self.shortfall_ = self.fitted_.steps, self.fitted_.shortfall

    def _fit_network(self, x: Array, positive: NDArray[np.bool_], weight: Array | None, seed: int) -> None:
        self.scale_ = robust_scale(x, weight) if self.scaling == "robust" else None
        z = x if self.scale_ is None else self.scale_(x)
        source = generator(seed, "roc/network")
        module = Perceptron(z.shape[1], [int(width) for width in self.hidden], source)
        samples = [sample_of(z[m], None if weight is None else weight[m]) for m in (positive, ~positive)]
        parts = [hold_out(sample, self.validation_fraction, source) for sample in samples]
        schedule = Schedule(self.learning_rate, self.batch_size, self.max_iter, self.patience)
        held = parts[0][1], parts[1][1]
        self.n_iter_ = train(
            module, parts[0][0], parts[1][0], held, arc_loss, arc_loss, schedule, seed, "roc/network/batches"
        )
        self.fitted_ = module

    def _checked(self, X: Any) -> Array:  # noqa: N803
        check_is_fitted(self)
        out: Array = validate_data(self, X, dtype=np.float64, reset=False)
        return out

    def angle(self, X: Any) -> Array:  # noqa: N803
        """Return u, ``(sample,)``, in ``[0, pi/2]``."""
        x = self._checked(X)
        if isinstance(self.fitted_, KernelAngle):
            out: Array = np.clip(self.fitted_(x), 0.0, RIGHT_ANGLE)
            return out
        # the larger of the two is one, so that nothing overflows
        out = np.arctan2(np.exp(np.minimum(g := self._log_ratio(x), 0.0)), np.exp(np.minimum(-g, 0.0)))
        return out

    def _log_ratio(self, x: Array) -> Array:
        if isinstance(self.fitted_, KernelAngle):
            u = np.clip(self.fitted_(x), _EDGE, RIGHT_ANGLE - _EDGE)
            out: Array = np.log(np.tan(u))
            return out
        if isinstance(self.fitted_, ClassifierRatio):
            return self.fitted_.log_ratio(x)
        z = torch.from_numpy(np.ascontiguousarray(x if self.scale_ is None else self.scale_(x)))
        out = scores_of(self.fitted_, z).numpy()
        return out

    def log_density_ratio(self, X: Any) -> Array:  # noqa: N803
        """Return log p / q, ``(sample,)``: a score that no class frequency enters.

        The angle of the kernel is kept a millionth away from both ends.
        """
        return self._log_ratio(self._checked(X))

    def density_ratio(self, X: Any) -> Array:  # noqa: N803
        """Return p / q, ``(sample,)``: the tangent of the angle."""
        out: Array = np.exp(np.clip(self.log_density_ratio(X), -700.0, 700.0))
        return out

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Return the likelier class of each row, ``(sample,)``; ``score`` is the accuracy of these."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]


def two_classes(y: Any) -> Any:
    """The two labels, ascending.

    Raises:
        DataError: If there are more or fewer.
    """
    found = np.unique(y)
    if len(found) > 2:
        raise DataError(
            f"Only binary classification is supported. The type of the target is multiclass: got {len(found)} classes."
        )
    if len(found) < 2:
        raise DataError(f"two classes are needed, got only one class {found.tolist()}: pass both samples.")
    return found
