"""Inclusive Kullback-Leibler divergence to reference draws: maximum likelihood of q."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.objectives._base import Objective, ValueKind, restart_shape
from vifamily.objectives._reference import check_part, first_state, reference_part
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike, Space

__all__ = ["InclusiveKlDraws"]


@register("objectives", "inclusive_kl_draws")
@dataclasses.dataclass(frozen=True)
class InclusiveKlDraws(Objective):
    r"""Inclusive KL to reference draws of the posterior: q by maximum likelihood.

    .. math:: \mathrm{KL}(p \,\|\, q) = -\mathbb{E}_p \log q(z) - H(p), \qquad
              \text{loss} = -\frac1N \sum_{i=1}^N \log q(z_i), \quad z_i \sim p .

    Minimises :math:`\mathrm{KL}(p \,\|\, q)` up to the entropy of p, which is not known. It needs draws of the
    posterior (``model.with_reference_draws(draws)``; named problems bring theirs) and the density of q at given points;
    it evaluates neither the log joint nor a draw of q, so a step has no noise and discrete latents are fine. A Gaussian
    family ends at the sample moments of the draws: ``full_rank`` at their mean and covariance, ``mean_field`` at their
    means and *marginal* standard deviations. A ``semi_implicit`` family is refused: its density at given points is an
    average over fixed mixing noise, which would be fitted in place of the law of its draws.

    Its use is to compress a long Markov chain into a density, and to say what the best of a family under this
    divergence would be.

    **Bias.** The gradient is exact for the draws given, and unbiased for p where they are independent of it and exact.
    What q learns is the draws: their Monte-Carlo error stays in the answer, and families with many parameters fit it
    too (a flow can drive its density up at single draws).

    **Blind to.** Everything that the reference draws miss, such as a mode that the chain never found.

    **Fails when.** The family can shrink onto single draws: a mixture's component on one draw, a flow on a few. The
    loss is then unbounded below. Give more draws, or a smaller family.

    Source: J. M. Bernardo and A. F. M. Smith, "Bayesian Theory" (1994), Section 5.3: the best approximation of a law in
    the logarithmic score; equation for exponential families: matching of moments.

    Args:
        reference_batch: Reference draws of one step, taking turns; None for all at every step, which makes the loss
            one fixed function that ``lbfgs`` minimises.

    Raises:
        ConfigError: If ``reference_batch`` is not an integer of 2 or more.

    Example:
        >>> import torch, vifamily as vf
        >>> draws = torch.tensor([[0.0, 0.0], [2.0, 2.0], [1.0, 2.5], [1.0, -0.5]], dtype=torch.float64)
        >>> model = vf.models.Density(lambda z: 0.0 * z.sum(-1), dim=2).with_reference_draws(draws)
        >>> posterior = vf.fit(model, "mean_field", "inclusive_kl_draws", init=torch.zeros(2), seed=0)
        >>> mean, covariance = posterior.family.moments()
        >>> mean.numpy().round(4), covariance.diagonal().sqrt().numpy().round(4)
        (array([1., 1.]), array([0.7071, 1.2748]))
    """

    reference_batch: int | None = None

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.REFERENCE_DRAWS})
    never_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOCAL})
    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    value_gradient: ClassVar[bool] = True
    inclusive: ClassVar[bool] = True
    default_draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_part(self.reference_batch)
        super().__post_init__()
        if self.reference_batch is not None:
            # the loss changes from step to step
            object.__setattr__(self, "value_gradient", False)

    def missing(
        self, model: frozenset[Capability], family: frozenset[Capability], space: Space = Space.REAL
    ) -> tuple[str, ...]:
        """Return what a pair lacks; a family whose density at given points is not that of its draws cannot be used."""
        lacking = super().missing(model, family, space)
        bound = Capability.LOG_Q_BOUND in family
        return (*lacking, f"family: no {Capability.LOG_Q_BOUND}") if bound else lacking

    @property
    def linear_in_draws(self) -> bool:
        """It uses no draws of q at all."""
        return True

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Tensor | None:
        """Count steps where the reference draws take turns."""
        return first_state(model, family, self.reference_batch)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the mean of minus the log density at reference draws (see :class:`Objective`)."""
        draws, after = reference_part(model, self.reference_batch, state)
        value = -family.log_prob(draws.expand(*restart_shape(family), *draws.shape)).mean(-1)
        return Loss(value, value.detach(), {}, after)
