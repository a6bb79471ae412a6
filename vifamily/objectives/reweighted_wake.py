"""The wake phase of reweighted wake-sleep: inclusive KL by self-normalised importance sampling from q."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.objectives._base import Estimator, Objective, ValueKind, log_ratio_parts
from vifamily.objectives._reference import check_number
from vifamily.objectives._snis import defensive_draws, effective_share, weighted_draws, weights_apart
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike, Space

__all__ = ["ReweightedWake"]


@register("objectives", "reweighted_wake")
@dataclasses.dataclass(frozen=True)
class ReweightedWake(Objective):
    r"""Wake phase of reweighted wake-sleep: inclusive KL with draws of q, reweighted.

    .. math:: -\nabla_\lambda \mathrm{KL}(p \,\|\, q) = \mathbb{E}_p \nabla_\lambda \log q(z)
              \approx \sum_{k=1}^K \bar w_k \nabla_\lambda \log q(z_k), \qquad
              \bar w_k = \frac{w_k}{\sum_j w_j}, \quad w_k = \frac{p(x, z_k)}{q(z_k)}, \quad z_k \sim q .

    Minimises :math:`\mathrm{KL}(p \,\|\, q)` with draws of q alone. The estimator ``wake`` is the formula above; it
    needs no gradient of the log joint and no reparameterised draws, so discrete latents are fine. ``dreg`` is the
    same mean by way of the draws,
    :math:`\sum_k (\bar w_k - \bar w_k^2)\, \partial \log w_k / \partial z_k\; \partial z_k / \partial \lambda`, with q
    held fixed in :math:`w`: each of its terms vanishes where q equals p, and the rest is seldom larger. Point-estimated
    parameters of the model climb :math:`\sum_k \bar w_k \log p(x, z_k)` (``wake`` only). The value is
    :math:`\sum_k \bar w_k \log(K \bar w_k)`, which tends to :math:`\mathrm{KL}(p \,\|\, q)` with K and cannot exceed
    :math:`\log K`; the term ``ess`` is the effective sample size as a part of K.

    With ``defensive`` a part of the draws comes from q widened about its mean by the factor ``widen``, and all are
    weighed as draws of the mixture of the two: no weight exceeds that of p over the wider law, so q may begin, or
    stay, with lighter tails than p. The value is then measured from the mixture.

    The sleep phase trains a conditional q on data simulated from the model. On a
    :class:`~vifamily.models.Simulator` with a likelihood this objective is the wake phase at each datum, those of
    ``with_observations`` or simulated ones, and ``sleep`` adds the other,

    .. math:: (1 - s) \cdot \text{wake} \; - \; s \, \mathbb{E}_{p(\theta, x)} \log q(\theta \mid x),

    which is ``inclusive_kl``: it needs no weights, so it leads q to where the weights of the wake phase say something,
    and the wake phase fits q to the data that were observed. A q for one data set has no sleep phase.

    **Bias.** Of order 1/K from the division by the sum of weights, towards what the draws already cover; none at
    q = p, and none in the limit of many draws. ``wake`` and ``dreg`` have the same bias.

    **Blind to.** Modes that no draw of q comes near: their weight is not seen at all.

    **Fails when.** The weights degenerate (``ess`` near 1/K): one draw takes all the weight and q shrinks onto it. The
    number of draws needed grows about exponentially with the divergence, so with dimension; above some ten
    coordinates start from another fit (``init=posterior``).

    Source: J. Bornschein and Y. Bengio, "Reweighted wake-sleep" (ICLR 2015), equation 7; T. A. Le et al., "Revisiting
    reweighted wake-sleep" (UAI 2019); ``dreg``: G. Tucker et al., "Doubly reparameterized gradient estimators" (ICLR
    2019), equation 10; ``defensive``: T. Hesterberg, "Weighted average importance sampling and defensive mixture
    distributions" (Technometrics 1995), with the balance heuristic of E. Veach and L. Guibas (SIGGRAPH 1995).

    Args:
        defensive: Part of the draws that comes from the wider law, from 0 (none) to below 1; ``wake`` only, on real
            spaces, for families whose draws carry equal weights.
        widen: Standard deviation of the wider law over that of q, above 1.
        sleep: Part s of the sleep phase in the loss, from 0 (none) to below 1; for simulators.
        estimator: ``"auto"``, ``"dreg"`` or ``"wake"``.

    Raises:
        ConfigError: If a number is out of range, or ``dreg`` is asked for with ``defensive``.

    Example:
        >>> from vifamily import plan
        >>> plan("correlated_normal", "mean_field", "reweighted_wake").estimator
        'dreg'
        >>> plan("correlated_normal", "mean_field", "reweighted_wake(defensive=0.1)").estimator
        'wake'
    """

    defensive: float = 0.0
    widen: float = 3.0
    sleep: float = 0.0
    estimator: str = "auto"

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q, Capability.DRAWS})
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "dreg": Estimator(
            model=frozenset({Capability.SCORE}),
            family=frozenset({Capability.REPARAMETERISED}),
            never_model=frozenset({Capability.LOCAL, Capability.POINT_PARAMETERS}),
            never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}),
            unless_asked=frozenset({Capability.CHEAP_LOG_Q}),
            value_gradient=False,
        ),
        "wake": Estimator(
            never_model=frozenset({Capability.LOCAL}),
            never_family=frozenset({Capability.LOG_Q_BOUND}),
            value_gradient=False,
        ),
    }
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    inclusive: ClassVar[bool] = True
    bias: ClassVar[str] = (
        "the normalised weights of {draws} draws are biased by O(1/draws) towards what the draws cover; msc has no "
        "such bias in the long run"
    )
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 64

    def __post_init__(self) -> None:
        if self.defensive != 0:
            check_number("defensive", self.defensive, 0, 1, "a part of the draws from 0 to below 1")
        if self.sleep != 0:
            check_number("sleep", self.sleep, 0, 1, "a part of the loss from 0 to below 1")
            object.__setattr__(self, "needs_model", type(self).needs_model | {Capability.SIMULATE})
            object.__setattr__(self, "needs_family", type(self).needs_family | {Capability.CONDITIONAL})
        check_number("widen", self.widen, 1, math.inf, "a factor above 1")
        super().__post_init__()
        if not self.defensive:
            return
        if self.estimator == "dreg":
            raise ConfigError(
                "the estimator dreg moves draws of q alone; with defensive= use estimator='wake', or leave it out."
            )
        plain = type(self).estimators["wake"]
        mixed = dataclasses.replace(plain, never_family=plain.never_family | {Capability.WEIGHTED})
        object.__setattr__(self, "estimators", {"wake": mixed})
        object.__setattr__(self, "spaces", frozenset({Space.REAL}))

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the wake phase (see :class:`Objective`)."""
        draw = family(noise)
        if self.estimator == "dreg":
            log_p, _, _ = log_ratio_parts(model, draw, batch)
            moving = log_p - family.log_prob(draw.z, frozen=True)
            ratio = moving.detach()
        elif self.defensive:
            ratio, log_q, log_p = defensive_draws(family, model, draw, batch, share=self.defensive, widen=self.widen)
        else:
            ratio, log_q, log_p = weighted_draws(family, model, draw, batch)
        log_weight = draw.log_weight.detach()
        log_share = torch.log_softmax(ratio + log_weight, -1)
        share = log_share.exp()
        if self.estimator == "dreg":
            surrogate = -((share - share**2) * moving).sum(-1)
        else:
            surrogate = -(share * (log_q + log_p)).sum(-1)
        value, terms = weights_apart(log_share, log_weight), {"ess": effective_share(log_share, log_weight)}
        if not self.sleep:
            return Loss(surrogate, value, terms)
        sleeping = self._sleep(family, batch)
        terms["sleep"] = sleeping.detach()
        awake = 1 - self.sleep
        return Loss(
            awake * surrogate + self.sleep * sleeping, awake * value + self.sleep * terms["sleep"], terms,
        )  # fmt: skip

    def _sleep(self, family: Any, batch: Batch | None) -> Tensor:
        """Minus the mean log density at simulated pairs."""
        if batch is None:
            raise NotAvailableError("the sleep phase is evaluated on simulated pairs: give them as the batch.")
        z, x = batch.data
        out: Tensor = -family.at(x).log_prob(z.unsqueeze(-2)).mean()
        return out
