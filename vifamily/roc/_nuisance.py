"""Any classifier with probabilities as the source of the ratio."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone, is_classifier
from sklearn.utils.class_weight import compute_class_weight

from vifamily.errors import ConfigError

Array = NDArray[np.float64]
_EDGE = 1e-12


class ClassifierRatio:
    """Log density ratios from the probabilities of a classifier and the class frequencies it was trained at.

    Args:
        classifier: A scikit-learn classifier with ``predict_proba``; cloned.
        random_state: Passed on to a clone that takes one and has none.

    Raises:
        ConfigError: If it is no classifier with probabilities.
    """

    def __init__(self, classifier: Any, random_state: int) -> None:
        if isinstance(classifier, type) or not is_classifier(classifier) or not hasattr(classifier, "predict_proba"):
            raise ConfigError(
                'model must be "kernel", "network" or a scikit-learn classifier with predict_proba, '
                f"got {classifier!r}."
            )
        self.classifier = clone(classifier)
        settings = self.classifier.get_params()
        unset = {k: random_state for k, v in settings.items() if k.split("__")[-1] == "random_state" and v is None}
        self.classifier.set_params(**unset)

    def fit(self, x: Array, positive: NDArray[np.bool_], weight: Array | None) -> ClassifierRatio:
        """Fit the classifier.

        Raises:
            ConfigError: If both sample weights and balanced class weights are asked for.
        """
        y = positive.astype(int)
        if weight is not None and "balanced" in self._class_weights():
            raise ConfigError(
                "sample weights and class_weight='balanced' of the classifier cannot be told apart: leave one out."
            )
        if weight is None:
            self.classifier.fit(x, y)
        else:
            self.classifier.fit(x, y, sample_weight=weight)
        self.log_prior_odds = self._log_prior_odds(y, np.ones(len(y)) if weight is None else weight)
        return self

    def _class_weights(self) -> list[Any]:
        return [v for k, v in self.classifier.get_params().items() if k.split("__")[-1] == "class_weight" and v]

    def _log_prior_odds(self, y: Any, weight: Array) -> float:
        """Log odds of the classes as the classifier saw them, its own class weights included."""
        own = self._class_weights()
        factor = compute_class_weight(own[0] if own else None, classes=np.array([0, 1]), y=y)
        sums = factor * np.array([weight[y == 0].sum(), weight[y == 1].sum()])
        return float(np.log(sums[1] / sums[0]))

    def log_ratio(self, x: Array) -> Array:
        """Return log p / q, ``(sample,)``; probabilities are kept 1e-12 away from zero and one."""
        eta = np.clip(self.classifier.predict_proba(x)[:, 1], _EDGE, 1 - _EDGE)
        out: Array = np.log(eta) - np.log1p(-eta) - self.log_prior_odds
        return out
