"""Regression models in likelihood form: the pieces that several problems share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.models import LikelihoodModel
from vifamily.problems._densities import normal_log_density

__all__ = ["design", "linear", "logistic"]

Values = dict[str, Tensor]
Rows = tuple[Tensor, Tensor]


def design(features: np.ndarray) -> Tensor:
    """Return features scaled to mean 0 and population standard deviation 1, with a last column of ones."""
    scaled = (features - features.mean(0)) / features.std(0)
    return torch.from_numpy(np.column_stack([scaled, np.ones(len(scaled))]))


def logistic(features: Tensor, label: Tensor, **options: Any) -> LikelihoodModel:
    """Build logistic regression with a standard normal prior on every weight.

    Args:
        features: ``(datum, dim)``, a column of ones included where an intercept is wanted.
        label: 0 or 1, ``(datum,)``.
        options: Passed to the model.

    Returns:
        The model, with one parameter ``w`` of shape ``(dim,)``.
    """
    dim = features.shape[1]

    def log_likelihood(theta: Values, batch: Rows) -> Tensor:
        x, y = batch
        # logsigmoid keeps full precision on both tails, where log(sigmoid) would be -inf
        return torch.nn.functional.logsigmoid((2 * y - 1) * (theta["w"] @ x.T))

    def simulate(theta: Values, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(torch.sigmoid(theta["w"] @ features.T), generator=generator)

    return LikelihoodModel(
        (0.0, 1.0),
        log_likelihood,
        data=(features, label),
        parameters={"w": ((dim,), "real")},
        simulate=simulate,
        **options,
    )


def linear(
    features: Tensor,
    response: Tensor,
    log_prior: Callable[[Values], Tensor],
    *,
    location: Callable[[Values, Tensor], Tensor] | None = None,
    parameters: dict[str, Any],
    **options: Any,
) -> LikelihoodModel:
    """Build linear regression with unknown noise ``sigma``.

    Args:
        features: ``(datum, dim)``.
        response: ``(datum,)``.
        log_prior: Log prior of all parameters.
        location: From the parameters and the features to the mean ``(draw, datum)``; ``beta @ features.T`` where left
            out.
        parameters: Names with supports, ``sigma`` among them.
        options: Passed to the model.
    """

    def log_likelihood(theta: Values, batch: Rows) -> Tensor:
        x, y = batch
        mean = theta["beta"] @ x.T if location is None else location(theta, x)
        return normal_log_density(y, mean, theta["sigma"].unsqueeze(-1))

    def simulate(theta: Values, generator: torch.Generator) -> Tensor:
        mean = theta["beta"] @ features.T if location is None else location(theta, features)
        return mean + theta["sigma"].unsqueeze(-1) * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)

    return LikelihoodModel(
        log_prior, log_likelihood, data=(features, response), parameters=parameters, simulate=simulate, **options
    )
