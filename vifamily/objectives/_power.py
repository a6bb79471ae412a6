"""The one implementation behind importance-weighted and Rényi bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.objectives._base import Estimator, log_ratio_parts, weighted_sum
from vifamily.types import Batch, Capability, Draw, FamilyLike, Loss, ModelLike

__all__ = ["ESTIMATORS", "power_bound", "power_loss"]

_PATH = frozenset({Capability.REPARAMETERISED})
_NEAR_ONE = 1e-5

ESTIMATORS = {
    "enumerated": Estimator(family=frozenset({Capability.ENUMERATED})),
    "dreg": Estimator(
        model=frozenset({Capability.SCORE}),
        family=_PATH,
        never_model=frozenset({Capability.LOCAL, Capability.POINT_PARAMETERS}),
        never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}),
        unless_asked=frozenset({Capability.CHEAP_LOG_Q}),
        value_gradient=False,
    ),
    "reparameterised": Estimator(model=frozenset({Capability.SCORE}), family=_PATH),
    "score": Estimator(
        family=frozenset({Capability.DRAWS}),
        never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}),
        never_model=frozenset({Capability.LOCAL}),
        value_gradient=False,
    ),
}
"""Estimators shared by ``iwae``, ``renyi`` and ``cubo``.

``dreg`` is the doubly reparameterised gradient (Tucker et al. 2019) for every finite alpha; it replaces the score
of q by its path, which holds for equally weighted draws and says nothing about point-estimated model parameters,
hence its exclusions. In the limits of infinite alpha it has no counterpart: draws whose ratios nearly tie for the
extreme one are rare, but their coefficients grow as alpha does, and what they contribute does not vanish.
"""


def power_bound(log_ratio: Tensor, log_weight: Tensor, alpha: float) -> Tensor:
    """Rényi bound from log ratios.

    Computes ``log(sum_k exp(log_weight_k) w_k^(1 - alpha)) / (1 - alpha)`` over the last axis, and its limits: the
    mean of ``log w`` at alpha = 1, the largest at minus infinity, the smallest at infinity.

    Args:
        log_ratio: ``log p - log q``, ``(..., draw)``.
        log_weight: Normalised log weights, ``(draw,)`` or ``(..., draw)``.
        alpha: Any real number or plus or minus infinity.

    Returns:
        ``(...)``.

    Example:
        >>> w = torch.tensor([0.0, 1.0]); u = torch.full((2,), 0.5).log()
        >>> [round(float(power_bound(w, u, a)), 4) for a in (-math.inf, 0.0, 1.0, math.inf)]
        [1.0, 0.6201, 0.5, 0.0]
    """
    if alpha == 1:
        return weighted_sum(log_weight, log_ratio)
    if math.isinf(alpha):
        return log_ratio.amin(-1) if alpha > 0 else log_ratio.amax(-1)
    if abs(1 - alpha) < _NEAR_ONE:
        # the same number, but the division by 1 - alpha does not blow up what rounding left of a difference
        mean = weighted_sum(log_weight, log_ratio).unsqueeze(-1)
        excess = weighted_sum(log_weight, torch.expm1((1 - alpha) * (log_ratio - mean)))
        return mean.squeeze(-1) + torch.log1p(excess) / (1 - alpha)
    return torch.logsumexp(log_weight + (1 - alpha) * log_ratio, -1) / (1 - alpha)


def power_loss(
    family: FamilyLike,
    model: ModelLike,
    noise: Tensor,
    batch: Batch | None,
    *,
    alpha: float,
    estimator: str,
    sign: float | None = None,
) -> Loss:
    """Minus the Rényi bound of order ``alpha`` (plus it where it is an upper bound), with the chosen estimator.

    The doubly reparameterised surrogate weights the path derivative of ``log w_k`` by ``alpha v_k + (1 - alpha)
    v_k^2`` with ``v = softmax((1 - alpha) log w)``; alpha = 0 gives the squares of importance-weighted
    autoencoders, alpha = 1 equal weights, that is, sticking the landing. For finite alpha only.

    ``sign`` multiplies the bound: by default minus for lower bounds, which are maximised, and plus for upper ones,
    which are minimised: maximising one would drive q away from a posterior that it contains.
    """
    draw = family(noise)
    if sign is None:
        sign = 1.0 if alpha < 0 else -1.0
    if draw.z.shape[-2] < 2 and alpha != 1:
        raise ConfigError(f"a bound over one draw is the ELBO whatever alpha is (alpha={alpha}): use at least draws=2.")
    if estimator == "score":
        return _score_loss(family, model, draw.z.detach(), draw.log_weight, batch, alpha, sign)
    if draw.local is not None and draw.z.shape[-1] == 0:
        return _per_datum(model, draw.z, draw.local, draw.local_log_q, draw.log_weight, batch, alpha, sign)
    log_p, local_log_q, parts = log_ratio_parts(model, draw, batch)
    frozen = estimator == "dreg"
    log_q = family.log_prob(draw.z, frozen=True) if frozen else draw.log_q
    if log_q is None:
        raise ConfigError("importance-weighted bounds need the log density of the draws, and the family gave none.")
    ratio = log_p - (log_q if local_log_q is None else log_q + local_log_q)
    value = sign * power_bound(ratio, draw.log_weight, alpha)
    terms = _terms(parts, log_p - ratio, draw.log_weight, sign)
    if not frozen:
        return Loss(value, value.detach(), terms)
    v = torch.softmax(draw.log_weight + (1 - alpha) * ratio.detach(), -1)
    coefficient = alpha * v + (1 - alpha) * v**2
    return Loss(sign * (coefficient * ratio).sum(-1), value.detach(), terms)


def _terms(parts: Mapping[str, Tensor], log_q: Tensor, log_weight: Tensor, sign: float) -> dict[str, Tensor]:
    """Means of the parts of the log ratio over draws, with the sign with which they enter the loss."""
    terms = {name: sign * weighted_sum(log_weight, part).detach() for name, part in parts.items()}
    terms["log_q"] = -sign * weighted_sum(log_weight, log_q).detach()
    return terms


def _score_loss(
    family: FamilyLike, model: ModelLike, z: Tensor, log_weight: Tensor, batch: Batch | None, alpha: float, sign: float
) -> Loss:
    """Score-function gradient with the leave-one-out bound as baseline (Mnih and Rezende 2016), for any alpha."""
    log_p, _, parts = log_ratio_parts(model, Draw(z, None, log_weight), batch)
    log_q = family.log_prob(z)
    ratio = log_p - log_q
    bound = power_bound(ratio, log_weight, alpha)
    num_draws = z.shape[-2]
    fixed = ratio.detach()
    others = (fixed.sum(-1, keepdim=True) - fixed) / (num_draws - 1)
    # replace each draw's log ratio by the mean of the others': what the bound would be without news from that draw
    swapped = fixed.unsqueeze(-2) + torch.diag_embed(others - fixed)
    baseline = power_bound(swapped, log_weight.unsqueeze(-2), alpha)
    signal = ((bound.detach().unsqueeze(-1) - baseline) * log_q).sum(-1)
    return Loss(sign * (signal + bound), sign * bound.detach(), _terms(parts, log_q, log_weight, sign))


def _per_datum(
    model: ModelLike,
    z: Tensor,
    local: Tensor,
    local_log_q: Tensor | None,
    log_weight: Tensor,
    batch: Batch | None,
    alpha: float,
    sign: float,
) -> Loss:
    """Every latent is local: one bound per datum, then summed, so minibatches are unbiased."""
    if batch is None or local_log_q is None:
        raise ConfigError("a per-datum bound needs a batch and the local log density.")
    ratio = model.log_local(z, local, batch) - local_log_q
    bounds = power_bound(ratio.transpose(-1, -2), log_weight.unsqueeze(-2), alpha)
    value = sign * model.scale(batch) * bounds.sum(-1)
    return Loss(value, value.detach(), {"loss_per_datum": value.detach() / (model.num_data or 1)})
