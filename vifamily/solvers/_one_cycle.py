"""Adam on one cycle of step sizes: up from a small one, down to nothing at the last step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.solvers._adam_run import AdamRun
from vifamily.solvers._base import StepReport, Task
from vifamily.solvers._stopping import StoppingRule

__all__ = ["OneCycleRun", "one_cycle"]

_RISING = 0.3
_FIRST = 0.04


def one_cycle(first: int, count: int, total: int) -> np.ndarray:
    """Step sizes as parts of the largest one (Smith and Topin 2019, arXiv 1708.07120; cosines as in torch).

    They rise from 0.04 to 1 over the first 30 % of the steps and fall to 0 over the others, each along half a cosine.

    Args:
        first: First step, from 0.
        count: Number of steps.
        total: Length of the cycle in steps; steps beyond it have size 0.

    Returns:
        One number for each step, ``(count,)``.

    Example:
        >>> one_cycle(0, 11, 10).round(2).tolist()
        [0.04, 0.28, 0.76, 1.0, 0.95, 0.81, 0.61, 0.39, 0.19, 0.05, 0.0]
    """
    at = np.arange(first, first + count, dtype=np.float64)
    top = max(1.0, math.floor(_RISING * total))
    up = _FIRST + (1 - _FIRST) * 0.5 * (1 - np.cos(np.pi * np.minimum(at / top, 1.0)))
    down = 0.5 * (1 + np.cos(np.pi * np.clip((at - top) / max(total - top, 1.0), 0.0, 1.0)))
    return np.where(at < top, up, down)


class OneCycleRun(AdamRun):
    """One run of :class:`~vifamily.solvers.Adam` with ``schedule="one_cycle"``; the last iterate is the answer.

    Nothing is judged on the way, so the run ends with the steps of the fit. As the step size has fallen to nothing
    by then, there is no noise left for averaging to remove.

    Args:
        task: What is to be minimised; its ``most_steps`` is the length of the cycle.
        rule: How often states are watched.
        step_size: Largest step size.
        model_factor: Step size of point-estimated model parameters relative to the family's.

    Raises:
        ConfigError: If the task does not say how many steps there will be.
    """

    def __init__(self, task: Task, rule: StoppingRule, step_size: float, model_factor: float) -> None:
        if task.most_steps is None:
            raise ConfigError("a cycle of step sizes has to know its last step: give the task its most_steps.")
        self.total = task.most_steps
        super().__init__(task, rule, step_size, model_factor)

    def pace(self, first: int, count: int) -> np.ndarray:
        """Step sizes of some steps as parts of ``step_size``."""
        return one_cycle(first, count, self.total)

    def _report(self, values: list[float], *, watch: bool) -> StepReport:
        step = self.step_count
        phase = "step size rising" if step <= _RISING * self.total else "step size falling"
        return StepReport(step, tuple(values), self.history.last_terms, self.history.step_sizes[-1], None, phase)

    def _better(self) -> list[Tensor]:
        return [group.value.clone() for group in self.groups]

    def output(self) -> Mapping[str, Any]:
        """Say how the last iterate stands (see :class:`~vifamily.solvers._base.Run`).

        There is no stage with a step size of its own, so neither R-hat nor a gradient's signal to noise.
        """
        return {**super().output(), "rhat": math.nan, "mcse": math.nan, "gradient_snr": None}

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state (see :class:`~vifamily.solvers._base.Run`)."""
        out, values = super().tensors()
        return out, {**values, "cycle": self.total}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state (see :class:`~vifamily.solvers._base.Run`)."""
        total = int(values["cycle"])
        if total != self.total:
            raise ValueError(f"its cycle of step sizes has {total} steps, this one {self.total}: give steps={total}")
        super().restore(tensors, values)
