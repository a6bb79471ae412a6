"""What every solver is: it starts a run, and a run steps, gives its output, and can be written down and taken up again.

The loop in :mod:`vifamily.fit` knows nothing more than that, so closed-form updates, particle flows and two-player
games fit in as well as gradient descent.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from vifamily.types import Batch, FamilyLike, Loss, ModelLike

__all__ = ["Run", "Solver", "StepReport", "Task"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be minimised, as a solver sees it.

    Attributes:
        objective_loss: The loss as a pure function of (family, model, noise, batch, state).
        model: The model.
        family: One family, or a stack with a leading restart axis.
        noise_at: Step to noise.
        batch_at: Step to batch (None for all data).
        monitor_noise: Fixed noise on which progress is watched and final states are compared.
        restarts: Number of restarts in the stack.
        step_size: First step size that suits the family.
        objective_state: The objective's state at the first step.
        draws: Draws of one step, or of one value where the objective combines several.
        linear_in_draws: Whether the loss is a plain mean over draws.
        seed: Root seed, for solvers that make draws of their own.
        first_restart: Index of the first restart in the stack.
        objective: The objective itself, for solvers that drive it by more than its loss.
        noise_span: First step and count to the noise of so many steps, ``(step, ...)``; None where they come singly.
        index_at: Step to the positions of its batch in the data, or to None.
        compiled: Whether to compile the steps, where the solver can.
        most_steps: Steps that the fit will take at most, for a schedule that runs over all of them; None if unknown.
    """

    objective_loss: Callable[[FamilyLike, ModelLike, Tensor, Batch | None, Any], Loss]
    model: Any
    family: Any
    noise_at: Callable[[int], Tensor]
    batch_at: Callable[[int], Batch | None]
    monitor_noise: Tensor
    restarts: int
    step_size: float
    objective_state: Any = None
    draws: int = 64
    linear_in_draws: bool = True
    seed: int = 0
    first_restart: int = 0
    objective: Any = None
    noise_span: Callable[[int, int], Tensor] | None = None
    index_at: Callable[[int], Tensor | None] | None = None
    compiled: bool = False
    most_steps: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did.

    Attributes:
        step: Number of steps taken so far.
        loss: Loss per restart, before the step.
        terms: Parts of the loss, averaged over restarts.
        step_size: Step size used.
        finished: Why the run is over, or None.
        phase: A word or two for the progress display.
    """

    step: int
    loss: tuple[float, ...]
    terms: Mapping[str, float]
    step_size: float
    finished: str | None = None
    phase: str = ""


class Run(abc.ABC):
    """A run in progress."""

    task: Task
    step_count: int = 0
    finished: str | None = None
    """Why the run is over, or None while it is not."""
    horizon: int | None = None
    """Total of steps beyond which a call of :meth:`step` must not go, set by the loop; None for no bound."""
    compiled: bool = False
    """Whether its steps are compiled."""
    not_compiled: str = ""
    """Why they are not, where that was asked for."""

    @abc.abstractmethod
    def step(self) -> StepReport:
        """Take one step; a compiled run takes several at once, and reports the last of them.

        Raises:
            NonFiniteLossError: If the loss or its gradient is not finite; the state is then the one before this step.
        """

    @abc.abstractmethod
    def output(self) -> Mapping[str, Any]:
        """Write the best current answer into the task's family and model, and say how it stands.

        Returns:
            ``losses`` (per restart), ``rhat``, ``mcse``, ``gradient_snr``, ``notes``, ``non_finite``.
        """

    @abc.abstractmethod
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on bit for bit: tensors, and plain values for JSON."""

    @abc.abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state."""

    @property
    @abc.abstractmethod
    def losses(self) -> Tensor:
        """Loss of every step so far, ``(step, restart)``."""

    @property
    @abc.abstractmethod
    def step_sizes(self) -> Tensor:
        """Step size of every step so far, ``(step,)``."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """Parts of the loss of every step so far, name to ``(step,)``."""
        return {}


class Solver(abc.ABC):
    """Hyper-parameters of a way to drive a loss down; a frozen dataclass marked with ``@register("solvers", name)``."""

    fixed_draws: ClassVar[bool] = False
    """Whether it minimises the loss on fixed draws, so that gradient estimators must follow the value there."""
    default_draws: ClassVar[int | None] = None
    """Draws to take where the loss is a mean over draws; None leaves it to the objective."""
    compiles: ClassVar[bool] = False
    """Whether its steps can be compiled."""
    noise_per_datum: ClassVar[bool] = True
    """Whether an objective may take a draw of its own for every datum."""

    own_start: ClassVar[bool] = False
    """Whether it finds its own way from a start point, so that ``init="auto"`` looks for no Gaussian beforehand."""

    def default_family(self) -> str | None:
        """Spec of the family that ``"auto"`` stands for with this solver; None leaves it to the dimension."""
        return None

    def writes(self, family: Any) -> bool:
        """Whether it fills this family without evaluating the objective on it, so that their needs do not matter."""
        return False

    def check(  # noqa: B027
        self, *, model: Any, family: Any, batch_size: int | None = None, objective: Any = None
    ) -> None:
        """Refuse what it cannot do; called before the first step, with the family that will be fitted.

        Raises:
            IncompatibleError: Naming why, and what would work.
        """

    def check_steps(self, steps: int | None) -> None:  # noqa: B027
        """Refuse a number of steps that it cannot work with; called before the first step, with what was asked for.

        Raises:
            ConfigError: Naming why, and what would work.
        """

    def check_objective(self, objective: Any) -> None:  # noqa: B027
        """Refuse an objective that it cannot drive; called before the first step.

        Raises:
            IncompatibleError: Naming why, and what would work.
        """

    @abc.abstractmethod
    def start(self, task: Task) -> Run:
        """Begin a run."""
