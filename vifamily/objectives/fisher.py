"""Fisher divergence: the mean squared difference of scores."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.scores import score
from vifamily.objectives._base import weighted_sum
from vifamily.objectives._score_based import ScoreBased
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["Fisher"]

_DENSITY = frozenset({Capability.REPARAMETERISED, Capability.LOG_Q})


@register("objectives", "fisher")
@dataclasses.dataclass(frozen=True)
class Fisher(ScoreBased):
    r"""Fisher divergence: the mean squared difference between the scores of q and of the posterior.

    .. math:: F(q) = \mathbb{E}_q\,|s_p(z) - s_q(z)|^2_W, \qquad s_p = \nabla_z \log p(x, z), \quad
              s_q = \nabla_z \log q(z),

    with :math:`W = I`, or with ``weight="covariance"`` :math:`W = \operatorname{cov}(q)`, which leaves the number
    unchanged by affine maps of the latents. Neither normaliser enters: not that of the joint, and not that of q. It is
    minimised by the reparameterised gradient, which passes through both scores and so needs second derivatives of both
    log densities; at q = p every draw's gradient is zero. With ``weight="covariance"`` the covariance is the family's
    own in closed form and is differentiated too.

    On a normal posterior with precision :math:`\Lambda` the best mean-field q has variances
    :math:`v_i = (\Lambda^2)_{ii}^{-1/2}`, and with ``weight="covariance"`` those that solve
    :math:`\sum_j \Lambda_{ij}^2 v_j = \Lambda_{ii}`. Both are below the :math:`1 / \Lambda_{ii}` of reverse KL: this
    objective makes q narrower still where the family is too simple.

    **Bias.** Value and gradient are unbiased for any number of draws. A minibatch adds the variance of its score to the
    square, which is a bias that depends on q: minibatches are refused.

    **Blind to.** The weights of separate modes: where the posterior is an equal mixture of N(-3, 1) and N(3, 1), a q of
    the same modes with weights 0.8 and 0.2 costs 0.008 and one with 0.95 and 0.05 costs 0.023 (reverse KL: 0.19 and
    0.49), and with the modes at -4 and 4 a thousandth of that. Never let it be the only check of an answer.

    **Fails when.** Far out the posterior's score goes to zero or to a constant (heavy tails, a scale on the log scale):
    with ``weight="identity"`` an ever wider q loses its own score too, and the divergence tends to the square of what
    is left, which may be less than near the answer (zero on a Cauchy law). ``weight="covariance"`` has no such escape,
    but started too narrow its gradient vanishes: the value tends to the number of coordinates. There are local minima
    between modes. With weight identity coordinates of small scale count for more. A log density with kinks (rectified
    linear units) has no second derivatives to follow.

    Source: Hyvarinen (2005), "Estimation of non-normalized statistical models by score matching", equation 2, with the
    expectation under q; Cai et al. (2024), "Batch and match", equation 3, for the weight.

    Args:
        weight: ``"identity"`` or ``"covariance"``; the latter for families with Gaussian moments in closed form.

    Raises:
        ConfigError: If the weight is neither.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "mean_field", "fisher", seed=0)
        >>> posterior.record.stop_reason
        'converged'
    """

    weight: str = "identity"

    needs_family: ClassVar[frozenset[Capability]] = _DENSITY
    never_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q_BOUND})
    default_draws: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight not in ("identity", "covariance"):
            raise ConfigError(f"fisher(weight=...) is 'identity' or 'covariance', got {self.weight!r}.")
        if self.weight == "covariance":
            object.__setattr__(self, "needs_family", _DENSITY | {Capability.GAUSSIAN})

    @property
    def linear_in_draws(self) -> bool:
        """A mean over draws."""
        return True

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the divergence (see :class:`Objective`)."""
        draw = family(noise)
        of_p = score(lambda z: model.log_joint(z, batch), draw.z)
        of_q = score(family.log_prob, draw.z)
        square = self._square(of_p - of_q, family)
        value = weighted_sum(draw.log_weight, square)
        with torch.no_grad():
            terms = {
                "score_p": weighted_sum(draw.log_weight, self._square(of_p, family)),
                "score_q": weighted_sum(draw.log_weight, self._square(of_q, family)),
            }
        return Loss(value, value.detach(), {name: term.detach() for name, term in terms.items()})

    def _square(self, apart: Tensor, family: FamilyLike) -> Tensor:
        if self.weight == "identity":
            return apart.square().sum(-1)
        _, covariance = family.moments()  # type: ignore[attr-defined]
        return ((apart @ covariance) * apart).sum(-1)
