"""Markovian score climbing: inclusive KL with draws of a Markov chain that q itself proposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.objectives._base import Estimator, Objective, ValueKind, restart_shape
from vifamily.objectives._snis import effective_share, weighted_draws, weights_apart
from vifamily.registry import register
from vifamily.rng import draw_noise
from vifamily.types import Batch, Capability, Draw, FamilyLike, Loss, ModelLike

__all__ = ["MarkovianScoreClimbing"]


@register("objectives", "msc")
@dataclasses.dataclass(frozen=True)
class MarkovianScoreClimbing(Objective):
    r"""Markovian score climbing: inclusive KL whose bias vanishes as the fit goes on.

    .. math:: z_0 = \text{kept draw}, \quad z_1, \dots, z_{K-1} \sim q, \quad
              \bar w_k \propto \frac{p(x, z_k)}{q(z_k)}, \qquad
              -\nabla_\lambda \mathrm{KL}(p \,\|\, q) \approx \sum_{k=0}^{K-1} \bar w_k \nabla_\lambda \log q(z_k) .

    Minimises :math:`\mathrm{KL}(p \,\|\, q)`. One of the draws is kept for the next step, chosen with probabilities
    :math:`\bar w`: that is conditional importance sampling, a Markov chain with the posterior as its stationary law
    whatever q proposes. So the mean of the step over the chain is exact for any K of two or more, where
    ``reweighted_wake`` with K draws stays biased. There is one chain for each restart; its point is the objective's
    state and goes into checkpoints. The choice takes no randomness of its own: the last row of the noise is not made a
    draw, its first number gives the uniform number that decides. With ``average=False`` the step is that of the paper,
    :math:`\nabla_\lambda \log q` at the kept draw alone; the weighted sum is its mean given the draws, with less
    noise. The value is :math:`\sum_k \bar w_k \log(K \bar w_k)`, an estimate of the divergence; ``ess`` is the
    effective sample size as a part of K, ``moved`` whether the chain has moved.

    **Bias.** None once the chain is stationary; before, that of where it started, which dies away at the rate at which
    the chain mixes.

    **Blind to.** Modes that q does not propose and the chain has not met.

    **Fails when.** The chain sticks: one draw with a weight that others seldom reach is kept for many steps, and q
    narrows towards it (look at ``moved``). Happens in many dimensions and from narrow starts. Minibatches would change
    the chain's law and are refused.

    Source: C. A. Naesseth, F. Lindsten and D. Blei, "Markovian score climbing: variational inference with KL(p||q)"
    (NeurIPS 2020), algorithms 1 and 2.

    Args:
        average: Weighted sum over all draws; False takes the kept draw alone.

    Raises:
        ConfigError: If ``average`` is not a boolean.

    Example:
        >>> import vifamily as vf
        >>> objective = vf.registry.build("objectives", "msc")
        >>> objective.min_draws, objective.default_draws
        (3, 64)
    """

    average: bool = True
    estimator: str = "auto"

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q, Capability.DRAWS})
    estimators: ClassVar[Mapping[str, Estimator]] = {
        # strata are no independent proposals, and enumerated states leave no noise to choose by
        "chain": Estimator(
            never_model=frozenset({Capability.LOCAL}),
            never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND, Capability.ENUMERATED}),
            value_gradient=False,
        )
    }
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    inclusive: ClassVar[bool] = True
    state_by_row: ClassVar[bool] = True
    bias: ClassVar[str | None] = (
        "each step moves a Markov chain by {draws} proposals: until it has forgotten where it began, so is the answer "
        "biased, however many draws a step has"
    )
    min_draws: ClassVar[int] = 3
    default_draws: ClassVar[int] = 64

    def __post_init__(self) -> None:
        if not isinstance(self.average, bool):
            raise ConfigError(f"msc(average=...) must be True or False, got {self.average!r}.")
        super().__post_init__()

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Tensor:
        """Start each chain at a draw of q as it stands, ``([restart,] dim)``."""
        of: Any = getattr(family, "latent", model)
        dtype, device = getattr(of, "dtype", torch.float64), getattr(of, "device", "cpu")
        shape = (*restart_shape(family), 1)
        noise = draw_noise(family.noise_spec, shape, generator, dtype=dtype, device=device)
        with torch.no_grad():
            return family(noise).z.squeeze(-2)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate a step of the chain (see :class:`Objective`)."""
        spec = family.noise_spec
        axis = noise.dim() - len(spec.shape) - 1
        count = noise.shape[axis]
        proposed, last = noise.split([count - 1, 1], dim=axis)
        z = torch.cat([state.unsqueeze(-2), family(proposed).z.detach()], -2)
        log_weight = noise.new_full((count,), 1.0 / count).log()
        ratio, log_q, log_p = weighted_draws(family, model, Draw(z, None, log_weight), batch)
        log_share = torch.log_softmax(ratio, -1)
        share = log_share.exp()
        uniform = last.flatten(axis)[..., 0]
        chosen = _choice(share, torch.special.ndtr(uniform) if spec.law == "normal" else uniform)
        kept = z.gather(-2, chosen[..., None, None].expand(*chosen.shape, 1, z.shape[-1])).squeeze(-2)
        weight = share if self.average else torch.nn.functional.one_hot(chosen, count).to(share)
        terms = {"ess": effective_share(log_share, log_weight), "moved": (chosen > 0).to(share)}
        # log p is there for point-estimated parameters of the model; q's have no part in it
        surrogate = -(weight * (log_q + log_p)).sum(-1)
        return Loss(surrogate, weights_apart(log_share, log_weight), terms, kept.detach())


def _choice(share: Tensor, uniform: Tensor) -> Tensor:
    """Index of the draw whose interval of the cumulated weights holds the uniform number, ``(..., draw) -> (...)``."""
    edges = share.cumsum(-1)
    below = (edges <= (uniform * edges[..., -1]).unsqueeze(-1)).sum(-1)
    return below.clamp_max(share.shape[-1] - 1)
