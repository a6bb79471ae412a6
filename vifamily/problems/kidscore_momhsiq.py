"""Children's test scores: unscaled linear regression."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vifamily.problems._base import Problem
from vifamily.problems._densities import half_cauchy_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.problems._regression import linear
from vifamily.registry import register

__all__ = ["kidscore_momhsiq"]


@register("problems", "kidscore_momhsiq")
def kidscore_momhsiq() -> Problem:
    r"""Unscaled linear regression of 434 test scores: strongly correlated coefficients of unlike size.

    .. math:: \beta\ \text{flat}, \quad \sigma \sim \mathrm{HalfCauchy}(2.5), \quad
        \mathrm{score}_n \sim N(\beta_0 + \beta_1\, \mathrm{school}_n + \beta_2\, \mathrm{iq}_n,\ \sigma)

    posteriordb posterior ``kidiq-kidscore_momhsiq``.

    Returns:
        The problem, with parameters ``beta`` (3) and ``sigma``, published moments and draws.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("posteriordb", "kidscore_momhsiq"))
    ones = np.ones(len(data["kid_score"]))
    features = torch.from_numpy(np.column_stack([ones, data["mom_hs"], data["mom_iq"]]).astype(np.float64))

    def log_prior(theta: dict[str, Tensor]) -> Tensor:
        return half_cauchy_log_density(theta["sigma"], 2.5)

    model = linear(
        features,
        torch.as_tensor(data["kid_score"], dtype=torch.float64),
        log_prior,
        parameters={"beta": ((3,), "real"), "sigma": "positive"},
    )
    return Problem("kidscore_momhsiq", model, reference, "Unscaled linear regression: a test of conditioning.")
