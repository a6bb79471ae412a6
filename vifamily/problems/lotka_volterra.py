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
# Far from the posterior the equation is stiff and an explicit step can leave any bound; e^25 is 10^9 times the data.
# Draws that reach it are so unlikely that the value does not matter, only that it stays finite.
HIGHEST_LOG = 25.0


def log_populations(theta: Tensor, start: Tensor, years: int) -> Tensor:
    r"""Integrate the equation by the classical Runge-Kutta rule, 10 equal steps a year.

    .. math:: u' = (a - b v) u, \qquad v' = (-c + d u) v

    Works on the logs, :math:`(\log u)' = a - b v` and :math:`(\log v)' = -c + d u`, which keeps populations positive at
    any step.

    Args:
        theta: :math:`(a, b, c, d)`, ``(draw, 4)``.
        start: :math:`(u, v)` at time 0, ``(draw, 2)``.
        years: Number of yearly values wanted.

    Returns:
        Logs of both populations after 1, ..., ``years`` years, ``(draw, years, 2)``.
    """
    a, b, c, d = theta.unbind(-1)
    # The slope is formed with its two entries exchanged, (log v)' first, because then it needs (u, v) in order; `swap`
    # puts it back and scales in one product.
    rate, coupling = torch.stack([-c, a], dim=-1), torch.stack([d, -b], dim=-1)
    step = 1.0 / STEPS_PER_YEAR
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=theta.dtype, device=theta.device)
    half, full, sixth, third = (swap * (step * weight) for weight in (0.5, 1.0, 1 / 6, 1 / 3))

    def slope(x: Tensor) -> Tensor:
        return torch.addcmul(rate, coupling, x.clamp(max=HIGHEST_LOG).exp())

    x, out = start.log(), []
    for number in range(years * STEPS_PER_YEAR):
        k1 = slope(x)
        k2 = slope(torch.addmm(x, k1, half))
        k3 = slope(torch.addmm(x, k2, half))
        k4 = slope(torch.addmm(x, k3, full))
        x = torch.addmm(torch.addmm(x, k1 + k4, sixth), k2 + k3, third)
        if (number + 1) % STEPS_PER_YEAR == 0:
            out.append(x)
    return torch.stack(out, dim=-2)


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
