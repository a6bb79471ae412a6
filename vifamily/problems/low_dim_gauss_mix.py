"""A two-part Gaussian mixture with ordered means."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.models import LikelihoodModel
from vifamily.problems._base import Problem
from vifamily.problems._densities import half_normal_log_density, normal_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.registry import register

__all__ = ["low_dim_gauss_mix"]


@register("problems", "low_dim_gauss_mix")
def low_dim_gauss_mix() -> Problem:
    r"""Means, widths and weight of a two-part mixture, from 1000 values.

    .. math:: \mu_k \sim N(0, 2)\ (\mu_0 < \mu_1), \quad \sigma_k \sim \mathrm{HalfNormal}(2), \quad \theta \sim
        \mathrm{Beta}(5, 5), \quad y_n \sim \theta N(\mu_0, \sigma_0) + (1 - \theta) N(\mu_1, \sigma_1)

    The order removes the label symmetry, so there is one mode. posteriordb posterior
    ``low_dim_gauss_mix-low_dim_gauss_mix``.

    Returns:
        The problem, with parameters ``mu`` (2), ``sigma`` (2) and ``theta``, published moments and draws.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("posteriordb", "low_dim_gauss_mix"))
    values = torch.as_tensor(data["y"], dtype=torch.float64)

    def log_prior(theta: dict[str, Tensor]) -> Tensor:
        weight = theta["theta"]
        beta = 4 * (weight.log() + torch.log1p(-weight))
        return (
            normal_log_density(theta["mu"], 0.0, 2.0).sum(-1)
            + half_normal_log_density(theta["sigma"], 2.0).sum(-1)
            + beta
        )

    def log_likelihood(theta: dict[str, Tensor], batch: Tensor) -> Tensor:
        weight = theta["theta"].unsqueeze(-1)
        parts = [normal_log_density(batch, theta["mu"][..., k, None], theta["sigma"][..., k, None]) for k in range(2)]
        return torch.logaddexp(weight.log() + parts[0], torch.log1p(-weight) + parts[1])

    model = LikelihoodModel(
        log_prior,
        log_likelihood,
        data=values,
        parameters={"mu": ((2,), "ordered"), "sigma": ((2,), "positive"), "theta": "unit_interval"},
    )
    return Problem(
        "low_dim_gauss_mix", model, reference, "Two-part mixture with ordered means: five parameters from 1000 data."
    )
