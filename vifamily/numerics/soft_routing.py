r"""Soft routing of units to members: the value of a power mixture per unit, and who explains it.

For log likelihoods :math:`a_{mn}` of unit n under member m with weights :math:`\pi_m`,

.. math:: \ell_n = -\frac1\alpha \log \sum_m \pi_m e^{\alpha a_{mn}}
          = \min_w \Big\{ -\sum_m w_m a_{mn} + \frac1\alpha \mathrm{KL}(w \,\|\, \pi) \Big\},

attained at the responsibilities :math:`w_{mn} \propto \pi_m e^{\alpha a_{mn}}`; at :math:`\alpha = 0` it is the mean of
the negative log likelihoods. Nothing here knows what a member or a unit is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Routing", "power_value", "route"]

_SMALL = 0.5
"""Size of ``alpha`` times the spread below which the logarithm is taken of a number near one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    r"""How units are routed, and what that costs; all detached but the value.

    Attributes:
        value: :math:`\ell_n`, ``(..., unit)``; differentiable in log likelihoods and log weights.
        responsibility: ``(..., member, unit)``; sums to one over members.
        fit: Negative log likelihood under the responsibilities, ``(..., unit)``.
        cost: The divergence of responsibilities from weights over alpha, ``(..., unit)``; value is fit plus cost.
    """

    value: Tensor
    responsibility: Tensor
    fit: Tensor
    cost: Tensor


def power_value(log_likelihood: Tensor, log_weight: Tensor, alpha: float) -> Tensor:
    r"""Compute :math:`-\frac1\alpha \log \sum_m \pi_m e^{\alpha a_m}` for each unit, without losing digits.

    Where alpha times the spread of a unit's log likelihoods is small, they are centred on their mean and the logarithm
    is taken as ``log1p`` of a mean of ``expm1``, so that the division by alpha does not blow up what rounding left of a
    difference: in float32 the relative error stays near the rounding unit at every alpha. The gradient is exact too,
    :math:`-w_m` in a log likelihood and :math:`(\pi_m - w_m) / \alpha` in a log weight.

    Args:
        log_likelihood: ``(..., member, unit)``; minus infinity is allowed.
        log_weight: Log weights of the members, ``(member,)`` or ``(..., member)``; normalised here.
        alpha: Any finite number from 0; at 0 exactly the mean.

    Returns:
        ``(..., unit)``.

    Example:
        >>> a = torch.tensor([[0.0, -1.0], [-1.0, 0.0]]); u = torch.full((2,), 0.5).log()
        >>> [round(float(power_value(a, u, alpha)[0]), 4) for alpha in (0.0, 1e-6, 1.0)]
        [0.5, 0.5, 0.3799]
    """
    # rounded weights sum to one up to the rounding unit, which the division by alpha would blow up
    log_weight = log_weight.log_softmax(-1)
    weight = log_weight.exp().unsqueeze(-1)
    mean = (weight * log_likelihood).sum(-2)
    if alpha == 0:
        return -mean
    # the value does not depend on the centre, and nor does its gradient: it is a constant of the arithmetic
    centre = mean.detach().unsqueeze(-2)
    power = alpha * (log_likelihood - centre)
    small = (power.detach().abs().amax(-2) < _SMALL).unsqueeze(-2)
    excess = (weight * torch.expm1(torch.where(small, power, torch.zeros_like(power)))).sum(-2)
    near = centre.squeeze(-2) + torch.log1p(excess) / alpha
    top = _best(log_likelihood)
    far = top.squeeze(-2) + torch.logsumexp(log_weight.unsqueeze(-1) + alpha * (log_likelihood - top), -2) / alpha
    return -torch.where(small.squeeze(-2), near, far)


def _best(log_likelihood: Tensor) -> Tensor:
    """Largest log likelihood of each unit, ``(..., 1, unit)``, without a gradient; 0 where none is finite."""
    top = log_likelihood.detach().amax(-2, keepdim=True)
    return torch.where(torch.isfinite(top), top, torch.zeros_like(top))


def route(log_likelihood: Tensor, log_weight: Tensor, alpha: float) -> Routing:
    r"""Value of each unit with its responsibilities and its two parts.

    Args:
        log_likelihood: ``(..., member, unit)``.
        log_weight: Log weights of the members, ``(member,)`` or ``(..., member)``; normalised here.
        alpha: Any finite number from 0.

    Returns:
        The routing; see :class:`Routing`.

    Example:
        >>> a = torch.tensor([[0.0, -8.0], [-8.0, 0.0]]); u = torch.full((2,), 0.5).log()
        >>> routed = route(a, u, 0.5)
        >>> [[round(w, 3) for w in row] for row in routed.responsibility.tolist()]
        [[0.982, 0.018], [0.018, 0.982]]
        >>> bool(torch.allclose(routed.value, routed.fit + routed.cost))
        True
    """
    value = power_value(log_likelihood, log_weight, alpha)
    with torch.no_grad():
        a, log_prior = log_likelihood.detach(), log_weight.detach().log_softmax(-1).unsqueeze(-1)
        # differences first: a product with alpha would round the digits that tell members apart
        responsibility = torch.softmax(log_prior + alpha * (a - _best(a)), -2)
        # a member that says a unit is impossible has no part in it, at no cost
        named = torch.where(responsibility > 0, a, torch.zeros_like(a)) if alpha else a
        fit = -(responsibility * named).sum(-2)
        if alpha == 0:
            return Routing(value, responsibility, fit, torch.zeros_like(fit))
        ratio = alpha * (named + value.detach().unsqueeze(-2))
        # both sum to one, so each term of KL may be made positive: no digits are lost where ratios are near zero
        terms = log_prior.exp() * (ratio * ratio.exp() - torch.expm1(ratio))
        unnamed = torch.where(responsibility > 0, torch.zeros_like(ratio), log_prior.exp())
        cost = (torch.where(responsibility > 0, terms, unnamed)).sum(-2) / alpha
    return Routing(value, responsibility, fit, cost)
