"""The alpha-Rényi objective of predictively oriented posteriors: one power mixture per datum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.soft_routing import route
from vifamily.objectives._base import Estimator, Objective, ValueKind, restart_shape
from vifamily.objectives._per_datum import Unit, check_order, check_unit, prior_part, unit_log_likelihood, unit_needs
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["RenyiPredictive"]

_NAME = "renyi_predictive"
_PATH = frozenset({Capability.REPARAMETERISED})
_SCORE = frozenset({Capability.SCORE})


@register("objectives", _NAME)
@dataclasses.dataclass(frozen=True)
class RenyiPredictive(Objective):
    r"""Per-datum alpha-Rényi objective: from variational Bayes to the best predictive mixture.

    .. math:: L_\alpha(q) = -\frac1\alpha \sum_u \log \mathbb{E}_{\theta \sim q}\big[p(y_u \mid \theta)^\alpha\big]
              + \mathrm{KL}(q \,\|\, p_0),

    one power mean per unit u, summed over units; for a finite ensemble of points with weights :math:`\pi_m` the first
    part is :math:`-\frac1\alpha \sum_u \log \sum_m \pi_m p(y_u \mid \theta_m)^\alpha`. Minimised over q, by its path
    gradient. As alpha tends to 0 it is minus the ELBO: every member must explain every datum. At 1 it is the log score
    of the mixture that q makes of the likelihoods (a predictively oriented posterior): members may share the data out
    among themselves. In between, each unit is routed softly to the members that explain it,

    .. math:: L_\alpha = \min_w \sum_u \Big\{ -\sum_m w_{um} \log p(y_u \mid \theta_m)
              + \frac1\alpha \mathrm{KL}(w_u \,\|\, \pi) \Big\} + \mathrm{KL}(q \,\|\, p_0), \qquad
              w_{um} \propto \pi_m\, p(y_u \mid \theta_m)^\alpha,

    so that 1/alpha is the price, in nats, of a nat of routing. The terms of the loss are these three: ``routed_fit``,
    ``routing_cost`` and ``prior``. Above 1 nothing breaks, but routing becomes a contest that one member wins, and with
    a likelihood that can saturate members run away unless the prior holds them.

    This is not the objective ``renyi`` (Li and Turner 2016). That one takes a single power mean of the whole ratio
    p(x, z) / q(z), its power is 1 - alpha, and for every alpha it is least at the exact posterior; here the power is
    alpha itself, of each unit's likelihood, and away from 0 the optimum is not the posterior. ``renyi(alpha=1)`` and
    ``renyi_predictive(alpha=0)`` are both the ELBO; nowhere else do they meet.

    Estimators differ in the prior part: ``entropy`` takes the family's entropy in closed form; ``reparameterised`` its
    log density at the draws; ``cross`` serves ensembles of points, which have no density: the divergence is infinite,
    and what is kept is its cross term, the mean of minus the log prior over members; ``enumerated`` serves finite
    discrete families.

    Losses at different alpha are not comparable: they fall as alpha grows. Compare by the log score of the mixture on
    held-out data (:func:`vifamily.diagnostics.mixture_log_score`).

    **Bias.** Over an ensemble of points there is none, and minibatches are unbiased. Over K draws of a continuous q the
    loss is biased upwards, by about alpha times the variance of the log likelihoods of a datum over 2K where alpha
    times their spread is small, and what is minimised is its expectation over K draws. At alpha = 0 there is none.

    **Blind to.** Which member is which, and the scale of an unnormalised likelihood; with ``unit="datum"`` also to
    whatever makes data of one group alike.

    **Fails when.** Members are started at one point: identical members have identical gradients and stay together at
    every alpha. Where a member can represent conflicting data as a distribution of its own, members coincide at the
    optimum for every alpha below 1, and what they specialise in early passes; route larger units (``unit="group"``)
    where conflict lies between groups.

    Source: Cordero-Encinar, Tyukin and Duncan (2026), arXiv 2605.27747, for the loss over ensembles; the variational
    form is that of a power mean.

    Args:
        alpha: Any finite number from 0.
        unit: ``"datum"``, or ``"group"``: the likelihood of all data of one group is taken to the power as one. Groups
            are the model's (``LikelihoodModel(..., groups=ids)``).
        start: Value of alpha at the first step of a ramp; None with ``warmup=0``.
        warmup: Steps over which alpha goes from ``start`` to ``alpha``, by equal factors (by equal steps from 0). The
            fit is not judged before it ends.
        estimator: ``"auto"`` or one of the above.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "renyi_predictive(alpha=0.5, start=0.01, warmup=500)")
        RenyiPredictive(alpha=0.5, unit='datum', start=0.01, warmup=500, estimator='auto')
    """

    alpha: float = 0.8
    unit: Unit = "datum"
    start: float | None = None
    warmup: int = 0
    estimator: str = "auto"

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.PER_DATUM, Capability.PRIOR})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    value_gradient: ClassVar[bool] = True
    targets_posterior: ClassVar[bool] = False
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 32
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "enumerated": Estimator(family=frozenset({Capability.ENUMERATED, Capability.LOG_Q})),
        "entropy": Estimator(model=_SCORE, family=_PATH | {Capability.ENTROPY}),
        "reparameterised": Estimator(model=_SCORE, family=_PATH | {Capability.LOG_Q}),
        "cross": Estimator(
            model=_SCORE, family=_PATH | {Capability.FINITE}, never_family=frozenset({Capability.LOG_Q})
        ),
    }

    def __post_init__(self) -> None:
        """Check the fields; at alpha = 0 the value is a bound."""
        check_order(_NAME, "alpha", self.alpha)
        check_unit(_NAME, self.unit)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ConfigError(f"{_NAME}(warmup=...) must be a number of steps from 0, got {self.warmup!r}.")
        if self.start is not None:
            check_order(_NAME, "start", self.start)
        if (self.start is None) != (self.warmup == 0):
            raise ConfigError(
                f"a ramp of alpha needs both start= and warmup=, got start={self.start!r}, warmup={self.warmup!r}."
            )
        super().__post_init__()
        object.__setattr__(self, "needs_model", type(self).needs_model | unit_needs(self.unit))
        if self.alpha == 0:
            object.__setattr__(self, "value_kind", "lower_bound")
            object.__setattr__(self, "targets_posterior", True)

    @property
    def linear_in_draws(self) -> bool:
        """Only at alpha = 0 is the loss a mean over draws."""
        return self.alpha == 0 and not self.start

    @property
    def renyi_order(self) -> float | None:
        """At alpha = 0 it is the ELBO; elsewhere it is not a divergence from the posterior."""
        return 1.0 if self.alpha == 0 else None

    @property
    def predictive_order(self) -> float:
        """The order, alpha itself."""
        return float(self.alpha)

    @property
    def warmup_steps(self) -> int:
        """Steps after which the loss stays the same."""
        return self.warmup

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Tensor | None:
        """Return the number of steps taken, where alpha depends on it."""
        return torch.zeros(restart_shape(family), dtype=torch.long) if self.warmup else None

    def after_warmup(self, state: Any) -> Any:
        """Return the number of steps at which the ramp is over."""
        return None if state is None else torch.full_like(state, self.warmup)

    def alpha_at(self, step: int) -> float:
        """Return alpha after some steps.

        Example:
            >>> ramp = RenyiPredictive(alpha=1.0, start=0.01, warmup=100)
            >>> [round(ramp.alpha_at(step), 4) for step in (0, 50, 100, 1000)]
            [0.01, 0.1, 1.0, 1.0]
        """
        if self.start is None or step >= self.warmup:
            return float(self.alpha)
        passed = step / self.warmup
        if self.start == 0 or self.alpha == 0:
            return float(self.start + passed * (self.alpha - self.start))
        return float(self.start * (self.alpha / self.start) ** passed)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the loss (see :class:`Objective`); without a state it is that after the ramp."""
        alpha = float(self.alpha) if state is None else self.alpha_at(int(state.reshape(-1)[0]))
        draw = family(noise)
        if draw.z.shape[-2] < 2 and alpha > 0 and Capability.FINITE not in family.capabilities:
            raise ConfigError(f"over one draw the loss is that of alpha=0 (alpha={alpha:g}): use at least draws=2.")
        routed = route(unit_log_likelihood(model, draw.z, batch, self.unit), draw.log_weight, alpha)
        scale = model.scale(batch)
        prior = prior_part(self.estimator, family, model, draw)
        value = scale * routed.value.sum(-1) + prior
        terms = {
            "routed_fit": scale * routed.fit.sum(-1),
            "routing_cost": scale * routed.cost.sum(-1),
            "prior": prior.detach(),
        }
        return Loss(value, value.detach(), terms, None if state is None else state + 1)
