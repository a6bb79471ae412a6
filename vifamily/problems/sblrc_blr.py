"""Bayesian linear regression with a correlated design."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.problems._base import Problem
from vifamily.problems._densities import half_normal_log_density, normal_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.problems._regression import linear
from vifamily.registry import register

__all__ = ["sblrc_blr"]


@register("problems", "sblrc_blr")
def sblrc_blr() -> Problem:
    r"""Linear regression on 100 data with five correlated features.

    .. math:: \beta \sim N(0, 10), \quad \sigma \sim \mathrm{HalfNormal}(10), \quad y_n \sim N(x_n \cdot \beta,\ \sigma)

    posteriordb posterior ``sblrc-blr``. The response is two orders of magnitude larger than the posterior's width.

    Returns:
        The problem, with parameters ``beta`` (5) and ``sigma``, published moments and draws.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("posteriordb", "sblrc_blr"))
    features, response = (torch.as_tensor(data[key], dtype=torch.float64) for key in ("X", "y"))

    def log_prior(theta: dict[str, Tensor]) -> Tensor:
        return normal_log_density(theta["beta"], 0.0, 10.0).sum(-1) + half_normal_log_density(theta["sigma"], 10.0)

    model = linear(
        features, response, log_prior, parameters={"beta": ((features.shape[1],), "real"), "sigma": "positive"}
    )
    return Problem("sblrc_blr", model, reference, "Linear regression with a correlated design.")
