"""Several runs of Adam stepped as one: each keeps its own draws, step size, stages and end.

A restart of one fit shares its stages with the others; the runs here do not. Each row of the stack makes exactly the
steps that its run would make alone, so answers agree to rounding, and only the arithmetic of a step is shared. What
happens seldom (judging a stage, ending it) is left to the runs themselves.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vifamily.solvers._adam_run import AdamRun
from vifamily.solvers._base import Task
from vifamily.solvers._flat import FlatParameters
from vifamily.solvers._watch import has_moments, watched
from vifamily.types import Loss

__all__ = ["AdamRows"]


@dataclasses.dataclass
class _Pending:
    """What the steps since the last visit of the runs left behind, one entry per step or watched state."""

    losses: list[Tensor] = dataclasses.field(default_factory=list)
    terms: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    watched: list[Tensor] = dataclasses.field(default_factory=list)


def _stacked(rows: list[Tensor]) -> np.ndarray:
    return torch.stack(rows).double().cpu().numpy() if rows else np.empty(0)


class AdamRows:
    """Steps several runs of :class:`~vifamily.solvers.Adam` together, from where they stand.

    Args:
        runs: Runs of one fit each, of one model, family, objective and solver, all after the same number of steps and
            none finished.
        stack: The task of all of them: their families stacked, their noise and fixed noise along a leading axis.

    Raises:
        ValueError: If the runs cannot be stepped together.
    """

    def __init__(self, runs: Sequence[AdamRun], stack: Task) -> None:
        self.runs, self.stack = list(runs), stack
        first = self.runs[0]
        if any(r.step_count != first.step_count or r.finished is not None for r in self.runs):
            raise ValueError("only runs that have taken the same number of steps and are not finished step together")
        if any(len(r.groups) != 1 or r.groups[0] is not r.flat or r.flat.rows != 1 for r in self.runs):
            raise ValueError("only runs of one fit, of a model without parameters of its own, step together")
        if any(r.objective_state is not None for r in self.runs):
            raise ValueError("runs of an objective that carries a state do not step together")
        self.step_count = first.step_count
        self.flat = FlatParameters(stack.family.parameters(), len(self.runs))
        if self.flat.value.shape[1] != first.flat.value.shape[1]:
            raise ValueError("the stacked families have other parameters than the runs")
        defaults = first.optimiser.defaults
        (self.beta1, self.beta2), self.eps = defaults["betas"], defaults["eps"]
        self.pending = _Pending()
        self._read()

    # -- between the rows and the runs ---------------------------------------------------------------------------------
    def _read(self) -> None:
        """Take up the states of the runs."""
        runs = self.runs
        self.flat.set(torch.cat([r.flat.value for r in runs]))
        self.sums = torch.cat([r.sums[0] for r in runs])
        self.gradient_sum = torch.cat([r.gradient_sum for r in runs])
        self.gradient_square = torch.cat([r.gradient_square for r in runs])
        self.first, self.second = torch.zeros_like(self.flat.value), torch.zeros_like(self.flat.value)
        self.counts = [0] * len(runs)
        for row, run in enumerate(runs):
            state = run.optimiser.state.get(run.optimiser.param_groups[0]["params"][0])
            if state:
                self.first[row], self.second[row] = state["exp_avg"][0], state["exp_avg_sq"][0]
                self.counts[row] = int(state["step"])

    def write(self) -> None:
        """Bring the runs to where the rows stand, so that each can go on alone."""
        losses, seen = _stacked(self.pending.losses), _stacked(self.pending.watched)
        terms = {name: _stacked(column) for name, column in self.pending.terms.items()}
        for row, run in enumerate(self.runs):
            run.flat.set(self.flat.value[row : row + 1])
            run.sums[0].copy_(self.sums[row : row + 1])
            run.gradient_sum.copy_(self.gradient_sum[row : row + 1])
            run.gradient_square.copy_(self.gradient_square[row : row + 1])
            run.gradient_count += len(losses)
            run.step_count = self.step_count
            if len(losses):
                own = {name: column[:, row : row + 1] for name, column in terms.items()}
                run.record(losses[:, row : row + 1], [run.step_size] * len(losses), own)
            if len(seen):
                run.monitor.add(torch.from_numpy(seen[:, row]))
            parameter = run.optimiser.param_groups[0]["params"][0]
            if self.counts[row]:
                run.optimiser.state[parameter] = {
                    "step": torch.tensor(float(self.counts[row])),
                    "exp_avg": self.first[row : row + 1].clone(),
                    "exp_avg_sq": self.second[row : row + 1].clone(),
                }
        self.pending = _Pending()

    # -- stepping ------------------------------------------------------------------------------------------------------
    def advance(
        self, most_steps: int, *, stop: Callable[[], bool] = lambda: False, deadline: float = math.inf
    ) -> list[int]:
        """Step until a run has ended or must go on alone; the runs are then where the rows are.

        Args:
            most_steps: Steps after which to return in any case.
            stop: Asked before every step; true returns.
            deadline: Value of ``time.monotonic`` after which to return.

        Returns:
            Rows that must go on alone, for their next step has a loss or a gradient that is not finite. Their own run
            says so when it takes that step.
        """
        rule = self.runs[0].rule
        while self.step_count < most_steps and not stop() and time.monotonic() < deadline:
            bad = self._step()
            if bad:
                self.write()
                return bad
            # every stage begins at a multiple of `check`, and that is one of `every`
            if self.step_count % rule.every == 0:
                self.pending.watched.append(self._watch())
            if self.step_count % rule.check == 0 and self._judge():
                return []
        self.write()
        return []

    def _step(self) -> list[int]:
        """Take one step, or none and return the rows in which it would not be finite."""
        task = self.stack
        with torch.enable_grad():
            loss: Loss = task.objective_loss(
                task.family, task.model, task.noise_at(self.step_count), task.batch_at(self.step_count), None
            )
            gradients = torch.autograd.grad(loss.surrogate.sum(), self.flat.parameters, allow_unused=True)
        if loss.state is not None:
            raise ValueError("runs of an objective that carries a state do not step together")
        gradient = self.flat.gather(gradients)
        value = loss.value.reshape(len(self.runs))
        fine = torch.isfinite(value) & torch.isfinite(gradient).all(1)
        if not bool(fine.all()):
            return [int(row) for row in (~fine).nonzero()[:, 0]]
        self._update(gradient)
        self.step_count += 1
        self.sums += self.flat.value
        self.gradient_sum += gradient
        self.gradient_square += gradient**2
        self.pending.losses.append(value)
        for name, term in loss.terms.items():
            self.pending.terms.setdefault(name, []).append(term.reshape(len(self.runs)))
        return []

    @torch.no_grad()
    def _update(self, gradient: Tensor) -> None:
        """One step of Adam (Kingma and Ba 2015, algorithm 1) with a step size and a count for each row."""
        self.counts = [count + 1 for count in self.counts]
        rates = [r.step_size / (1 - self.beta1**n) for r, n in zip(self.runs, self.counts, strict=True)]
        roots = [(1 - self.beta2**n) ** 0.5 for n in self.counts]
        self.first.lerp_(gradient, 1 - self.beta1)
        self.second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        scale = self.flat.value.new_tensor([rates, roots]).unsqueeze(-1)
        denominator = (self.second.sqrt() / scale[1]).add_(self.eps)
        self.flat.value.sub_(scale[0] * (self.first / denominator))

    def _watch(self) -> Tensor:
        """What each run would watch, ``(row, quantity)``."""
        rows = len(self.runs)
        seen = watched(self.stack.family, self.stack.monitor_noise, self.flat.value)
        if has_moments(self.stack.family):
            # all means of all rows come first, then all log sds
            seen = seen.reshape(2, rows, -1).movedim(0, 1)
        return seen.reshape(rows, -1)

    def _judge(self) -> bool:
        """Let every run judge its stage; returns whether one has ended."""
        self.write()
        for row, run in enumerate(self.runs):
            since = run.step_count - run.monitor.first_step
            if since != run.rule.next_check(since - 1):
                continue
            stage = run.stage
            run._snapshot()
            verdict = run.monitor.judge(run.step_count, run.unit())
            if verdict is None:
                continue
            run._end_stage(verdict)
            self.flat.value[row] = run.flat.value[0]
            if run.stage != stage and run.finished is None:
                # what belongs to a stage alone begins anew
                self.counts[row] = 0
                for kept in (self.first, self.second, self.gradient_sum, self.gradient_square):
                    kept[row] = 0
        return any(run.finished is not None for run in self.runs)
