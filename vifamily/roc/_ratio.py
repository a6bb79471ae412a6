"""The arctangent likelihood ratio as a scikit-learn classifier."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import pairwise_distances
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from vifamily.errors import ConfigError, DataError
from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE, extended_cosine, extended_sine

__all__ = ["ArcLengthRatio"]

Array = NDArray[np.float64]
_EDGE = 1e-6


class ArcLengthRatio(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    r"""Kernel estimate of :math:`u(x) = \arctan(p(x)/q(x))`, free of the class frequencies.

    .. math:: \max_u \; \tfrac1{n_p}\sum_i S(u(x_i)) + \tfrac1{n_q}\sum_j C(u(x'_j)) - \lambda \|u\|^2

    with u a Gaussian kernel expansion plus a constant and S, C the concave extensions of sine and cosine, so that the
    problem is convex without constraints. The objective is the source's; the extension and defaults are derived here.

    Args:
        num_centers: Largest number of kernel centres, drawn from both classes.
        bandwidth: Kernel bandwidth in multiples of the median distance of the centres.
        alpha: Penalty; None is ``0.05 / sqrt(n)``, n the harmonic mean of the class sizes.
        random_state: Seed of the choice of centres; None draws a fresh one.

    Source: Liu (2022), "Estimating the arc length of the optimal ROC curve and lower bounding the maximal AUC".

    Example:
        >>> x = np.linspace(0, 1, 40)[:, None]
        >>> bool(np.diff(ArcLengthRatio().fit(x, x[:, 0] > 0.5).angle(x[[0, -1]]))[0] > 1)
        True
    """

    def __init__(
        self,
        *,
        num_centers: int = 100,
        bandwidth: float = 1.5,
        alpha: float | None = None,
        random_state: int | None = None,
    ) -> None:
        self.num_centers = num_centers
        self.bandwidth = bandwidth
        self.alpha = alpha
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any) -> ArcLengthRatio:  # noqa: N803
        """Fit the angle.

        Args:
            X: ``(sample, feature)``.
            y: ``(sample,)``, two labels; the larger one is the positive class.

        Raises:
            ConfigError: If a setting is not positive.
            DataError: If there are not two classes.
        """
        if self.num_centers < 1 or self.bandwidth <= 0 or (self.alpha is not None and self.alpha <= 0):
            raise ConfigError("num_centers, bandwidth and alpha must be positive: leave them out for the defaults.")
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) > 2:
            raise DataError(
                "Only binary classification is supported. The type of the target is multiclass: "
                f"got {len(self.classes_)} classes."
            )
        if len(self.classes_) < 2:
            raise DataError(f"two classes are needed, got only one class {self.classes_.tolist()}: pass both samples.")
        positive = y == self.classes_[1]
        self.prior_ = float(positive.mean())
        self.location_ = np.median(X, axis=0)
        spread = np.subtract(*np.percentile(X, [75, 25], axis=0))
        self.scale_ = np.where(spread > 0, spread, np.where(X.std(axis=0) > 0, X.std(axis=0), 1.0))
        z = self._scaled(X)
        pick = np.random.default_rng(self.random_state).permutation(len(z))[: self.num_centers]
        self.centers_ = z[np.sort(pick)]
        distances = pairwise_distances(self.centers_)
        apart = distances[distances > 0]
        self.bandwidth_ = self.bandwidth * float(np.median(apart)) if apart.size else 1.0
        # features whose plain norm is the norm of the kernel's space
        level, vectors = np.linalg.eigh(self._kernel(self.centers_))
        keep = level > 1e-10 * level[-1]
        self.whitening_ = vectors[:, keep] / np.sqrt(level[keep])
        self._maximise(self._kernel(z) @ self.whitening_, positive)
        return self

    def _maximise(self, features: Array, positive: NDArray[np.bool_]) -> None:
        phi_p, phi_q = torch.from_numpy(features[positive]), torch.from_numpy(features[~positive])
        size = 2 / (1 / len(phi_p) + 1 / len(phi_q))
        self.alpha_ = 0.05 / math.sqrt(size) if self.alpha is None else self.alpha

        def loss(at: Array) -> tuple[float, Array]:
            w = torch.from_numpy(at.copy()).requires_grad_()
            with torch.enable_grad():
                gain = extended_sine(phi_p @ w[1:] + w[0]).mean() + extended_cosine(phi_q @ w[1:] + w[0]).mean()
                value = self.alpha_ * w[1:].square().sum() - gain
                (slope,) = torch.autograd.grad(value, w)
            return float(value.detach()), slope.numpy()

        start = np.concatenate([[RIGHT_ANGLE / 2], np.zeros(features.shape[1])])
        found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
        self.intercept_, self.coef_, self.n_iter_ = float(found.x[0]), found.x[1:], max(int(found.nit), 1)

    def _scaled(self, X: Array) -> Array:  # noqa: N803
        # strictly monotone per feature, so the arc length is kept, and heavy tails are brought in
        out: Array = np.arctan((X - self.location_) / self.scale_)
        return out

    def _kernel(self, z: Array) -> Array:
        out: Array = np.exp(-0.5 * (pairwise_distances(z, self.centers_) / self.bandwidth_) ** 2)
        return out

    def angle(self, X: Any) -> Array:  # noqa: N803
        """Return u, ``(sample,)``, in ``[0, pi/2]``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        u = self._kernel(self._scaled(X)) @ (self.whitening_ @ self.coef_) + self.intercept_
        out: Array = np.clip(u, 0.0, RIGHT_ANGLE)
        return out

    def density_ratio(self, X: Any) -> Array:  # noqa: N803
        """Return p / q, ``(sample,)``; the angle is kept a millionth away from both ends."""
        out: Array = np.tan(np.clip(self.angle(X), _EDGE, RIGHT_ANGLE - _EDGE))
        return out

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """Return class probabilities at the class frequencies of the training data, ``(sample, 2)``."""
        odds = self.density_ratio(X) * self.prior_ / (1 - self.prior_)
        return np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Return the logarithm of the posterior odds, ``(sample,)``: positive where ``predict`` says positive."""
        out: Array = np.log(self.density_ratio(X)) + math.log(self.prior_ / (1 - self.prior_))
        return out

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Return the likelier class of each row, ``(sample,)``; ``score`` is the accuracy of these."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]
