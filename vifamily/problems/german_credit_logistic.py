"""Logistic regression on the German credit table."""

from __future__ import annotations

import torch

from vifamily.problems._base import Problem
from vifamily.problems._folder import find_folder, read_folder
from vifamily.problems._regression import logistic
from vifamily.registry import register

__all__ = ["german_credit_logistic"]


@register("problems", "german_credit_logistic")
def german_credit_logistic() -> Problem:
    r"""Logistic regression on 1000 credit records, 24 features and an intercept: near-Gaussian.

    .. math:: w \sim N(0, I), \qquad y_n \sim \mathrm{Bernoulli}(\mathrm{sigmoid}(x_n \cdot w))

    Target of the inference-gym collection; the reference has moments, no draws. Data: H. Hofmann, "Statlog (German
    Credit Data)", UCI Machine Learning Repository (1994).

    Returns:
        The problem, with parameter ``w`` of 25 numbers, the last one the intercept, and published moments.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("inference_gym", "german_credit_logistic"))
    model = logistic(torch.from_numpy(data["X"]).double(), torch.from_numpy(data["y"]).double())
    return Problem(
        "german_credit_logistic", model, reference, "Logistic regression with 25 weights on 1000 data: near-Gaussian."
    )
