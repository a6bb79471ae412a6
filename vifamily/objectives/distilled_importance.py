"""Distilled importance sampling: inclusive KL to a target tempered until the weights are good enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.objectives._base import Estimator, Objective, ValueKind
from vifamily.objectives._reference import check_number
from vifamily.objectives._snis import effective_share, weighted_draws, weights_apart
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["DistilledImportance"]

_HALVINGS = 30


@register("objectives", "distilled_importance")
@dataclasses.dataclass(frozen=True)
class DistilledImportance(Objective):
    r"""Distilled importance sampling: inclusive KL by way of targets that q can reach.

    .. math:: p_\varepsilon(z) \propto p(x, z)^{1 - \varepsilon}\, r(z)^{\varepsilon}, \qquad
              \bar w_k \propto p_\varepsilon(z_k) / q(z_k), \qquad
              \text{step} = \sum_{k=1}^K \bar w_k \nabla_\lambda \log q(z_k), \quad z_k \sim q .

    Minimises :math:`\mathrm{KL}(p_\varepsilon \,\|\, q)` with :math:`\varepsilon` as small as an effective sample size
    of ``ess`` times the draws allows, found at each step by bisection; where q comes near p it is zero, and the target
    p itself. The law r that the target is tempered towards is q as it stands (``towards="family"``), which always has
    such an :math:`\varepsilon`, or the prior (``towards="prior"``), as published, where a q far from both may have
    none and the weights are then those of the prior. Weights above ``clip`` times their mean are cut to it; what was
    cut goes to all draws alike. Needs neither reparameterised draws nor a gradient of the log joint. The value is
    :math:`\sum_k \bar w_k \log(K \bar w_k)` with the weights of p itself; the terms give :math:`\varepsilon` and the
    effective sample size as a part of K, also of p itself.

    **Bias.** Of order 1/K from the normalised weights, as in ``reweighted_wake``, and towards smaller spread from
    cutting. Where a family never comes near enough to p, :math:`\varepsilon` stays positive: with
    ``towards="family"`` the fit then ends between the two KL divergences, at the optimum of the Rényi divergence
    :math:`D_\varepsilon(q \,\|\, p)`, since there q has the moments of :math:`p^{1-\varepsilon} q^\varepsilon`.

    **Blind to.** Modes that no draw comes near.

    **Fails when.** The term ``epsilon`` does not go to zero: the family is too far from the posterior for importance
    weights, in many dimensions always, and what is fitted is not the inclusive divergence.

    Source: D. Prangle and C. Viscardi, "Distilled importance sampling for simulation based inference" (2019), algorithm
    1; the truncation is that of E. L. Ionides, "Truncated importance sampling" (2008), on normalised weights.

    Args:
        ess: Effective sample size to hold, as a part of the draws.
        towards: ``"family"`` or ``"prior"``, the law at the other end of the tempering.
        clip: Largest weight as a multiple of their mean, or None.

    Raises:
        ConfigError: If a number is out of range or ``towards`` is neither.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "distilled_importance(ess=0.3)")
        DistilledImportance(ess=0.3, towards='family', clip=None, estimator='auto')
    """

    ess: float = 0.5
    towards: str = "family"
    clip: float | None = None
    estimator: str = "auto"

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_JOINT})
    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q, Capability.DRAWS})
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "weights": Estimator(
            never_model=frozenset({Capability.LOCAL}),
            never_family=frozenset({Capability.LOG_Q_BOUND}),
            value_gradient=False,
        )
    }
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    bias: ClassVar[str] = (
        "the normalised weights of {draws} draws are biased by O(1/draws), and while the term epsilon is not 0 the "
        "target is a tempered one"
    )
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 64

    def __post_init__(self) -> None:
        check_number("ess", self.ess, 0, 1, "a part of the draws, between 0 and 1")
        if self.clip is not None:
            check_number("clip", self.clip, 1, math.inf, "a multiple of the mean weight above 1, or None")
        if self.towards not in ("family", "prior"):
            raise ConfigError(f"towards must be 'family' or 'prior', got {self.towards!r}.")
        super().__post_init__()
        if self.towards == "prior":
            object.__setattr__(self, "needs_model", frozenset({Capability.LOG_JOINT, Capability.PRIOR}))

    @property
    def renyi_order(self) -> tuple[float, float] | None:
        """Its answers lie between those of the two KL divergences where the tempering is towards q."""
        return (0.0, 1.0) if self.towards == "family" else None

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate a step towards the tempered target (see :class:`Objective`)."""
        draw = family(noise)
        ratio, log_q, _ = weighted_draws(family, model, draw, batch)
        log_weight = draw.log_weight.detach()
        other = torch.zeros_like(ratio)
        if self.towards == "prior":
            other = (model.log_prior(draw.z.detach()) - log_q).detach()
        epsilon = _temper(ratio, other, log_weight, self.ess)
        log_share = _tempered(ratio, other, log_weight, epsilon)
        share = log_share.exp()
        if self.clip is not None:
            cut = (log_share - log_weight).clamp_max(math.log(self.clip)).exp() * log_weight.exp()
            share = cut + (1 - cut.sum(-1, keepdim=True)) * log_weight.exp()
        own = torch.log_softmax(ratio + log_weight, -1)
        terms = {
            "epsilon": epsilon,
            "ess": effective_share(log_share, log_weight),
            "ess_untempered": effective_share(own, log_weight),
        }
        return Loss(-(share * log_q).sum(-1), weights_apart(own, log_weight), terms)


def _tempered(ratio: Tensor, other: Tensor, log_weight: Tensor, epsilon: Tensor) -> Tensor:
    power = epsilon.unsqueeze(-1)
    # 0 times a log ratio of minus infinity would be no number
    mixed = torch.where(power < 1, (1 - power) * ratio, torch.zeros_like(ratio)) + power * other
    return torch.log_softmax(mixed + log_weight, -1)


def _temper(ratio: Tensor, other: Tensor, log_weight: Tensor, goal: float) -> Tensor:
    """Smallest power at which the effective sample size reaches its goal, ``(..., draw) -> (...)``; 1 if none does."""

    def enough(power: Tensor) -> Tensor:
        return effective_share(_tempered(ratio, other, log_weight, power), log_weight) >= goal

    low = torch.zeros_like(ratio[..., 0])
    high = torch.ones_like(low)
    at_once = enough(low)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        good = enough(middle)
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    return torch.where(at_once, torch.zeros_like(high), high)
