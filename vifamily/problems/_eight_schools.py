"""The hierarchy of eight schools in two parameterisations, and its exact posterior by one-dimensional quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.models import LikelihoodModel
from vifamily.problems._base import NUM_DRAWS, Reference, exact_draws, indexed
from vifamily.problems._densities import half_cauchy_log_density, normal_log_density

__all__ = ["eight_schools_model", "eight_schools_reference"]

MU_SD, TAU_SCALE = 5.0, 5.0


def eight_schools_model(
    effect: Tensor, error: Tensor, parameterisation: str
) -> tuple[LikelihoodModel, Callable[[dict[str, Tensor]], Tensor]]:
    """Build the model and the map from its parameters to the columns ``theta[0], ..., mu, tau``.

    Args:
        effect: Estimated effects, ``(school,)``.
        error: Their known standard errors, ``(school,)``.
        parameterisation: ``"noncentered"`` or ``"centered"``.

    Raises:
        ConfigError: If the parameterisation is neither.
    """
    if parameterisation not in ("noncentered", "centered"):
        raise ConfigError(f"parameterisation must be 'noncentered' or 'centered', got {parameterisation!r}.")
    centered = parameterisation == "centered"
    name = "theta" if centered else "eta"
    size = len(effect)

    def schools(values: dict[str, Tensor]) -> Tensor:
        if centered:
            return values["theta"]
        return values["mu"].unsqueeze(-1) + values["tau"].unsqueeze(-1) * values["eta"]

    def log_prior(values: dict[str, Tensor]) -> Tensor:
        mu, tau = values["mu"], values["tau"]
        top = normal_log_density(mu, 0.0, MU_SD) + half_cauchy_log_density(tau, TAU_SCALE)
        if centered:
            return top + normal_log_density(values["theta"], mu.unsqueeze(-1), tau.unsqueeze(-1)).sum(-1)
        return top + normal_log_density(values["eta"]).sum(-1)

    def log_likelihood(values: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return normal_log_density(batch["y"], schools(values)[..., batch["school"]], batch["sigma"])

    def quantities(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([schools(values), values["mu"].unsqueeze(-1), values["tau"].unsqueeze(-1)], dim=-1)

    def sample_prior(num_draws: int, generator: torch.Generator) -> dict[str, Tensor]:
        normal = torch.randn(num_draws, size + 1, generator=generator, dtype=effect.dtype)
        uniform = torch.rand(num_draws, generator=generator, dtype=effect.dtype).clamp(1e-6, 1 - 1e-6)
        mu, tau = MU_SD * normal[:, 0], TAU_SCALE * torch.tan(0.5 * math.pi * uniform)
        eta = normal[:, 1:]
        return {name: mu.unsqueeze(-1) + tau.unsqueeze(-1) * eta if centered else eta, "mu": mu, "tau": tau}

    def simulate(values: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        centre = schools(values)
        return {"y": centre + error * torch.randn(centre.shape, generator=generator, dtype=centre.dtype)}

    model = LikelihoodModel(
        log_prior,
        log_likelihood,
        data={"school": torch.arange(size), "y": effect, "sigma": error},
        parameters={name: ((size,), "real"), "mu": "real", "tau": "positive"},
        sample_prior=sample_prior,
        simulate=simulate,
    )
    return model, quantities


def eight_schools_reference(effect: np.ndarray, error: np.ndarray) -> Reference:
    r"""Integrate the posterior over :math:`\log\tau`; given :math:`\tau` everything else is normal, in closed form.

    With :math:`v_j = \sigma_j^2 + \tau^2`, the marginal of the data is
    :math:`N(0,\ \mathrm{diag}(v) + s_\mu^2 \mathbf 1 \mathbf 1^T)`, the one of :math:`\mu` has precision
    :math:`s_\mu^{-2} + \sum_j v_j^{-1}`, and :math:`\theta_j` shrinks to :math:`\mu` by the factor
    :math:`\sigma_j^2 / v_j`.
    """
    # The trapezoid rule converges faster than any power here: the integrand is analytic and vanishes at both ends.
    grid = np.linspace(-30.0, 12.0, 8001)
    tau = np.exp(grid)[:, None]
    variance = error**2 + tau**2
    precision = MU_SD**-2 + (1 / variance).sum(1)
    mu_mean = (effect / variance).sum(1) / precision
    log_data = -0.5 * (
        len(effect) * math.log(2 * math.pi)
        + np.log(variance).sum(1)
        + np.log(precision * MU_SD**2)
        + (effect**2 / variance).sum(1)
        - precision * mu_mean**2
    )
    log_mass = log_data + math.log(2 / (math.pi * TAU_SCALE)) - np.log1p((tau[:, 0] / TAU_SCALE) ** 2) + grid
    log_evidence = float(logsumexp(log_mass) + math.log(grid[1] - grid[0]))
    weight = np.exp(log_mass - logsumexp(log_mass))

    keep = tau**2 / variance  # share of the school's own estimate
    given_mean = np.concatenate([keep * effect + (1 - keep) * mu_mean[:, None], mu_mean[:, None], tau], axis=1)
    given_variance = np.concatenate(
        [error**2 * keep + (1 - keep) ** 2 / precision[:, None], 1 / precision[:, None], np.zeros_like(tau)], axis=1
    )
    mean = weight @ given_mean
    sd = np.sqrt(weight @ (given_variance + (given_mean - mean) ** 2))

    def draw(source: torch.Generator) -> Tensor:
        noise = torch.randn(NUM_DRAWS, len(effect) + 1, generator=source, dtype=torch.float64).numpy()
        uniform = torch.rand(NUM_DRAWS, generator=source, dtype=torch.float64).numpy()
        middle = np.cumsum(weight) - 0.5 * weight
        t = np.exp(np.interp(uniform, middle, grid))[:, None]
        v = error**2 + t**2
        p = MU_SD**-2 + (1 / v).sum(1)
        mu = ((effect / v).sum(1) / p + noise[:, 0] / np.sqrt(p))[:, None]
        share = t**2 / v
        theta = mu + share * (effect - mu) + error * np.sqrt(share) * noise[:, 1:]
        return torch.from_numpy(np.concatenate([theta, mu, t], axis=1))

    return Reference(
        "quadrature",
        (*indexed("theta", len(effect)), "mu", "tau"),
        mean,
        sd,
        exact_draws("eight_schools", draw),
        log_evidence,
        "all but tau integrated in closed form, log tau by the trapezoid rule on 8001 points; independent draws",
    )
