"""The length of the optimal ROC curve that tells draws of q from those of p, by a critic: draws alone are needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.numerics.arctangent_ratio import logit_terms
from vifamily.objectives._base import Caps, Estimator, Objective, ValueKind, restart_shape, weighted_sum
from vifamily.objectives._joint_ratio import JointRatio
from vifamily.objectives._ratio_critic import LogRatio
from vifamily.objectives._reference import check_part, reference_part, reference_sd
from vifamily.registry import register
from vifamily.types import Batch, Capability, Draw, FamilyLike, GameState, Loss, ModelLike

__all__ = ["RocArcCritic"]

_FORMS = ("minimax", "non_saturating", "log_ratio")


@register("objectives", "roc_arc_critic")
@dataclasses.dataclass(frozen=True)
class RocArcCritic(Objective):
    r"""A family descends, and a classifier ascends, on the length of the ROC curve that tells its draws from p's.

    With a critic g that stands for :math:`\log(p/q)` and the angle :math:`u = \arctan e^g`,

    .. math:: V(q, g) = \mathbb{E}_p[\sin u(y)] + \mathbb{E}_q[\cos u(z)] - \sqrt2, \qquad
              \sup_g V = \int \sqrt{p^2 + q^2} - \sqrt2 .

    The supremum is the divergence of ``roc_arc``: zero where q is p, at most :math:`2 - \sqrt2`. Here neither density
    is evaluated: y are reference draws of the posterior, z draws of any differentiable sampler. Sine and cosine are
    computed from logits, so that no critic, however sure, gives a number that is not finite, and no draw carries more
    than a bounded weight. The critic is a quadratic form, which is the best there is between Gaussians, and a network
    beside it, in coordinates scaled by the reference draws; the solver ``two_player`` drives both.

    On a simulator (``estimator="joint"``) pairs of parameters and data are told apart: a positive is a pair as it was
    simulated, a negative has parameters that q drew at the data of a simulation. Both have one law of the data, so the
    supremum is the divergence of posteriors, averaged over data,

    .. math:: \mathbb{E}_{p(x)} \int \sqrt{p(\theta \mid x)^2 + q(\theta \mid x)^2} \, d\theta - \sqrt2 ,

    and an amortised posterior is fitted without a density of q, so that implicit conditional families may be taken.

    What the family descends on is V itself (``minimax``), or a loss with the same fixed point whose pull fades less
    where draws are told apart easily: :math:`-\mathbb{E}_q[\sin u]` (``non_saturating``), or
    :math:`-\mathbb{E}_q[g]` (``log_ratio``), which at the best critic is the reverse Kullback-Leibler divergence.

    **Bias.** None at a fixed critic. V at a critic that is not the best is below the divergence, and that of the draws
    on which it was trained is above what fresh ones give: the solver audits with fresh draws of q. The reference draws
    stay what they are, and a critic that is trained long enough learns them by heart: give thousands.

    **Blind to.** What the critic does not learn to see. Not to the weights of modes: the reference draws hold them.

    **Fails when.** q starts where its draws and the reference draws are told apart without error: all forms but
    ``log_ratio`` lose their pull. There are few reference draws or simulations. q moves faster than the critic
    follows, and turns about the answer without coming to rest. The posterior has fine structure: where q has a density
    and the model is a simulator, ``inclusive_kl`` learns it far better.

    Source: the length as an f-divergence with this variational form is Liu (2022), "Estimating the arc length of the
    optimal ROC curve and lower bounding the maximal AUC". The form in logits and its use to fit q are derived for this
    package, after the adversarial objectives of generative networks (Goodfellow et al. 2014; Nowozin, Cseke and
    Tomioka 2016).

    Args:
        family_loss: ``"minimax"``, ``"non_saturating"`` or ``"log_ratio"``.
        hidden: Widths of the critic's hidden layers; None takes two of four times the dimension, between 32 and 256.
        reference_batch: Most reference draws of one step; more take turns. None for all.
        simulations: On a simulator, simulations to make beforehand; None simulates fresh ones for every epoch.
        estimator: ``"reference"``, ``"joint"`` or ``"auto"``: what the model has, reference draws or a simulator.

    Raises:
        ConfigError: If an option is not one of these.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "implicit(hidden=[])", "roc_arc_critic", seed=0, steps=50)
        >>> posterior.draws(5).shape
        torch.Size([5, 2])
    """

    family_loss: str = "minimax"
    hidden: Sequence[int] | None = None
    reference_batch: int | None = 512
    simulations: int | None = 10_000
    estimator: str = "auto"

    needs_model: ClassVar[Caps] = frozenset()
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "reference": Estimator(model=frozenset({Capability.REFERENCE_DRAWS})),
        "joint": Estimator(model=frozenset({Capability.SIMULATE}), family=frozenset({Capability.CONDITIONAL})),
    }
    by_pairs: ClassVar[bool] = True
    never_model: ClassVar[Caps] = frozenset({Capability.LOCAL})
    needs_family: ClassVar[Caps] = frozenset({Capability.REPARAMETERISED, Capability.DRAWS})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    own_solver: ClassVar[str | None] = "two_player"
    default_draws: ClassVar[int] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.reference_batch)
        if self.family_loss not in _FORMS:
            raise ConfigError(f"family_loss must be one of {', '.join(_FORMS)}, got {self.family_loss!r}.")
        number = self.simulations
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 20):
            raise ConfigError(f"simulations must be an integer of at least 20, or None, got {number!r}.")
        if self.hidden is not None:
            widths = tuple(self.hidden) if isinstance(self.hidden, (list, tuple)) else (self.hidden,)
            if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
                raise ConfigError(f"hidden must be a list of positive integers such as [32, 32], got {self.hidden!r}.")
            object.__setattr__(self, "hidden", widths)
        if self.family_loss != "minimax":  # the others move the family by the gradient of something else than the value
            other = {name: dataclasses.replace(e, value_gradient=False) for name, e in self.estimators.items()}
            object.__setattr__(self, "estimators", other)

    @property
    def linear_in_draws(self) -> bool:
        """The value is a mean over draws."""
        return True

    def init_state(self, model: Any, family: Any, *, generator: torch.Generator) -> GameState:
        """Build the critic, one for each restart; all begin alike."""
        draws = model.reference_draws
        width = min(256, max(32, 4 * draws.shape[-1]))
        critic = LogRatio(
            draws.mean(0), reference_sd(model), self.hidden or (width, width), generator, restart_shape(family)
        )
        return GameState(critic, int(torch.randint(2**62, (), generator=generator)))

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the value of the game at the critic in ``state`` (see :class:`Objective`).

        Raises:
            NotAvailableError: If ``state`` is not what :meth:`init_state` returns.
        """
        if not isinstance(state, GameState):
            raise NotAvailableError("this objective is a game: give the state that init_state returns, with a critic.")
        draw = family(noise)
        count = torch.tensor(state.step, dtype=torch.int64)
        part, _ = reference_part(model, self.reference_batch, count)
        sine = logit_terms(state.critic(part))[0].mean(-1)
        return self._game(sine, draw, state.critic, (), dataclasses.replace(state, step=state.step + 1))

    def joint_loss(self, family: FamilyLike, noise: Tensor, batch: Batch, critic: JointRatio) -> Loss:
        """Evaluate the value on pairs: positives as they were simulated, negatives with parameters drawn anew.

        Args:
            family: An amortised family at the data of the batch, which stand in the place of restarts.
            noise: ``(datum, draw, *noise_spec.shape)``.
            batch: Parameters ``(datum, dim)`` and data ``(datum, *shape)``.
            critic: The critic.

        Returns:
            The loss at each datum, whose mean is that of the game; its surrogate ascends in the critic.
        """
        z, x = batch.data
        code = critic.encode(x)
        sine = logit_terms(critic(z.unsqueeze(-2), code))[0].squeeze(-1)
        return self._game(sine, family(noise), critic, (code,), None)

    def _game(self, sine: Tensor, draw: Draw, critic: nn.Module, beside: tuple[Tensor, ...], state: Any) -> Loss:
        told = draw.z if self.family_loss == "minimax" else draw.z.detach()
        cosine = weighted_sum(draw.log_weight, logit_terms(critic(told, *beside))[1])
        value = sine + cosine - math.sqrt(2.0)
        surrogate = value
        if self.family_loss != "minimax":
            fixed = {name: p.detach() for name, p in critic.named_parameters()}
            log_ratio = functional_call(critic, fixed, (draw.z, *(part.detach() for part in beside)))
            gain = log_ratio if self.family_loss == "log_ratio" else logit_terms(log_ratio)[0]
            surrogate = value - weighted_sum(draw.log_weight, gain)
        return Loss(surrogate, value.detach(), {"sine": sine.detach(), "cosine": cosine.detach()}, state)
