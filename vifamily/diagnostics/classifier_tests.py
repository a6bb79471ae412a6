"""Classifier two-sample tests: can a classifier tell posterior draws from reference draws."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning as FitWarning
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vifamily.diagnostics.bounds import Estimate
from vifamily.errors import ConfigError, ShapeError
from vifamily.numerics.kernels import checked_pair
from vifamily.rng import check_seed, generator, split

__all__ = ["NullTest", "c2st", "local_c2st"]

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class NullTest:
    """A statistic beside its values where there is nothing to be found.

    Attributes:
        statistic: What was seen; large speaks against the hypothesis.
        null: The same under the hypothesis, ``(repetition,)``.
        p_value: Share of the null values, what was seen counted with them, that are at least as large.
    """

    statistic: float
    null: Tensor
    p_value: float

    @classmethod
    def of(cls, statistic: float, null: Tensor) -> NullTest:
        """Compare a statistic with its null values; the p-value is exact where they are exchangeable."""
        return cls(statistic, null, (1 + int((null >= statistic).sum())) / (1 + len(null)))

    def __str__(self) -> str:
        """Return for example ``0.031 (95 % of null values below 0.012; p-value 0.01)``."""
        return (
            f"{self.statistic:.3g} (95 % of null values below {float(self.null.quantile(0.95)):.3g}; p-value "
            f"{self.p_value:.2g})"
        )

    __repr__ = __str__


def c2st(
    x: Any, y: Any, *, folds: int = 5, standardise: bool = True, classifier: Any | None = None, seed: int = 0
) -> Estimate:
    r"""Accuracy with which a classifier tells two samples apart, held out (C2ST, Lopez-Paz and Oquab 2017).

    One half where the samples come from one distribution, 1 where no point could come from both. Folds that were not
    trained on are scored, the classifier is a network with two hidden layers of ten times as many units as there are
    quantities, and the scale is that of ``x``: the settings of the benchmark of simulation-based inference (Lueckmann
    et al. 2021), so that figures can be put beside published ones.

    It is as sharp as the classifier: a value near one half says that *this* classifier found nothing. Samples should be
    of equal size; with unequal ones always naming the larger is already better than one half, which is refused.

    Args:
        x: ``(draw, quantity)``, the reference.
        y: ``(draw, quantity)``, the draws under test, as many.
        folds: Number of folds, at least 2.
        standardise: Whether both samples are scaled by the means and standard deviations of ``x``.
        classifier: Any scikit-learn classifier in place of the network; it is cloned.
        seed: Root seed of the folds and of the network's start.

    Returns:
        The accuracy and its binomial standard error (the folds share training points, so it is a little too small).

    Raises:
        ShapeError: If a sample is not a matrix, the columns or sizes differ, or there are fewer draws than folds.
        DataError: If a value is not finite.
        ConfigError: If there are fewer than two folds.

    Source: Lopez-Paz and Oquab (2017), section 3; Lueckmann et al. (2021), appendix A.5.

    Example:
        >>> x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
        >>> c2st(x, x + 5).value > 0.95
        True
    """
    a, b = (sample.numpy() for sample in checked_pair(x, y, fewest=2))
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ConfigError(f"folds must be an integer of 2 or more, got {folds!r}.")
    if len(a) != len(b):
        raise ShapeError(
            f"C2ST needs samples of equal size, got {len(a)} and {len(b)} draws: the accuracy of naming the larger one "
            "alone is above one half. Keep as many of each."
        )
    if len(a) < folds:
        raise ShapeError(f"{folds} folds need at least {folds} draws of each sample, got {len(a)}.")
    if standardise:
        sd = a.std(0)
        centre, scale = a.mean(0), np.where(sd > 0, sd, 1.0)
        a, b = (a - centre) / scale, (b - centre) / scale
    model = _network(a.shape[1], seed) if classifier is None else clone(classifier)
    points = np.concatenate([a, b])
    labels = np.repeat([0, 1], len(a))
    split_ = KFold(folds, shuffle=True, random_state=_small(seed, "c2st/folds"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # a network that could still improve is still a classifier
        guessed = cross_val_predict(model, points, labels, cv=split_)
    accuracy = float((guessed == labels).mean())
    return Estimate(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(labels)))


def local_c2st(
    truth: Any, data: Any, draws: Any, *, observed: Any, observed_draws: Any, num_null: int = 100,
    classifier: Any | None = None, seed: int = 0,
) -> NullTest:  # fmt: skip
    r"""Whether an amortised posterior is right *at one data set* (local C2ST, Linhart, Gramfort and Rodrigues 2023).

    A classifier learns to tell pairs :math:`(\theta^*, x)` of simulation from pairs :math:`(\theta, x)` with
    :math:`\theta \sim q(\cdot \mid x)`. At the data set at hand its probabilities d should be one half everywhere,

    .. math:: t(x_o) = \mathrm{mean}_{\theta \sim q(\cdot \mid x_o)} \big(d(\theta, x_o) - \tfrac12\big)^2 .

    The null values come from the same classifier trained again with the two members of random pairs exchanged. Where q
    is the posterior for every x they are exchangeable given x, so that the p-value is exact for that hypothesis (the
    publication permutes all labels; exchanging within pairs keeps x as it is).

    Args:
        truth: Parameters of the simulations, ``(simulation, quantity)``.
        data: Their data, or summaries of it, ``(simulation, feature)``.
        draws: One draw of q for each simulation's data, ``(simulation, quantity)``.
        observed: The data set at hand, ``(feature,)``.
        observed_draws: Draws of q at it, ``(draw, quantity)``.
        num_null: Times that the classifier is trained again.
        classifier: Any scikit-learn classifier with ``predict_proba``; by default the network of :func:`c2st`, of which
            each training takes seconds for thousands of simulations.
        seed: Root seed.

    Returns:
        Statistic, null values and p-value.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If a value is not finite.
        ConfigError: If ``num_null`` is below 1.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> g = torch.Generator().manual_seed(0)
        >>> theta, noise = torch.randn(300, 1, generator=g), torch.randn(300, 1, generator=g)
        >>> off = local_c2st(theta, theta + noise, theta + 3, observed=[0.0], observed_draws=theta[:50] + 3,
        ...                  num_null=19, classifier=LogisticRegression())
        >>> off.p_value
        0.05
    """
    theta, q = checked_pair(truth, draws, fewest=2)
    x, at_data = checked_pair(data, torch.as_tensor(observed).reshape(1, -1))
    _, at = checked_pair(theta, observed_draws)
    if len(theta) != len(q) or len(x) != len(theta):
        raise ShapeError(
            f"every simulation needs parameters, data and one draw, got {len(theta)}, {len(x)} and {len(q)} of them."
        )
    if isinstance(num_null, bool) or not isinstance(num_null, int) or num_null < 1:
        raise ConfigError(f"num_null must be an integer of 1 or more, got {num_null!r}.")
    model = make_pipeline(
        StandardScaler(), _network(theta.shape[1] + x.shape[1], seed) if classifier is None else clone(classifier)
    )
    where = torch.cat([at, at_data.expand(len(at), -1)], 1).numpy()
    source = generator(check_seed(seed), "local c2st")
    null = torch.empty(num_null, dtype=torch.float64)
    for index in range(num_null):
        swap = torch.rand(len(theta), 1, generator=source) < 0.5
        null[index] = _departure(model, torch.where(swap, q, theta), torch.where(swap, theta, q), x, where)
    return NullTest.of(_departure(model, theta, q, x, where), null)


def _departure(model: Any, first: Tensor, second: Tensor, x: Tensor, where: Array) -> float:
    """Mean square distance from one half of a classifier's probabilities, trained on two sets of pairs."""
    points = torch.cat([torch.cat([first, x], 1), torch.cat([second, x], 1)]).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        fitted = clone(model).fit(points, np.repeat([0, 1], len(first)))
    return float(((fitted.predict_proba(where)[:, 1] - 0.5) ** 2).mean())


def _network(size: int, seed: int) -> MLPClassifier:
    return MLPClassifier((10 * size, 10 * size), max_iter=10_000, random_state=_small(seed, "c2st/network"))


def _small(seed: int, name: str) -> int:
    """A seed that scikit-learn takes: 32 bits."""
    return split(check_seed(seed), name) % 2**32
