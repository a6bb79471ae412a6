"""Fits of one model that differ in their seed alone, stepped side by side in one program.

Most of the time of a small fit's step goes into the overhead of its operations, which does not grow with the number of
rows they work on. Unlike restarts, which share their stages and of which the best is returned, fits side by side
remain what they are: each has the start, the noise, the stages and the end of its seed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.families._stack import StackedFamily
from vifamily.fit import _MOST_STEPS, warn_if_unfinished
from vifamily.interrupts import Interrupts
from vifamily.loop import FitLoop
from vifamily.plan import Plan, make_plan
from vifamily.posterior import Posterior
from vifamily.progress import FitProgress
from vifamily.rng import check_seed, generator
from vifamily.solvers import Adam, Task
from vifamily.solvers._adam_rows import AdamRows
from vifamily.solvers._adam_run import AdamRun
from vifamily.types import Capability

__all__ = ["SeedGrid", "fit_seeds", "why_one_by_one"]


def why_one_by_one(planned: Plan) -> str | None:
    """Return why fits of this plan cannot be stepped side by side, or None where they can.

    Example:
        >>> from vifamily.plan import plan
        >>> why_one_by_one(plan("banana", "mean_field", solver="adam"))
        >>> why_one_by_one(plan("banana", "mean_field", solver="lbfgs"))
        'the solver is not adam'
    """
    model = planned.model
    if not isinstance(planned.solver, Adam):
        return "the solver is not adam"
    if planned.solver.schedule is not None:
        return "a schedule of step sizes is followed by one fit at a time"
    if planned.batch_size is not None:
        return "each fit has minibatches of its own"
    if Capability.LOCAL in model.capabilities:
        return "the model has local latents"
    if any(p.requires_grad for p in model.parameters()):
        return "the model has parameters of its own"
    family = planned.entry.build(planned.latent, generator=torch.Generator(device="cpu"))
    if not family.vectorised:
        return "the family cannot be vectorised"
    if not all(p.requires_grad for p in family.parameters()):
        return "the family has parameters that are held fixed"
    if planned.objective.init_state(model, family, generator=generator(0, "objective")) is not None:
        return "the objective carries a state from step to step"
    return None


class SeedGrid:
    """Fits of several seeds: first stepped together, then each finished, and packed, on its own.

    A fit whose next step is not finite leaves the others and meets its error in :meth:`finish`; so does the last one
    that is left, which goes on alone. The time of a step is shared equally among the fits that take it.

    Args:
        planned: The plan of every fit.
        seeds: Their seeds.
        steps: Most steps; None leaves it to the stopping rule.
        init: As ``fit`` takes it.

    Raises:
        ConfigError: If the fits cannot be stepped side by side (see :func:`why_one_by_one`), or there is no seed.

    Example:
        >>> from vifamily.plan import plan
        >>> grid = SeedGrid(plan("banana", "mean_field", solver="adam"), seeds=[3, 5], steps=20)
        >>> grid.advance()
        >>> [grid.finish(i).record.seed for i in range(2)]
        [3, 5]
    """

    def __init__(self, planned: Plan, seeds: Sequence[int], *, steps: int | None = None, init: Any = "auto") -> None:
        reason = why_one_by_one(planned)
        if reason is not None:
            raise ConfigError(f"these fits cannot run side by side: {reason}. Call fit for each seed instead.")
        if not seeds:
            raise ConfigError("fits side by side need at least one seed, got none.")
        # the rows share steps in torch, which are not compiled
        planned = dataclasses.replace(planned, compile=False)
        self.planned, self.steps, self.most_steps = planned, steps, steps or _MOST_STEPS
        self.loops: list[FitLoop] = []
        self.seconds: list[float] = []
        for seed in seeds:
            began = time.monotonic()
            self.loops.append(
                FitLoop(
                    planned,
                    seed=check_seed(seed),
                    most_steps=self.most_steps,
                    restarts=1,
                    init=init,
                    folder=None,
                    every=_MOST_STEPS,
                    encoder=None,
                    local_family=None,
                )  # fmt: skip
            )
            self.seconds.append(time.monotonic() - began)

    def _run(self, i: int) -> AdamRun:
        run = self.loops[i].runs[0]
        if not isinstance(run, AdamRun):
            raise ConfigError(f"these fits cannot run side by side: a run of {type(run).__name__}.")
        return run

    def advance(self, *, time_limit: float | None = None) -> None:
        """Step the fits together until at most one is left that has not ended.

        Args:
            time_limit: Most seconds of this call.

        Raises:
            KeyboardInterrupt: After the step in progress, when Ctrl-C was pressed.
        """
        deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        alone: set[int] = set()
        with Interrupts() as interrupts:
            while True:
                live = [i for i in range(len(self.loops)) if i not in alone and self._run(i).finished is None]
                if len(live) < 2 or self._run(live[0]).step_count >= self.most_steps or time.monotonic() >= deadline:
                    return
                began = time.monotonic()
                runs = [self._run(i) for i in live]
                rows = AdamRows(runs, stacked_task([run.task for run in runs]))
                bad = rows.advance(self.most_steps, stop=lambda: interrupts.asked, deadline=deadline)
                alone |= {live[row] for row in bad}
                for i in live:
                    self.seconds[i] += (time.monotonic() - began) / len(live)
                if interrupts.asked:
                    raise KeyboardInterrupt

    def finish(self, i: int, *, time_limit: float | None = None) -> Posterior:
        """Finish one fit and return its posterior, as ``fit`` would.

        Args:
            i: Its place among the seeds.
            time_limit: Most seconds that it may go on alone.

        Raises:
            NonFiniteLossError: If its loss stops being finite; its ``posterior`` is the last finite state.
        """
        loop = self.loops[i]
        loop.count_time(self.seconds[i])
        if len(self.loops) > 1:
            loop.notes.append(f"fitted side by side with {len(self.loops) - 1} more seeds; its time is its share")
        display = FitProgress(show=False, most_steps=self.most_steps)
        posterior = loop.run((), None, display, time_limit)
        warn_if_unfinished(posterior, self.steps)
        return posterior


def stacked_task(tasks: Sequence[Task]) -> Task:
    """Return one task of several that differ in their seed: row r has the noise and the start of task r."""

    def noise_at(step: int) -> Tensor:
        return torch.stack([task.noise_at(step) for task in tasks])

    # copies: stacking writes the maps of the members in one form
    family = StackedFamily([task.family.copy() for task in tasks])
    return dataclasses.replace(
        tasks[0], family=family, noise_at=noise_at, restarts=len(tasks),
        monitor_noise=torch.stack([task.monitor_noise for task in tasks]),
    )  # fmt: skip


def fit_seeds(
    model: Any,
    family: Any = "auto",
    objective: Any = "elbo",
    solver: Any = "adam",
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    draws: int | None = None,
    init: Any = "auto",
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> list[Posterior]:
    """Fit the same posterior once for each seed, all side by side.

    Each posterior equals that of ``fit`` with its seed up to rounding: the rows of the program have the start, the
    noise, the step sizes and the end of their own seed (unlike ``fit(restarts=...)``, which returns the best of fits
    that share their stages).

    Args:
        model: As ``fit`` takes it, like all that follows.
        family: The family.
        objective: The objective.
        solver: The solver, ``adam``.
        seeds: The seeds.
        steps: Most steps; None leaves it to the stopping rule.
        draws: Draws per step; None takes the objective's default.
        init: Where each begins.
        device: Device to run on.
        dtype: Floating dtype.

    Returns:
        One posterior per seed, in their order.

    Raises:
        ConfigError: If the fits cannot run side by side, naming why.
        NonFiniteLossError: If the loss of one stops being finite; the others have run on until they ended.

    Example:
        >>> posteriors = fit_seeds("correlated_normal", "full_rank", seeds=[0, 1], steps=20)
        >>> [posterior.record.steps for posterior in posteriors]
        [20, 20]
    """
    planned = make_plan(model, family, objective, solver, draws=draws, batch_size=None, device=device, dtype=dtype)
    grid = SeedGrid(planned, seeds, steps=steps, init=init)
    grid.advance()
    return [grid.finish(i) for i in range(len(grid.loops))]
