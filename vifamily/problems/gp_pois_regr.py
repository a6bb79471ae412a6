"""Poisson counts with a latent Gaussian process."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vifamily.models import LikelihoodModel
from vifamily.problems._base import Problem
from vifamily.problems._densities import bounded_exp, half_normal_log_density, normal_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.registry import register

__all__ = ["gp_pois_regr"]

JITTER = 1e-10
# The factor is taken of K / alpha^2, so the jitter becomes JITTER / alpha^2; below this it would drown in rounding and
# the factorisation fail. It is reached at alpha = 31, fifteen prior standard deviations out.
LEAST_JITTER = 1e-13


@register("problems", "gp_pois_regr")
def gp_pois_regr() -> Problem:
    r"""Eleven counts whose log rate is a Gaussian process with unknown length scale and size.

    .. math:: \rho \sim \mathrm{Gamma}(25, 4), \quad \alpha \sim \mathrm{HalfNormal}(2), \quad
        K_{ij} = \alpha^2 e^{-(x_i - x_j)^2 / 2\rho^2} + 10^{-10} \delta_{ij}, \quad f = \mathrm{chol}(K)\, z,\ z \sim
        N(0, I), \quad k_i \sim \mathrm{Poisson}(e^{f_i})

    The second parameter of the gamma law is a rate. Works in :math:`(\rho, \alpha, z)`. posteriordb posterior
    ``gp_pois_regr-gp_pois_regr``.

    Returns:
        The problem, with parameters ``rho``, ``alpha`` and ``z`` (11); published moments and draws of
        ``rho, alpha, f``.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("posteriordb", "gp_pois_regr"))
    inputs, counts = (torch.as_tensor(data[key], dtype=torch.float64) for key in ("x", "k"))
    size = len(inputs)
    half_squares = 0.5 * (inputs[:, None] - inputs).square()
    identity = torch.eye(size, dtype=torch.float64)

    def latent(theta: dict[str, Tensor]) -> Tensor:
        rho, alpha = theta["rho"][..., None, None], theta["alpha"][..., None, None]
        jitter = (JITTER / alpha.square()).clamp(min=LEAST_JITTER)
        factor = torch.linalg.cholesky((-half_squares / rho.square()).exp() + jitter * identity)
        shape: Tensor = (factor @ theta["z"].unsqueeze(-1)).squeeze(-1)
        return theta["alpha"].unsqueeze(-1) * shape

    def log_prior(theta: dict[str, Tensor]) -> Tensor:
        rho = theta["rho"]
        gamma = 24 * rho.log() - 4 * rho + 25 * math.log(4) - math.lgamma(25)
        return gamma + half_normal_log_density(theta["alpha"], 2.0) + normal_log_density(theta["z"]).sum(-1)

    def log_likelihood(theta: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        f = latent(theta)[..., batch["point"]]
        return batch["k"] * f - bounded_exp(f) - torch.lgamma(batch["k"] + 1)

    def quantities(theta: dict[str, Tensor]) -> Tensor:
        return torch.cat([theta["rho"].unsqueeze(-1), theta["alpha"].unsqueeze(-1), latent(theta)], dim=-1)

    model = LikelihoodModel(
        log_prior,
        log_likelihood,
        data={"point": torch.arange(size), "k": counts},
        parameters={"rho": "positive", "alpha": "positive", "z": ((size,), "real")},
    )
    return Problem(
        "gp_pois_regr",
        model,
        reference,
        "Latent Gaussian process under Poisson counts: a near-singular covariance.",
        quantities,
    )
