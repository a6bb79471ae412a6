"""Black-box alpha energies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.soft_routing import Routing, route
from vifamily.objectives._base import Estimator, Objective, ValueKind
from vifamily.objectives._per_datum import check_order, density, prior_part
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["BbAlpha"]

_NAME = "bb_alpha"
_PATH = frozenset({Capability.REPARAMETERISED})
_SCORE = frozenset({Capability.SCORE})
_ESTIMATORS = {
    "enumerated": Estimator(family=frozenset({Capability.ENUMERATED, Capability.LOG_Q})),
    "entropy": Estimator(model=_SCORE, family=_PATH | {Capability.ENTROPY}),
    "reparameterised": Estimator(model=_SCORE, family=_PATH),
}


@register("objectives", _NAME)
@dataclasses.dataclass(frozen=True)
class BbAlpha(Objective):
    r"""Black-box alpha energy: power expectation propagation with one tied factor per datum, as a single loss.

    .. math:: E_\alpha(q) = -\frac1\alpha \sum_{n=1}^N \log \mathbb{E}_q\Big[\Big(p(y_n \mid \theta)
              \Big(\frac{p_0(\theta)}{q(\theta)}\Big)^{1/N}\Big)^\alpha\Big] \qquad (\text{tied}),

    .. math:: E_\alpha(q) = \mathrm{KL}(q \,\|\, p_0)
              - \frac1\alpha \sum_{n=1}^N \log \mathbb{E}_q\big[p(y_n \mid \theta)^\alpha\big]
              \qquad (\text{simplified}).

    Minimised over q by its path gradient, through densities and draws alike. As alpha tends to 0 both are minus the
    ELBO; at 1 the tied form is close to expectation propagation. With one datum the tied form is the Rényi bound of the
    other convention, ``renyi(alpha=1 - alpha)``, exactly. The simplified form is the energy that Li and Gal take for
    dropout, and on a family with a density it is ``renyi_predictive`` with the same alpha; the two forms differ by the
    part of the prior alone, whose share of each datum the tied form puts under the power, and come together as data
    grow.

    The terms of the loss are the likelihood and the prior under the responsibilities of the draws (``routed_fit``,
    ``prior``) and the ``routing_cost``, as for ``renyi_predictive``.

    **Bias.** Minibatches are unbiased: N is the size of the whole data set and the sum is scaled. Over K draws each
    logarithm is biased, so that the loss is too large by about alpha times the variance of a datum's factor over 2K.

    **Blind to.** The scale of an unnormalised likelihood or prior.

    **Fails when.** Draws are few and alpha is large: the loss over K draws is nearer to the ELBO than alpha says. For
    alpha near 1 q need not shrink as data grow where the model is misspecified, and it does not stand for the exact
    posterior then.

    Source: Hernandez-Lobato et al. (2016), "Black-box alpha-divergence minimization", the energy with tied factors,
    here in terms of normalised densities; Li and Gal (2017), "Dropout inference in Bayesian neural networks with
    alpha-divergences", section 3, the simplified form.

    Args:
        alpha: Any finite number from 0.
        form: ``"tied"`` or ``"simplified"``.
        estimator: ``"auto"``, ``"enumerated"``, ``"reparameterised"``, or for the simplified form ``"entropy"``.

    Raises:
        ConfigError: If alpha is out of range, or the form is unknown.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "bb_alpha(alpha=0.5, form=simplified)")
        BbAlpha(alpha=0.5, form='simplified', estimator='auto')
    """

    alpha: float = 0.5
    form: Literal["tied", "simplified"] = "tied"
    estimator: str = "auto"

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.PER_DATUM, Capability.PRIOR})
    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    value_gradient: ClassVar[bool] = True
    targets_posterior: ClassVar[bool] = False
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 32
    estimators: ClassVar[Mapping[str, Estimator]] = _ESTIMATORS

    def __post_init__(self) -> None:
        """Check the fields; the tied form needs the density at each draw."""
        check_order(_NAME, "alpha", self.alpha)
        if self.form not in ("tied", "simplified"):
            raise ConfigError(f"{_NAME}(form=...) must be 'tied' or 'simplified', got {self.form!r}.")
        if self.form == "tied":
            object.__setattr__(self, "estimators", {n: e for n, e in _ESTIMATORS.items() if n != "entropy"})
        super().__post_init__()
        if self.alpha == 0:
            object.__setattr__(self, "value_kind", "lower_bound")
            object.__setattr__(self, "targets_posterior", True)

    @property
    def linear_in_draws(self) -> bool:
        """Only at alpha = 0 is the loss a mean over draws."""
        return self.alpha == 0

    @property
    def renyi_order(self) -> float | None:
        """At alpha = 0 it is the ELBO; elsewhere the tied factors are no single divergence from the posterior."""
        return 1.0 if self.alpha == 0 else None

    @property
    def predictive_order(self) -> float:
        """With many data both forms are the per-datum objective of order alpha."""
        return float(self.alpha)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the energy (see :class:`Objective`)."""
        draw, alpha = family(noise), float(self.alpha)
        if draw.z.shape[-2] < 2 and alpha > 0:
            raise ConfigError(f"over one draw the energy is that of alpha=0 (alpha={alpha:g}): use at least draws=2.")
        likelihood, scale = model.log_likelihood(draw.z, batch), model.scale(batch)
        if self.form == "simplified":
            routed = route(likelihood, draw.log_weight, alpha)
            prior = prior_part(self.estimator, family, model, draw)
            value = scale * routed.value.sum(-1) + prior
            return _packed(value, scale, routed, prior)
        size = likelihood.shape[-1] if model.num_data is None else model.num_data
        share = (model.log_prior(draw.z) - density(draw)).unsqueeze(-1) / size
        routed = route(likelihood + share, draw.log_weight, alpha)
        value = scale * routed.value.sum(-1)
        part = -(routed.responsibility * share.detach()).sum((-2, -1))
        fit = routed.fit.sum(-1) - part
        terms = {"routed_fit": scale * fit, "routing_cost": scale * routed.cost.sum(-1), "prior": scale * part}
        return Loss(value, value.detach(), terms)


def _packed(value: Tensor, scale: float, routed: Routing, prior: Tensor) -> Loss:
    terms = {
        "routed_fit": scale * routed.fit.sum(-1),
        "routing_cost": scale * routed.cost.sum(-1),
        "prior": prior.detach(),
    }
    return Loss(value, value.detach(), terms)
