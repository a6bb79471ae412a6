"""Classifier two-sample tests: can a classifier tell two samples apart?"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from vifamily.diagnostics.bounds import Estimate
from vifamily.errors import ConfigError
from vifamily.numerics.kernels import checked_pair
from vifamily.rng import check_seed

__all__ = ["c2st"]


def c2st(x: Any, y: Any, *, seed: int = 0, folds: int = 5, most_epochs: int = 1000) -> Estimate:
    r"""Accuracy of a classifier between two samples, on parts that it has not seen.

    0.5 says that they cannot be told apart, 1 that they are never mixed up.

    The test of the benchmark of simulation-based inference: a perceptron with two hidden layers of ten times as many
    units as there are columns (rectified, by Adam), on columns standardised by the first sample, in five-fold
    cross-validation. The larger sample is cut to the size of the smaller.

    Args:
        x: ``(draw, column)``, the reference.
        y: ``(other draw, column)``.
        seed: Randomness of folds and networks.
        folds: Number of folds.
        most_epochs: Most passes of a classifier over its data.

    Returns:
        The mean accuracy over the folds, and its binomial standard error.

    Raises:
        ShapeError: If a sample is not a matrix, is empty, or their columns differ.
        DataError: If a value is not finite.
        ConfigError: If there are fewer than ten draws per fold.

    Source: D. Lopez-Paz and M. Oquab (2017), "Revisiting classifier two-sample tests"; J.-M. Lueckmann et al. (2021),
    "Benchmarking simulation-based inference".

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 1, generator=generator)
        >>> c2st(x, x + 20).value
        1.0
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neural_network import MLPClassifier

    a, b = checked_pair(x, y)
    num = min(len(a), len(b))
    if folds < 2 or num < 10 * folds:
        raise ConfigError(f"a classifier test needs two folds and ten draws in each at least, got {num} draws.")
    source = torch.Generator().manual_seed(check_seed(seed))
    a, b = (part[torch.randperm(len(part), generator=source)[:num]] for part in (a, b))
    centre, scale = a.mean(0), a.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    data = ((torch.cat([a, b]) - centre) / scale).double().numpy()
    labels = np.repeat([0, 1], num)
    width, correct = 10 * data.shape[1], 0
    state = check_seed(seed) % 2**32
    splits = StratifiedKFold(folds, shuffle=True, random_state=state).split(data, labels)
    for learn, test in splits:
        judge = MLPClassifier((width, width), max_iter=most_epochs, random_state=state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            judge.fit(data[learn], labels[learn])
        correct += int((judge.predict(data[test]) == labels[test]).sum())
    accuracy = correct / (2 * num)
    return Estimate(accuracy, math.sqrt(accuracy * (1 - accuracy) / (2 * num)))
