"""Autoregression of order five."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vifamily.problems._base import Problem
from vifamily.problems._densities import half_cauchy_log_density, normal_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.problems._regression import linear
from vifamily.registry import register

__all__ = ["ark"]


@register("problems", "ark")
def ark() -> Problem:
    r"""Autoregression of order five on a series of 200: almost Gaussian, strongly correlated.

    .. math:: \alpha \sim N(0, 10), \quad \beta_k \sim N(0, 10), \quad \sigma \sim \mathrm{HalfCauchy}(2.5), \quad
        y_t \sim N(\alpha + \textstyle\sum_{k=1}^5 \beta_k\, y_{t-k},\ \sigma), \quad t > 5

    The first five values are conditioned on. posteriordb posterior ``arK-arK``.

    Returns:
        The problem, with parameters ``alpha``, ``beta`` (5) and ``sigma``, published moments and draws.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("posteriordb", "arK"))
    order, series = int(data["K"]), np.asarray(data["y"], dtype=np.float64)
    lags = np.column_stack([series[order - k : len(series) - k] for k in range(1, order + 1)])

    def log_prior(theta: dict[str, Tensor]) -> Tensor:
        normal = normal_log_density(theta["alpha"], 0.0, 10.0) + normal_log_density(theta["beta"], 0.0, 10.0).sum(-1)
        return normal + half_cauchy_log_density(theta["sigma"], 2.5)

    def location(theta: dict[str, Tensor], rows: Tensor) -> Tensor:
        return theta["alpha"].unsqueeze(-1) + theta["beta"] @ rows.T

    model = linear(
        torch.from_numpy(lags),
        torch.from_numpy(series[order:]),
        log_prior,
        location=location,
        parameters={"alpha": "real", "beta": ((order,), "real"), "sigma": "positive"},
    )
    return Problem("ark", model, reference, "Autoregression of order five: strong correlations, otherwise Gaussian.")
