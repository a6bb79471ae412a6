"""Another objective on a target that is tempered at first and the posterior in the end."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from vifamily.errors import ConfigError, IncompatibleError, SpecError
from vifamily.objectives._base import restart_shape
from vifamily.objectives._tempering import Compound, packed, unpacked
from vifamily.registry import entry_name, register
from vifamily.types import Batch, FamilyLike, Loss, ModelLike

__all__ = ["Annealed"]


@register("objectives", "annealed")
@dataclasses.dataclass(frozen=True)
class Annealed(Compound):
    r"""Another objective on a target that goes from a tempered posterior to the posterior.

    .. math:: p_t(z) \propto p(x, z)^{\beta_t} \quad\text{or}\quad p(z)\, p(x \mid z)^{\beta_t}, \qquad
              \beta_t = \beta_0 + (1 - \beta_0) \min(t / S, 1).

    What is minimised at a step t, and with which estimator, is the business of the objective in ``of``; from step S
    on it is that objective itself. At first the target is flatter, so that q can move between modes and spread over
    several before their walls rise. A geometric schedule has :math:`\beta_t = \beta_0^{1 - t/S}`.

    A fit is judged from step S on only: the stages of ``adam``, their averages and their convergence begin there. The
    step is part of the state, so a fit that is taken up again goes on along the same schedule. Because the loss
    changes from step to step, solvers on fixed draws do not take it. Where a fit starts matters more than with other
    objectives: ``init="prior"`` leaves it to the annealing to find the mass.

    **Bias.** None in the end; before step S the value is a bound for the tempered law, not for the posterior.

    **Blind to.** What the objective in ``of`` is blind to: the schedule changes where a descent ends among several
    optima, not what the optima are. Under reverse KL a q that has found two modes may lose one again as they part.

    **Fails when.** S is too short for q to follow, or the tempered joint has no finite integral at small beta (use
    ``part=likelihood``, whose laws are all proper under a proper prior).

    Source: Katahira, Watanabe and Okada (2008), "Deterministic annealing variant of variational Bayes method"; Mandt,
    McInerney, Abrol, Ranganath and Blei (2016), "Variational tempering".

    Args:
        of: The objective: a spec string, or an objective.
        start: The first inverse temperature, in (0, 1].
        steps: S, the steps until it is 1.
        schedule: ``"linear"`` or ``"geometric"``.
        part: ``"joint"`` or ``"likelihood"``.
        estimator: ``"auto"`` or the name of an estimator of the objective in ``of``.

    Raises:
        SpecError: If a number is out of range, or there is no such schedule, part or estimator.
        ConfigError: If ``of`` is not an objective.
        IncompatibleError: If ``of`` is driven by more than the descent of a loss.

    Example:
        >>> from vifamily import registry
        >>> objective = registry.build("objectives", "annealed(of=renyi(alpha=0.5), steps=100)")
        >>> [round(objective.beta(step), 3) for step in (0, 50, 100, 1000)]
        [0.1, 0.55, 1.0, 1.0]
    """

    of: Any = "elbo"
    start: float = 0.1
    steps: int = 500
    schedule: str = "linear"
    part: str = "joint"
    estimator: str = "auto"

    def __post_init__(self) -> None:
        number = isinstance(self.start, (int, float)) and not isinstance(self.start, bool)
        if not number or not 0 < self.start <= 1:
            raise SpecError(f"start must be an inverse temperature in (0, 1], got {self.start!r}.")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise SpecError(f"steps must be a positive integer, got {self.steps!r}.")
        if self.schedule not in ("linear", "geometric"):
            raise SpecError(f"schedule must be 'linear' or 'geometric', got {self.schedule!r}.")
        super().__post_init__()

    def beta(self, step: int) -> float:
        """Inverse temperature after so many steps."""
        share = min(step / self.steps, 1.0)
        if self.schedule == "geometric":
            return float(self.start ** (1 - share))
        return float(self.start + (1 - self.start) * share)

    @property
    def warmup_steps(self) -> int:
        """Steps until the target is the posterior."""
        return max(self.steps, self.inner.warmup_steps)

    @property
    def notes(self) -> tuple[str, ...]:
        """When the target is the posterior."""
        return (
            *super().notes,
            f"the target is tempered during the first {self.steps} steps, the posterior from then on",
        )

    def for_fixed_draws(self, solver: str) -> Self:
        """Refuse: the loss changes from step to step."""
        raise IncompatibleError(
            f"the solver {solver!r} minimises one fixed function, and {entry_name(self)!r} changes from step to step: "
            "use solver='adam'.",
            missing=("a loss that stays the same",),
        )

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Tensor:
        """Step 0, with the state of the objective it is made of.

        Raises:
            ConfigError: If that state is not a tensor.
        """
        state = self.inner.init_state(model, family, generator=generator)
        if state is not None and not isinstance(state, Tensor):
            raise ConfigError(
                f"{entry_name(self.inner)!r} carries a state that is no tensor, which cannot be kept beside the step."
            )
        return packed(0, state, restart_shape(family))

    def after_warmup(self, state: Any) -> Tensor:
        """The state at which the target is the posterior."""
        return packed(self.warmup_steps, self.inner.after_warmup(unpacked(state)[1]), tuple(state.shape[:-1]))

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the loss at the step in the state, or without a state at the end of the schedule."""
        step, inner = (self.warmup_steps, None) if state is None else unpacked(state)
        loss = self._tempered_loss(family, model, noise, batch, inner, self.beta(step))
        return dataclasses.replace(loss, state=packed(step + 1, loss.state, restart_shape(family)))
