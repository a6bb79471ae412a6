"""Robust regression on the stack-loss data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vifamily.models import LikelihoodModel
from vifamily.problems._base import Problem
from vifamily.problems._densities import half_normal_log_density, normal_log_density, student_t_log_density
from vifamily.problems._references import stored_reference
from vifamily.problems._regression import design
from vifamily.registry import register

__all__ = ["student_t_regression"]

# K. A. Brownlee, "Statistical Theory and Methodology in Science and Engineering" (1965), p. 454: 21 days of a plant
# that oxidises ammonia.
AIR_FLOW = (80, 80, 75, 62, 62, 62, 62, 62, 58, 58, 58, 58, 58, 58, 50, 50, 50, 50, 50, 56, 70)
WATER_TEMPERATURE = (27, 27, 25, 24, 22, 23, 24, 24, 23, 18, 18, 17, 18, 19, 18, 18, 19, 19, 20, 20, 20)
ACID_CONCENTRATION = (89, 88, 90, 87, 87, 87, 93, 93, 87, 80, 89, 88, 82, 93, 89, 86, 72, 79, 80, 82, 91)
STACK_LOSS = (42, 37, 37, 28, 18, 18, 19, 20, 15, 14, 14, 13, 11, 12, 8, 7, 8, 8, 9, 15, 15)


@register("problems", "student_t_regression")
def student_t_regression() -> Problem:
    r"""Robust regression: 21 days of stack loss, noise with unknown tails.

    .. math:: \beta \sim N(0, 10), \quad \sigma \sim \mathrm{HalfNormal}(5), \quad \nu \sim \mathrm{Gamma}(2, 0.1),
        \quad y_n \sim \mathrm{StudentT}_\nu(x_n \cdot \beta + 17,\ \sigma)

    Three features scaled to mean 0 and standard deviation 1, and a last column of ones; the offset 17 is about the mean
    loss. The second parameter of the gamma law is a rate; its choice is that of Juarez and Steel, "Model-based
    clustering of non-Gaussian panel data", Journal of Business and Economic Statistics 28 (2010). The tail weight
    :math:`\nu` is barely identified and skewed. Data: Brownlee, "Statistical Theory and Methodology in Science and
    Engineering" (1965), p. 454.

    Returns:
        The problem, with parameters ``beta`` (4), ``sigma`` and ``nu``, reference moments and draws from a long Markov
        chain.

    Example:
        >>> student_t_regression().reference.names
        ('beta[0]', 'beta[1]', 'beta[2]', 'beta[3]', 'sigma', 'nu')
    """
    description = "Robust regression with unknown tails on 21 data: skewed, with one parameter barely identified."
    return Problem("student_t_regression", make_model(), stored_reference("student_t_regression"), description)


def make_model() -> LikelihoodModel:
    """Build the model alone, as the making of the reference needs it."""
    x = design(np.array([AIR_FLOW, WATER_TEMPERATURE, ACID_CONCENTRATION], dtype=np.float64).T)
    y = torch.tensor(STACK_LOSS, dtype=torch.float64)

    def log_prior(theta: dict[str, Tensor]) -> Tensor:
        nu = theta["nu"]
        tails = nu.log() - 0.1 * nu + 2 * float(np.log(0.1))
        return (
            normal_log_density(theta["beta"], 0.0, 10.0).sum(-1) + half_normal_log_density(theta["sigma"], 5.0) + tails
        )

    def log_likelihood(theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, observed = batch
        return student_t_log_density(
            observed, theta["nu"].unsqueeze(-1), theta["beta"] @ rows.T + 17.0, theta["sigma"].unsqueeze(-1)
        )

    def simulate(theta: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        centre, nu = theta["beta"] @ x.T + 17.0, theta["nu"].unsqueeze(-1).expand(-1, len(y))
        normal = torch.randn(centre.shape, generator=generator, dtype=centre.dtype)
        # Student's t is normal over the root of an independent gamma with shape and rate nu / 2
        gamma = torch._standard_gamma(0.5 * nu, generator=generator) / (0.5 * nu)
        return centre + theta["sigma"].unsqueeze(-1) * normal / gamma.sqrt()

    return LikelihoodModel(
        log_prior,
        log_likelihood,
        data=(x, y),
        simulate=simulate,
        parameters={"beta": ((4,), "real"), "sigma": "positive", "nu": "positive"},
    )
