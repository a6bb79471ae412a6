"""Logistic regression on the breast-cancer table of scikit-learn."""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer

from vifamily.models import LikelihoodModel
from vifamily.problems._base import Problem
from vifamily.problems._references import stored_reference
from vifamily.problems._regression import design, logistic
from vifamily.registry import register

__all__ = ["breast_cancer"]


@register("problems", "breast_cancer")
def breast_cancer() -> Problem:
    r"""Logistic regression on 569 tumours with 30 correlated features.

    .. math:: w \sim N(0, I), \qquad y_n \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(x_n \cdot w))

    Features are scaled to mean 0 and standard deviation 1, a last column of ones is the intercept; :math:`y = 1` is
    benign, as in the table. Several features are near-copies of each other, so the posterior is strongly correlated. In
    likelihood form: minibatches work. Data: Wolberg, Street and Mangasarian, "Breast Cancer Wisconsin (Diagnostic)",
    UCI Machine Learning Repository (1993), as bundled with scikit-learn.

    Returns:
        The problem, with parameter ``w`` of 31 numbers, reference moments and draws from a long Markov chain.

    Example:
        >>> problem = breast_cancer()
        >>> problem.model.dim, problem.model.num_data, problem.reference.kind
        (31, 569, 'nuts')
    """
    description = "Logistic regression with 31 correlated weights on 569 data; minibatches work."
    return Problem("breast_cancer", make_model(), stored_reference("breast_cancer"), description)


def make_model() -> LikelihoodModel:
    """Build the model alone, as the making of the reference needs it."""
    table = load_breast_cancer()
    return logistic(design(table.data), torch.from_numpy(table.target).double())
