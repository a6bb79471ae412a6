"""Conjugate linear regression on the diabetes table of scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import gammaincinv, gammaln
from sklearn.datasets import load_diabetes
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.models import LikelihoodModel
from vifamily.problems._base import NUM_DRAWS, Problem, Reference, exact_draws, indexed
from vifamily.problems._densities import normal_log_density
from vifamily.problems._regression import design, linear
from vifamily.registry import register

__all__ = ["diabetes"]

KNOWN_SIGMA = 0.7
PRIOR_SHAPE, PRIOR_RATE = 2.0, 1.0


@register("problems", "diabetes")
def diabetes(*, noise: str = "known") -> Problem:
    r"""Linear regression of disease progression, conjugate: the posterior and the evidence are exact.

    Ten features and the response are scaled to mean 0 and standard deviation 1, a last column of ones is the intercept.
    With ``noise="known"``

    .. math:: \beta \sim N(0, I), \qquad y_n \sim N(x_n \cdot \beta,\ 0.7)

    and the posterior is normal. With ``noise="unknown"``

    .. math:: \sigma^2 \sim \mathrm{InverseGamma}(2, 1), \qquad \beta \mid \sigma \sim N(0, \sigma I), \qquad y_n \sim
        N(x_n \cdot \beta, \sigma)

    and :math:`(\beta, \sigma^2)` is normal-inverse-gamma; the parameter is :math:`\sigma`. Data: Efron, Hastie,
    Johnstone and Tibshirani, "Least angle regression", Annals of Statistics 32 (2004), as bundled with scikit-learn.
    Formulas: Gelman et al., "Bayesian Data Analysis", 3rd edition, section 14.8.

    Args:
        noise: ``"known"`` or ``"unknown"``.

    Returns:
        The problem, with exact moments and log evidence and independent draws.

    Raises:
        ConfigError: If ``noise`` is neither.

    Example:
        >>> problem = diabetes()
        >>> problem.model.dim, problem.reference.kind, round(problem.reference.log_evidence, 3)
        (11, 'analytic', -499.987)
    """
    if noise not in ("known", "unknown"):
        raise ConfigError(f"noise must be 'known' or 'unknown', got {noise!r}.")
    table = load_diabetes()
    x = design(table.data)
    y = torch.from_numpy((table.target - table.target.mean()) / table.target.std())
    description = f"Conjugate linear regression with 11 weights on 442 data, noise {noise}; the exact answer is known."
    model, reference = (_known if noise == "known" else _unknown)(x, y)
    return Problem("diabetes", model, reference, description)


def _posterior(x: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, Tensor, float, float]:
    """Mean, covariance factor, log determinant of the precision and misfit, for a standard normal prior."""
    precision = torch.eye(x.shape[1], dtype=x.dtype) + x.T @ x / sigma**2
    factor = torch.linalg.cholesky(precision)
    mean = torch.cholesky_solve((x.T @ y / sigma**2).unsqueeze(-1), factor).squeeze(-1)
    # prior and data misfit at the mean: no cancellation, unlike y'y - m'Pm
    misfit = float(((y - x @ mean) / sigma).square().sum() + mean.square().sum())
    covariance_factor = torch.linalg.cholesky(torch.cholesky_inverse(factor))
    return mean, covariance_factor, 2 * float(factor.diagonal().log().sum()), misfit


def _known(x: Tensor, y: Tensor) -> tuple[LikelihoodModel, Reference]:
    num_data, dim = x.shape

    def log_likelihood(theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return normal_log_density(batch[1], theta["beta"] @ batch[0].T, KNOWN_SIGMA)

    def simulate(theta: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        centre = theta["beta"] @ x.T
        return centre + KNOWN_SIGMA * torch.randn(centre.shape, generator=generator, dtype=x.dtype)

    mean, factor, log_det, misfit = _posterior(x, y, KNOWN_SIGMA)
    log_evidence = -0.5 * (num_data * math.log(2 * math.pi * KNOWN_SIGMA**2) + log_det + misfit)

    def draw(source: torch.Generator) -> Tensor:
        return mean + torch.randn(NUM_DRAWS, dim, generator=source, dtype=torch.float64) @ factor.T

    model = LikelihoodModel(
        (0.0, 1.0), log_likelihood, data=(x, y), parameters={"beta": ((dim,), "real")}, simulate=simulate
    )
    sd = factor.square().sum(-1).sqrt()
    return model, Reference(
        "analytic",
        indexed("beta", dim),
        mean.numpy(),
        sd.numpy(),
        exact_draws("diabetes", draw),
        log_evidence,
        "normal posterior; independent draws",
    )


def _unknown(x: Tensor, y: Tensor) -> tuple[LikelihoodModel, Reference]:
    num_data, dim = x.shape

    def log_prior(theta: dict[str, Tensor]) -> Tensor:
        sigma = theta["sigma"]
        # inverse gamma of the variance, times the derivative 2 sigma of the variance
        constant = PRIOR_SHAPE * math.log(PRIOR_RATE) - math.lgamma(PRIOR_SHAPE) + math.log(2)
        prior_sigma = constant - (2 * PRIOR_SHAPE + 1) * sigma.log() - PRIOR_RATE / sigma.square()
        return prior_sigma + normal_log_density(theta["beta"], 0.0, sigma.unsqueeze(-1)).sum(-1)

    mean, factor, log_det, misfit = _posterior(x, y, 1.0)
    shape, rate = PRIOR_SHAPE + 0.5 * num_data, PRIOR_RATE + 0.5 * misfit
    log_evidence = float(
        PRIOR_SHAPE * math.log(PRIOR_RATE)
        - gammaln(PRIOR_SHAPE)
        + gammaln(shape)
        - shape * math.log(rate)
        - 0.5 * (num_data * math.log(2 * math.pi) + log_det)
    )
    sigma_mean = math.exp(gammaln(shape - 0.5) - gammaln(shape)) * math.sqrt(rate)
    variance = rate / (shape - 1)

    def draw(source: torch.Generator) -> Tensor:
        uniform = torch.rand(NUM_DRAWS, generator=source, dtype=torch.float64).numpy()
        sigma = torch.from_numpy(np.sqrt(rate / gammaincinv(shape, uniform))).unsqueeze(-1)
        noise = torch.randn(NUM_DRAWS, dim, generator=source, dtype=torch.float64)
        return torch.cat([mean + sigma * (noise @ factor.T), sigma], dim=-1)

    model = linear(x, y, log_prior, parameters={"beta": ((dim,), "real"), "sigma": "positive"})
    sd = math.sqrt(variance) * factor.square().sum(-1).sqrt()
    return model, Reference(
        "analytic",
        (*indexed("beta", dim), "sigma"),
        np.append(mean.numpy(), sigma_mean),
        np.append(sd.numpy(), math.sqrt(variance - sigma_mean**2)),
        exact_draws("diabetes", draw),
        log_evidence,
        "normal-inverse-gamma posterior; independent draws",
    )
