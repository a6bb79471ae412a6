"""The unit interval to the real line through a logistic law cut to it, which holds densities with sharp ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["truncated_logistic_inverse", "truncated_logistic_score"]

_LEAST_LOG = -700.0
"""Logarithm of the least probability, and the largest logit, that are told from zero and infinity."""


def truncated_logistic_score(z: Tensor, loc: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    r"""Normal score of a number ``t`` of the unit interval under a logistic law cut to that interval.

    With ``F(r) = 1 / (1 + exp(-r))``, ``a = -loc / width`` and ``b = (1 - loc) / width``,

    .. math:: v = \Phi^{-1}\!\left(\frac{F((t - \mathrm{loc}) / \mathrm{width}) - F(a)}{F(b) - F(a)}\right),
              \qquad t = \frac{1}{1 + e^{-z}} .

    Where ``v`` is standard normal, ``t`` has the logistic density, renormalised between 0 and 1: finite and positive up
    to both ends. Far from them the map is ``v = Phi^{-1}(F((t - loc) / width))``, nearly linear. Both tails are
    computed from logarithms, so that the map stays exact where ``loc`` lies far outside the interval.

    Args:
        z: Logits of ``t``, of any shape.
        loc: Location of the logistic law in the unit of ``t``; broadcasts with ``z``, any number.
        width: Its width, positive; the standard deviation of the law before it is cut is ``1.81 width``.

    Returns:
        ``v`` and ``log dv/dz``, of the shape of ``z`` and its dtype; the arithmetic inside is in float64.

    Example:
        >>> z = torch.tensor([-2.0, 0.0, 3.0])
        >>> v, _ = truncated_logistic_score(z, torch.tensor(0.5), torch.tensor(0.1))
        >>> back = truncated_logistic_inverse(v, torch.tensor(0.5), torch.tensor(0.1))[0]
        >>> bool((back - z).abs().max() < 1e-5)
        True
    """
    dtype = z.dtype
    z, loc, width = z.double().clamp(_LEAST_LOG, -_LEAST_LOG), loc.double(), width.double()
    a, b, inside = -loc / width, (1 - loc) / width, _log_one_minus_exp(1 / width)
    r = (z.sigmoid() - loc) / width
    # the distances to both ends, in units of the width, each exact to its own last digit
    low, high = z.sigmoid() / width, (-z).sigmoid() / width
    log_below = logsigmoid(r) - logsigmoid(b) + _log_one_minus_exp(low) - inside
    log_above = logsigmoid(-r) - logsigmoid(-a) + _log_one_minus_exp(high) - inside
    in_lower = log_below < log_above
    tail = torch.special.ndtri(torch.where(in_lower, log_below, log_above).clamp_min(_LEAST_LOG).exp())
    v = torch.where(in_lower, tail, -tail)
    log_mass = logsigmoid(b) + logsigmoid(-a) + inside
    log_density = logsigmoid(r) + logsigmoid(-r) - log_mass - width.log()
    log_jacobian = log_density + logsigmoid(z) + logsigmoid(-z) + 0.5 * v.square() + 0.5 * math.log(2 * math.pi)
    return v.to(dtype), log_jacobian.to(dtype)


def truncated_logistic_inverse(v: Tensor, loc: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``z`` from normal scores: the inverse of :func:`truncated_logistic_score`, in closed form.

    Args:
        v: Normal scores, of any shape.
        loc: As there.
        width: As there.

    Returns:
        ``z`` and ``log dv/dz`` there, of the shape and dtype of ``v``.

    Example:
        >>> z, _ = truncated_logistic_inverse(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(2.0), torch.tensor(0.1))
        >>> z.sigmoid().numpy().round(3)  # a law that lies above the interval crowds at its upper end
        array([0.816, 0.931, 0.983], dtype=float32)
    """
    dtype = v.dtype
    v, loc, width = v.double(), loc.double(), width.double()
    a, b, inside = -loc / width, (1 - loc) / width, _log_one_minus_exp(1 / width)
    lower = v < 0
    zero = torch.zeros_like(v)
    # the nearer tail is inverted for the distance to its own end; the other distance is what is left
    below = torch.special.log_ndtr(torch.where(lower, v, zero)) + logsigmoid(b) + inside
    above = torch.special.log_ndtr(torch.where(lower, zero, -v)) + logsigmoid(-a) + inside
    low = torch.logaddexp(below - a, zero) - _log_one_minus_exp(-below)
    high = torch.logaddexp(above + b, zero) - _log_one_minus_exp(-above)
    least = torch.finfo(torch.float64).tiny
    whole = 1 / width
    first = torch.where(lower, low, whole - high).clamp_min(least)
    second = torch.where(lower, whole - low, high).clamp_min(least)
    z = first.log() - second.log()
    return z.to(dtype), truncated_logistic_score(z, loc, width)[1].to(dtype)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """``log(1 - exp(-x))`` for positive ``x``, to the last digit for small and for large ones."""
    small = x < math.log(2)
    by_difference = torch.log(-torch.expm1(-torch.where(small, x, 1.0)))
    by_product = torch.log1p(-(-torch.where(small, 1.0, x)).exp())
    return torch.where(small, by_difference, by_product)
