"""Adam with step-size control, iterate averaging and a stopping rule."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from vifamily.errors import ConfigError
from vifamily.registry import register
from vifamily.solvers._adam_run import AdamRun
from vifamily.solvers._base import Solver, Task
from vifamily.solvers._one_cycle import OneCycleRun
from vifamily.solvers._stopping import StoppingRule

__all__ = ["Adam"]


@register("solvers", "adam")
@dataclasses.dataclass(frozen=True)
class Adam(Solver):
    """Adam on fresh draws, run to convergence without a step count or a step size to choose.

    At each step size the iterates are watched until they are stationary (split R-hat) and then averaged until the
    average's Monte-Carlo error is small; the step size is halved until halving it changes no posterior mean by more
    than ``tolerance`` posterior sds and no log sd by more than ``tolerance``. Averaging removes the noise that a
    constant step size leaves, so one draw per step is enough.

    Args:
        step_size: First step size; None takes the one that suits the family (its coordinates are standardised, so
            it need not suit the problem).
        tolerance: Largest change on halving the step size, in posterior sds and log sds.
        mcse: Largest Monte-Carlo error of the averaged iterates, in the same units.
        model_step_size: Step size of point-estimated model parameters relative to the family's.
        schedule: None for the rule above. ``"one_cycle"``, for a number of steps that is given (``steps=``): the step
            size rises to ``step_size`` over the first 30 % of them and falls to zero over the others, nothing is
            judged, and the last iterate is the answer. It suits networks, whose averages of iterates need not be good.

    Raises:
        ConfigError: If a number is not positive, or the schedule is none of these.

    Example:
        >>> from vifamily import registry
        >>> registry.build("solvers", "adam(step_size=0.01)").step_size
        0.01
    """

    step_size: float | None = None
    tolerance: float = 0.02
    mcse: float = 0.02
    model_step_size: float = 0.2
    schedule: str | None = None

    compiles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("step_size", "tolerance", "mcse", "model_step_size"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ConfigError(f"adam({name}=...) must be a positive number, got {value!r}.")
        if self.schedule not in (None, "one_cycle"):
            raise ConfigError(f"adam(schedule=...) must be None or 'one_cycle', got {self.schedule!r}.")

    def check_steps(self, steps: int | None) -> None:
        """Ask for ``steps=`` where there is a schedule: it has to know where it ends."""
        if self.schedule is not None and steps is None:
            raise ConfigError(f"adam(schedule={self.schedule!r}) has to know its last step: give steps=.")

    def start(self, task: Task) -> AdamRun:
        """Begin a run."""
        rule = StoppingRule(tolerance=self.tolerance, mcse=self.mcse)
        kind = OneCycleRun if self.schedule == "one_cycle" else AdamRun
        return kind(task, rule, self.step_size or task.step_size, self.model_step_size)
