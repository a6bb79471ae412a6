"""Lynx and hare: an ordinary differential equation with log-normal noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vifamily.models import Density
from vifamily.problems._base import Problem
from vifamily.problems._densities import log_normal_log_density, normal_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.registry import register

__all__ = ["log_populations", "lotka_volterra"]

STEPS_PER_YEAR = 10
# Far from the posterior the equation is stiff, and an explicit step can go anywhere. Instead of e^x the slope uses e^c
# sigmoid(x - c) = e^x / (1 + e^(x - c)), which is e^x to the last digit for the values the data allow (x below 6),
# smooth, and bounded by e^40.
LOG_BOUND = 40.0


def log_populations(theta: Tensor, start: Tensor, years: int) -> Tensor:
    r"""Integrate the equation by the classical Runge-Kutta rule, 10 equal steps a year.

    .. math:: u' = (a - b v) u, \qquad v' = (-c + d u) v

    Works on :math:`p = \log(d u)` and :math:`q = \log(b v)`, for which :math:`p' = a - e^q` and :math:`q' = -c + e^p`:
    populations stay positive at any step, and the slope has no product with a parameter, which halves the cost of its
    gradient.

    Args:
        theta: :math:`(a, b, c, d)`, ``(draw, 4)``.
        start: :math:`(u, v)` at time 0, ``(draw, 2)``.
        years: Number of yearly values wanted.

    Returns:
        Logs of both populations after 1, ..., ``years`` years, ``(draw, years, 2)``.
    """
    a, b, c, d = theta.unbind(-1)
    shift = torch.stack([d, b], dim=-1).log() - LOG_BOUND
    step = 1.0 / STEPS_PER_YEAR
    drift = step * torch.stack([a, -c], dim=-1)
    half_drift = 0.5 * drift
    # One matrix product exchanges the two bounded exponentials, gives them their signs and the length of the step.
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=theta.dtype, device=theta.device) * (
        step * math.exp(LOG_BOUND)
    )
    half, sixth = 0.5 * turn, turn / 6

    x, out = start.log() + shift, []
    for number in range(years * STEPS_PER_YEAR):
        middle, end = x + half_drift, x + drift
        m1 = torch.sigmoid(x)
        m2 = torch.sigmoid(torch.addmm(middle, m1, half))
        m3 = torch.sigmoid(torch.addmm(middle, m2, half))
        m4 = torch.sigmoid(torch.addmm(end, m3, turn))
        x = torch.addmm(end, torch.add(m1 + m4, m2 + m3, alpha=2), sixth)
        if (number + 1) % STEPS_PER_YEAR == 0:
            out.append(x)
    return torch.stack(out, dim=-2) - shift.unsqueeze(-2)


@register("problems", "lotka_volterra")
def lotka_volterra() -> Problem:
    r"""Predator and prey over twenty years: an ordinary differential equation with log-normal noise.

    .. math:: a, c \sim N^+(1, 0.5), \quad b, d \sim N^+(0.05, 0.05), \quad \sigma_k \sim \mathrm{LogNormal}(-1, 1),
        \quad z_k \sim \mathrm{LogNormal}(\log 10, 1)

    .. math:: u' = (a - b v) u, \quad v' = (-c + d u) v, \quad (u, v)(0) = z, \quad \log y_{nk} \sim N(\log (u,
        v)_k(t_n),\ \sigma_k)

    also at time 0; :math:`N^+` is the normal law cut to positive values (its constant is left out). Integrated by the
    classical Runge-Kutta rule with 10 steps a year. posteriordb posterior ``hudson_lynx_hare-lotka_volterra``.

    Returns:
        The problem, with parameters ``theta`` (4), ``z_init`` (2) and ``sigma`` (2), published moments and draws.

    Raises:
        ReferenceDataError: If the reference data are not on this machine, or are not yearly.
    """
    data, reference = read_folder(find_folder("posteriordb", "lotka_volterra"))
    first = torch.as_tensor(data["y_init"], dtype=torch.float64)
    later = torch.as_tensor(data["y"], dtype=torch.float64)
    log_observed = torch.cat([first.unsqueeze(0), later]).log()
    log_observed_sum = log_observed.sum()
    years = len(later)
    centre = torch.tensor([1.0, 0.05, 1.0, 0.05], dtype=torch.float64)
    spread = torch.tensor([0.5, 0.05, 0.5, 0.05], dtype=torch.float64)

    def log_prob(values: dict[str, Tensor]) -> Tensor:
        theta, start, sigma = values["theta"], values["z_init"], values["sigma"]
        prior = (
            normal_log_density(theta, centre, spread).sum(-1)
            + log_normal_log_density(sigma, -1.0, 1.0).sum(-1)
            + log_normal_log_density(start, math.log(10.0), 1.0).sum(-1)
        )
        path = torch.cat([start.log().unsqueeze(-2), log_populations(theta, start, years)], dim=-2)
        noise = normal_log_density(log_observed, path, sigma.unsqueeze(-2))
        return prior + noise.sum((-2, -1)) - log_observed_sum

    model = Density(
        log_prob,
        name="lotka_volterra",
        parameters={"theta": ((4,), "positive"), "z_init": ((2,), "positive"), "sigma": ((2,), "positive")},
    )
    return Problem(
        "lotka_volterra",
        model,
        reference,
        "Predator and prey: an ordinary differential equation with eight parameters.",
    )
