"""From a density ratio to decisions, for every classifier that estimates one."""

from __future__ import annotations

import abc
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from vifamily.roc._checks import check_fraction

__all__ = ["RatioDecisions"]

Array = NDArray[np.float64]


class RatioDecisions(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Odds and probabilities of a classifier with ``log_density_ratio`` and, once fitted, ``prior_``."""

    prior_: float

    @abc.abstractmethod
    def log_density_ratio(self, X: Any) -> Array:  # noqa: N803
        """Return log p / q, ``(sample,)``."""

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Return the logarithm of the posterior odds, ``(sample,)``: positive where ``predict`` says positive."""
        return self.log_density_ratio(X) + math.log(self.prior_ / (1 - self.prior_))

    def predict_proba(self, X: Any, prior: float | None = None) -> Array:  # noqa: N803
        """Return class probabilities, ``(sample, 2)``.

        Args:
            X: ``(sample, feature)``.
            prior: Fraction of positives to judge by; None for that of the training data.

        Raises:
            ConfigError: If the prior is not between 0 and 1.
        """
        return _probabilities(self.log_density_ratio(X), self.prior_ if prior is None else prior)


def _probabilities(log_ratio: Array, prior: float) -> Array:
    """Class probabilities from log density ratios at a fraction of positives, ``(sample, 2)``.

    Raises:
        ConfigError: If the prior is not between 0 and 1.
    """
    check_fraction("the prior, a fraction of positives,", prior)
    odds = log_ratio + math.log(prior / (1 - prior))
    # the smaller of the two from the exponential, so that neither is lost to rounding
    small = np.exp(-np.abs(odds)) / (1 + np.exp(-np.abs(odds)))
    positive = np.where(odds > 0, 1 - small, small)
    return np.stack([np.where(odds > 0, small, 1 - small), positive], axis=1)
