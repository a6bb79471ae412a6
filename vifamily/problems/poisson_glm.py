"""Poisson regression on the exercise counts of scikit-learn's Linnerud table."""

from __future__ import annotations

import torch
from sklearn.datasets import load_linnerud
from torch import Tensor

from vifamily.models import LikelihoodModel
from vifamily.problems._base import Problem
from vifamily.problems._densities import bounded_exp
from vifamily.problems._references import stored_reference
from vifamily.problems._regression import design
from vifamily.registry import register

__all__ = ["poisson_glm"]


@register("problems", "poisson_glm")
def poisson_glm() -> Problem:
    r"""Poisson regression: chin-ups of 20 men by weight, waist and pulse.

    .. math:: \beta \sim N(0, 2), \qquad y_n \sim \mathrm{Poisson}(e^{x_n \cdot \beta})

    Features are scaled to mean 0 and standard deviation 1, a last column of ones is the intercept. Weight and waist are
    strongly correlated. Data: Tenenhaus, "La régression PLS" (1998), as bundled with scikit-learn.

    Returns:
        The problem, with parameter ``beta`` of 4 numbers, reference moments and draws from a long Markov chain.

    Example:
        >>> problem = poisson_glm()
        >>> problem.model.dim, problem.model.num_data
        (4, 20)
    """
    description = "Poisson regression with 4 weights on 20 counts."
    return Problem("poisson_glm", make_model(), stored_reference("poisson_glm"), description)


def make_model() -> LikelihoodModel:
    """Build the model alone, as the making of the reference needs it."""
    table = load_linnerud()
    x, y = design(table.target), torch.from_numpy(table.data[:, 0]).double()

    def log_likelihood(theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, count = batch
        log_rate = theta["beta"] @ rows.T
        return count * log_rate - bounded_exp(log_rate) - torch.lgamma(count + 1)

    def simulate(theta: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return torch.poisson(bounded_exp(theta["beta"] @ x.T), generator=generator)

    return LikelihoodModel(
        (0.0, 2.0), log_likelihood, data=(x, y), parameters={"beta": ((4,), "real")}, simulate=simulate
    )
