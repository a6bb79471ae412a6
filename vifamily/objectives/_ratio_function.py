r"""Every gradient estimator of the mean of any function of the log density ratios of K draws.

Let :math:`h(l_1, \ldots, l_K; a)` be a function of the log ratios :math:`l_k = \log p(x, z_k) - \log q(z_k)` and of the
weights :math:`a_k` of the draws, and write :math:`g_k = \partial h / \partial l_k`. The gradient of
:math:`\mathbb{E}\,h` over independent draws :math:`z_k = z(\epsilon_k, \lambda)` is the mean of each of these.

- reparameterised: :math:`\sum_k g_k\, \mathrm{d} l_k / \mathrm{d}\lambda`, and exactly so on given noise.
- doubly reparameterised: the part of :math:`\mathrm{d} l_k / \mathrm{d}\lambda` that comes from the density's
  parameters is :math:`-\nabla_\lambda \log q(z_k)`, and :math:`\mathbb{E}[g_k \nabla_\lambda \log q(z_k)]` is itself
  the path derivative of :math:`g_k`, in which :math:`l_k` alone moves. So the gradient is
  :math:`\sum_k (g_k - \partial g_k / \partial l_k)\, \partial_z l_k\, \partial z_k / \partial\lambda`: no term of it
  survives at q = p. With :math:`h = \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}` these are the weights of
  Tucker et al. (2019) and their kin of other orders, with :math:`h = \frac1K \sum_k f(w_k)` they are
  :math:`-f''(w_k) w_k^2 / K`.
- score function: :math:`\sum_k [(h - h_{-k}) - (g_k - g_{k,-k})] \nabla_\lambda \log q(z_k)`, where :math:`-k` says
  that :math:`l_k` is replaced by the mean of the others, so that what is taken off does not depend on :math:`z_k`.
- enumerated: all states with their weights, both carrying the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.objectives._base import Estimator, log_ratio_parts
from vifamily.types import Batch, Capability, Draw, FamilyLike, Loss, ModelLike

__all__ = ["Derivatives", "RatioFunction", "ratio_estimators", "ratio_loss"]

_PATH = frozenset({Capability.REPARAMETERISED})


@dataclasses.dataclass(frozen=True, slots=True)
class Derivatives:
    """A function of log ratios at a point, ``(...)``, and its derivatives, ``(..., draw)``.

    Attributes:
        value: The function.
        by_ratio: Its derivative in each log ratio.
        by_weight: Its derivative in each log weight, with the weights kept to a sum of one by the family.
        bend: Its second derivative in each log ratio by itself; None where there is none.
    """

    value: Tensor
    by_ratio: Tensor
    by_weight: Tensor
    bend: Tensor | None


RatioFunction = Callable[[Tensor, Tensor], Derivatives]
"""From log ratios and log weights, both ``(..., draw)``, to the function and its derivatives."""


def ratio_estimators(*, bend: bool, additive: bool, model_parameters: bool) -> dict[str, Estimator]:
    """Return the estimators of a function of log ratios, best first.

    Args:
        bend: Whether the function has second derivatives.
        additive: Whether it is a weighted sum of a function of each ratio: then the doubly reparameterised gradient
            holds for draws with weights too.
        model_parameters: Whether the model's own parameters are fitted along; the doubly reparameterised gradient says
            nothing about them.
    """
    never_family = frozenset({Capability.LOG_Q_BOUND}) | (frozenset() if additive else {Capability.WEIGHTED})
    never_model = frozenset({Capability.LOCAL}) | ({Capability.POINT_PARAMETERS} if model_parameters else frozenset())
    out = {"enumerated": Estimator(family=frozenset({Capability.ENUMERATED}))}
    if bend:
        out["dreg"] = Estimator(
            model=frozenset({Capability.SCORE}),
            family=_PATH,
            never_model=never_model,
            never_family=never_family,
            unless_asked=frozenset({Capability.CHEAP_LOG_Q}),
            value_gradient=False,
        )
    out["reparameterised"] = Estimator(model=frozenset({Capability.SCORE}), family=_PATH)
    out["score"] = Estimator(
        family=frozenset({Capability.DRAWS}),
        never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}),
        never_model=frozenset({Capability.LOCAL}),
        value_gradient=False,
    )
    return out


def ratio_loss(
    family: FamilyLike,
    model: ModelLike,
    noise: Tensor,
    batch: Batch | None,
    function: RatioFunction,
    estimator: str,
    terms: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
) -> tuple[Loss, Tensor, Tensor]:
    """Evaluate a function of log ratios, to be minimised, with the chosen estimator.

    Args:
        family: The family.
        model: The model.
        noise: Noise of the draws.
        batch: The data to use, or None for all.
        function: The function; it is called on detached numbers.
        estimator: ``"enumerated"``, ``"dreg"``, ``"reparameterised"`` or ``"score"``.
        terms: From log ratios and log weights to what is reported beside the value.

    Returns:
        The loss, and the detached log ratios and log weights it was computed from.

    Raises:
        ConfigError: If the family gave no density, or there are too few draws.
    """
    draw = family(noise)
    if estimator == "score":
        return _score(family, model, draw, batch, function, terms)
    if draw.local is not None and draw.z.shape[-1] == 0:
        return _per_datum(model, draw, batch, function)
    log_p, local_log_q, _ = log_ratio_parts(model, draw, batch)
    frozen = estimator == "dreg"
    log_q = family.log_prob(draw.z, frozen=True) if frozen else draw.log_q
    if log_q is None:
        raise ConfigError("density ratios need the log density of the draws, and the family gave none.")
    ratio = log_p - (log_q if local_log_q is None else log_q + local_log_q)
    fixed, weight = ratio.detach(), draw.log_weight.detach()
    found = function(fixed, weight)
    by_ratio, by_weight = found.by_ratio, found.by_weight
    if frozen:
        if found.bend is None:
            raise ConfigError("this function has no second derivative, and so no doubly reparameterised gradient.")
        # of the weights, the part that acts through their density has gone into the path derivative too
        by_ratio, by_weight = by_ratio - found.bend, by_weight - by_ratio
    surrogate = (by_ratio * ratio).sum(-1) + (by_weight * draw.log_weight).sum(-1)
    return Loss(_at(found.value, surrogate), found.value, dict(terms(fixed, weight))), fixed, weight


def _at(value: Tensor, surrogate: Tensor) -> Tensor:
    """A number with the value of one and the gradient of the other."""
    return value + (surrogate - surrogate.detach())


def _score(
    family: FamilyLike,
    model: ModelLike,
    draw: Draw,
    batch: Batch | None,
    function: RatioFunction,
    terms: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
) -> tuple[Loss, Tensor, Tensor]:
    num_draws = draw.z.shape[-2]
    if num_draws < 2:
        raise ConfigError("the score-function gradient takes its baseline from the other draws: use at least draws=2.")
    z, weight = draw.z.detach(), draw.log_weight.detach()
    log_p, _, _ = log_ratio_parts(model, Draw(z, None, weight), batch)
    log_q = family.log_prob(z)
    fixed = (log_p - log_q).detach()
    found = function(fixed, weight)
    others = (fixed.sum(-1, keepdim=True) - fixed) / (num_draws - 1)
    swapped = fixed.unsqueeze(-2) + torch.diag_embed(others - fixed)
    without = function(swapped, weight.unsqueeze(-2))
    own = torch.diagonal(without.by_ratio, dim1=-2, dim2=-1)
    signal = (found.value.unsqueeze(-1) - without.value) - (found.by_ratio - own)
    # through z the log joint carries no gradient here; it is kept for the sake of the model's own parameters
    surrogate = (signal * log_q).sum(-1) + (found.by_ratio * log_p).sum(-1)
    return Loss(_at(found.value, surrogate), found.value, dict(terms(fixed, weight))), fixed, weight


def _per_datum(
    model: ModelLike, draw: Draw, batch: Batch | None, function: RatioFunction
) -> tuple[Loss, Tensor, Tensor]:
    """Every latent is local: the function of each datum's ratios, then summed, so minibatches are unbiased."""
    if batch is None or draw.local is None or draw.local_log_q is None:
        raise ConfigError("a loss per datum needs a batch and the local log density.")
    ratio = (model.log_local(draw.z, draw.local, batch) - draw.local_log_q).transpose(-1, -2)
    fixed, weight = ratio.detach(), draw.log_weight.detach().unsqueeze(-2)
    found = function(fixed, weight)
    scale = model.scale(batch)
    value = scale * found.value.sum(-1)
    surrogate = scale * (found.by_ratio * ratio).sum((-2, -1))
    terms = {"loss_per_datum": value / (model.num_data or 1)}
    return Loss(_at(value, surrogate), value, terms), fixed, weight
