"""Volatility that remembers: GARCH(1, 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.models import Density
from vifamily.problems._base import Problem
from vifamily.problems._densities import normal_log_density
from vifamily.problems._folder import find_folder, read_folder
from vifamily.registry import register

__all__ = ["garch11", "linear_recursion"]


def linear_recursion(first: Tensor, drive: Tensor, decay: Tensor) -> Tensor:
    r"""Solve a linear recursion for all times at once.

    .. math:: h_0 = \mathrm{first}, \qquad h_t = \mathrm{drive}_t + \mathrm{decay}\, h_{t-1}

    Doubles the memory at every pass, :math:`h \leftarrow h + \mathrm{decay}^{2^k} \mathrm{shift}_{2^k} h`, so that T
    steps take :math:`\log_2 T` passes of plain tensor operations instead of a loop of T.

    Args:
        first: ``(draw,)``.
        drive: Inputs of steps 1 to T - 1, ``(draw, T - 1)``.
        decay: ``(draw,)``.

    Returns:
        ``(draw, T)``.

    Example:
        >>> import torch
        >>> linear_recursion(torch.tensor([1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([0.5]))
        tensor([[1.0000, 1.5000, 1.7500]])
    """
    h = torch.cat([first.unsqueeze(-1), drive], dim=-1)
    power, step, length = decay.unsqueeze(-1), 1, h.shape[-1]
    while step < length:
        h = torch.cat([h[..., :step], h[..., step:] + power * h[..., :-step]], dim=-1)
        power, step = power.square(), 2 * step
    return h


@register("problems", "garch11")
def garch11() -> Problem:
    r"""GARCH(1, 1) on 200 returns: a triangular support and a skewed posterior.

    .. math:: h_1 = \sigma_1^2, \qquad h_t = \alpha_0 + \alpha_1 (y_{t-1} - \mu)^2 + \beta_1 h_{t-1}, \qquad y_t \sim
        N(\mu, \sqrt{h_t})

    with a flat prior on :math:`\alpha_0 > 0`, :math:`\alpha_1 \in (0, 1)`, :math:`\beta_1 \in (0, 1 - \alpha_1)`. The
    parameter used is ``fraction`` :math:`= \beta_1 / (1 - \alpha_1) \in (0, 1)`, whose Jacobian :math:`1 - \alpha_1` is
    part of the density. posteriordb posterior ``garch-garch11``.

    Returns:
        The problem, with parameters ``mu``, ``alpha0``, ``alpha1`` and ``fraction``; published moments and draws of
        ``mu, alpha0, alpha1, beta1``.

    Raises:
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("posteriordb", "garch11"))
    returns = torch.as_tensor(data["y"], dtype=torch.float64)
    first_variance = float(data["sigma1"]) ** 2

    def beta1(theta: dict[str, Tensor]) -> Tensor:
        return (1 - theta["alpha1"]) * theta["fraction"]

    def log_prob(theta: dict[str, Tensor]) -> Tensor:
        residual = returns - theta["mu"].unsqueeze(-1)
        drive = theta["alpha0"].unsqueeze(-1) + theta["alpha1"].unsqueeze(-1) * residual[..., :-1].square()
        first = torch.full_like(theta["mu"], first_variance)
        variance = linear_recursion(first, drive, beta1(theta))
        return normal_log_density(residual, 0.0, variance.sqrt()).sum(-1) + torch.log1p(-theta["alpha1"])

    def quantities(theta: dict[str, Tensor]) -> Tensor:
        return torch.stack([theta["mu"], theta["alpha0"], theta["alpha1"], beta1(theta)], dim=-1)

    model = Density(
        log_prob,
        name="garch11",
        parameters={"mu": "real", "alpha0": "positive", "alpha1": "unit_interval", "fraction": "unit_interval"},
    )
    return Problem("garch11", model, reference, "GARCH(1, 1): triangular support, skewed.", quantities)
