"""Eight schools, the smallest hierarchy."""

from __future__ import annotations

import numpy as np
import torch

from vifamily.problems._base import Problem
from vifamily.problems._eight_schools import eight_schools_model, eight_schools_reference
from vifamily.registry import register

__all__ = ["eight_schools"]

# Estimated effects of coaching and their standard errors: D. B. Rubin, "Estimation in parallel randomized experiments",
# Journal of Educational Statistics 6 (1981).
EFFECT = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERROR = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@register("problems", "eight_schools")
def eight_schools(*, parameterisation: str = "noncentered") -> Problem:
    r"""Eight schools: effects of coaching that share a mean and a spread.

    .. math:: \tau \sim \mathrm{HalfCauchy}(5), \quad \mu \sim N(0, 5), \quad \theta_j \sim N(\mu, \tau), \quad y_j \sim
        N(\theta_j, \sigma_j)

    ``"noncentered"`` works in :math:`(\eta, \mu, \tau)` with :math:`\theta_j = \mu + \tau \eta_j` and is easy;
    ``"centered"`` works in :math:`(\theta, \mu, \tau)`, a funnel that is hard. Both have the same posterior of
    :math:`(\theta, \mu, \tau)`, which is known exactly: all but :math:`\tau` is integrated in closed form. Data: Rubin,
    "Estimation in parallel randomized experiments", Journal of Educational Statistics 6 (1981).

    Args:
        parameterisation: ``"noncentered"`` or ``"centered"``.

    Returns:
        The problem, with moments and log evidence by quadrature and independent draws.

    Raises:
        ConfigError: If the parameterisation is neither.

    Example:
        >>> problem = eight_schools()
        >>> problem.model.dim, problem.reference.names[-1], round(float(problem.reference.mean[-1]), 3)
        (10, 'tau', 3.598)
    """
    effect, error = np.array(EFFECT), np.array(ERROR)
    model, quantities = eight_schools_model(torch.from_numpy(effect), torch.from_numpy(error), parameterisation)
    how = "easy coordinates" if parameterisation == "noncentered" else "a funnel"
    return Problem(
        "eight_schools",
        model,
        eight_schools_reference(effect, error),
        f"Hierarchy of eight effects with unknown spread, {parameterisation}: {how}.",
        quantities,
    )
