"""Runs whose state is a Gaussian: a mean and a matrix per restart, averaged at step sizes that are halved.

The scheme is that of :mod:`vifamily.solvers._stopping`: at each step size until the iterates are stationary and their
average is known, then half of it, until halving changes nothing. Where the steps themselves stop moving the state, on
fresh draws each time, it is a fixed point, and nothing is left to average.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import NonFiniteLossError
from vifamily.solvers._base import StepReport, Task
from vifamily.solvers._history import History, RunWithHistory, number, plain
from vifamily.solvers._stopping import StageMonitor, StoppingRule
from vifamily.solvers._trail import Trail
from vifamily.types import Capability

__all__ = ["GaussianRun", "factor_of"]

_SNAPSHOTS = 32
_STILL_STEPS = 10
_STILL = 1e-7
_MOST_WATCHED = 400


def factor_of(matrix: Tensor) -> Tensor:
    """Lower-triangular factor of symmetric matrices; those that rounding made indefinite are lifted first."""
    symmetric = 0.5 * (matrix + matrix.mT)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(symmetric)
    if not bool((info > 0).any()) or not bool(torch.isfinite(symmetric).all()):
        return factor
    values, vectors = torch.linalg.eigh(symmetric)
    floor = 1e-14 * values.amax(-1, keepdim=True)
    lifted = vectors * values.clamp_min(0).add(floor).unsqueeze(-2) @ vectors.mT
    lifted_factor: Tensor = torch.linalg.cholesky(0.5 * (lifted + lifted.mT))
    return lifted_factor


class GaussianRun(RunWithHistory):
    """A run over means ``(restart, dim)`` and matrices in the family's standardised coordinates, in float64.

    Subclasses advance ``mean`` and ``matrix`` (never in place) and say what the matrix is.

    Args:
        task: What is to be solved.
        rule: Thresholds of the stages.
        step_size: First step size.
    """

    def __init__(self, task: Task, rule: StoppingRule, step_size: float) -> None:
        self.task, self.rule, self.step_size = task, rule, step_size
        with torch.no_grad():
            mean, covariance = task.family.standard_moments()
        stacked = task.restarts > 1
        self.mean = (mean if stacked else mean.unsqueeze(0)).detach().double()
        self.begin((covariance if stacked else covariance.unsqueeze(0)).detach().double())
        self.step_count, self.stage, self.still = 0, 0, 0
        self.slowness = 1.0
        self.monitor = StageMonitor(self._stage_rule(), 0, rule.rough)
        self.sums = (torch.zeros_like(self.mean), torch.zeros_like(self.matrix))
        self.snapshots: list[tuple[int, tuple[Tensor, Tensor]]] = [(0, self.sums)]
        self.previous: Tensor | None = None
        self.change, self.previous_error = float("nan"), float("inf")
        self.history = History(task.restarts)
        self.notes: list[str] = []
        if Capability.POINT_PARAMETERS in frozenset(getattr(task.model, "capabilities", ())):
            self.notes.append("the model's own parameters stay as they are: this solver moves the family only")
        self.finished: str | None = None

    # -- to implement --------------------------------------------------------------------------------------------------
    matrix: Tensor
    """The averaged matrix of the Gaussian: its covariance or its precision."""

    @abc.abstractmethod
    def begin(self, covariance: Tensor) -> None:
        """Set the matrix, and what goes with it, from covariances."""

    @abc.abstractmethod
    def renew(self) -> None:
        """Recompute what goes with the matrix (a factor)."""

    @abc.abstractmethod
    def advance(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Set the next mean and matrix; returns the loss before the step per restart, and its terms."""

    @abc.abstractmethod
    def variances(self) -> Tensor:
        """Marginal variances of the Gaussian, ``(restart, dim)``."""

    @abc.abstractmethod
    def scale(self, matrix: Tensor) -> Tensor:
        """What ``start_at`` takes for a matrix: factors of the covariance, or standard deviations."""

    # -- one step ------------------------------------------------------------------------------------------------------
    def log_joint(self, step: int) -> Callable[[Tensor], Tensor]:
        """Return the log joint as a function of standardised coordinates, ``(restart, n, dim) -> (restart, n)``."""
        task, batch = self.task, self.task.batch_at(step)
        dtype = task.monitor_noise.dtype

        def evaluate(u: Tensor) -> Tensor:
            points = u.to(dtype)
            z = task.family.to_latent(points if task.restarts > 1 else points[0])
            out: Tensor = task.model.log_joint(z, batch)
            return (out if task.restarts > 1 else out.unsqueeze(0)).double()

        return evaluate

    def noise(self, step: int) -> Tensor:
        """Base noise of a step, ``(restart, draw, dim)``."""
        noise = self.task.noise_at(step).double()
        return noise if self.task.restarts > 1 else noise.unsqueeze(0)

    def step(self) -> StepReport:
        """Take one step; a run that has ended stays as it is (see :class:`~vifamily.solvers._base.Run`)."""
        if self.finished is not None:
            return self._report()
        step, used, before = self.step_count, self.step_size, (self.mean, self.matrix)
        row = self._watched()
        loss, terms = self.advance(step)
        self._check_finite(loss, terms, before)
        now = self._watched()
        self.step_count += 1
        self.history.add(loss.tolist(), used, {name: float(term.mean()) for name, term in terms.items()})
        self.sums = (self.sums[0] + self.mean, self.sums[1] + self.matrix)
        self._judge(now, float(((now - row).abs() / self._unit(now)).max()))
        return self._report()

    def _check_finite(self, loss: Tensor, terms: Mapping[str, Tensor], before: tuple[Tensor, Tensor]) -> None:
        parts = {**terms, "the loss": loss, "the mean": self.mean, "the covariance": self.matrix}
        bad = [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
        if not bad:
            return
        self.mean, self.matrix = before
        self.renew()
        raise NonFiniteLossError(
            f"step {self.step_count}: {bad[0]} is not finite; loss {loss.tolist()}. The fit stopped at its last finite "
            "state. Usual causes: a density that overflows far from its mode, or a start point outside the support.",
            step=self.step_count,
            term=bad[0],
        )

    def _report(self) -> StepReport:
        history = self.history
        phase = f"stage {self.stage + 1}" + (", averaging" if self.monitor.stationary_from is not None else "")
        used = self.step_size if history.last_step_size is None else history.last_step_size
        return StepReport(self.step_count, history.last_losses, history.last_terms, used, self.finished, phase)

    # -- stages --------------------------------------------------------------------------------------------------------
    def _stage_rule(self) -> StoppingRule:
        """Thresholds for the step size: the state forgets over ``slowness / step_size`` steps, watched as rarely."""
        every = max(1, round(0.5 * self.slowness / self.step_size))
        base = self.rule
        return dataclasses.replace(
            base, every=every, window=every * base.window, check=every * base.check, stage=every * base.stage
        )

    def _watched(self) -> Tensor:
        mean = self.mean[:, :_MOST_WATCHED].reshape(-1)
        return torch.cat([mean, 0.5 * self.variances()[:, :_MOST_WATCHED].reshape(-1).log()])

    def _unit(self, row: Tensor) -> Tensor:
        _, log_sd = row.chunk(2)
        return torch.cat([log_sd.exp(), torch.ones_like(log_sd)])

    def _judge(self, row: Tensor, moved: float) -> None:
        self.still = self.still + 1 if moved < _STILL * min(1.0, self.step_size) else 0
        if self.still >= _STILL_STEPS:
            # fresh draws at each of these steps, and none of them moved it
            self.change, self.monitor.error, self.monitor.rhat = 0.0, 0.0, 1.0
            self.finished = "converged"
            return
        since = self.step_count - self.monitor.first_step
        if since % self.monitor.rule.every == 0:
            self.monitor.add(row)
        if since % self.monitor.rule.check == 0:
            self.snapshots.append((self.step_count, self.sums))
            if len(self.snapshots) > _SNAPSHOTS:
                self.snapshots = [self.snapshots[0], *self.snapshots[1:-1:2], self.snapshots[-1]]
            verdict = self.monitor.judge(self.step_count, self._unit(row))
            if verdict is not None:
                self._end_stage(verdict)

    def average(self) -> tuple[Tensor, Tensor]:
        """Average of the state over the stationary window, or the last half of the stage before there is one."""
        now = self.step_count
        start = self.monitor.stationary_from
        if start is None:
            start = (self.monitor.first_step + now) // 2
        earlier = [s for s in self.snapshots if s[0] < now]
        if not earlier:
            return self.mean, self.matrix
        at, base = min(earlier, key=lambda s: abs(s[0] - start))
        mean, matrix = ((total - old) / (now - at) for total, old in zip(self.sums, base, strict=True))
        return mean, matrix

    def _end_stage(self, verdict: str) -> None:
        self.mean, self.matrix = self.average()
        self.renew()
        if verdict == "slow":
            settled = self.monitor.stationary_from is not None
            what = "were not averaged well enough" if settled else "did not become stationary"
            self.notes.append(
                f"the iterates at step size {self.step_size:.3g} {what} within {self.monitor.rule.stage} steps"
            )
        row = self._watched()
        if self.previous is not None:
            self.change = float(((row - self.previous).abs() / self._unit(row)).max())
        # a change that the Monte-Carlo errors of the two averages explain is no change
        noise = 2 * math.hypot(self.monitor.error, self.previous_error)
        small = self.change < min(max(self.rule.tolerance, noise), 2 * self.rule.tolerance)
        known = max(self.monitor.error, 0.5 * self.previous_error) < self.rule.mcse
        if small and self.stage >= 2 and verdict == "done" and known:
            self.finished = "converged"
            return
        if self.stage + 1 >= self.rule.stages:
            self.finished = "smallest_step"
            return
        self.stage += 1
        self.previous, self.previous_error = row, self.monitor.error
        self.step_size *= self.rule.shrink
        near = self.change < max(4 * self.rule.tolerance, noise)
        goal = self.rule.mcse if near else self.rule.rough
        self.monitor = StageMonitor(self._stage_rule(), self.step_count, goal)
        self.snapshots = [(self.step_count, self.sums)]

    # -- output --------------------------------------------------------------------------------------------------------
    def final_losses(self) -> list[float]:
        """Loss per restart of the family as it stands, on fixed noise."""
        value = self.task.objective_loss(
            self.task.family, self.task.model, self.task.monitor_noise, self.task.batch_at(0), None
        ).value
        losses: list[float] = value.reshape(-1).tolist()
        return losses

    def output(self) -> Mapping[str, Any]:
        """Write the averaged Gaussian into the family (see :class:`~vifamily.solvers._base.Run`)."""
        done = self.finished is not None or self.step_count == self.monitor.first_step
        mean, matrix = (self.mean, self.matrix) if done else self.average()
        scale = self.scale(matrix)
        if self.task.restarts > 1:
            self.task.family.start_at(mean, scale)
        else:
            self.task.family.start_at(mean[0], scale[0])
        return {
            "losses": self.final_losses(), "rhat": self.monitor.rhat, "mcse": self.monitor.error,
            "gradient_snr": None, "notes": tuple(self.notes), "change": self.change,
        }  # fmt: skip

    # -- writing down --------------------------------------------------------------------------------------------------
    def extra_tensors(self) -> dict[str, Tensor]:
        """Tensors of the subclass that cannot be recomputed."""
        return {}

    def take_extra(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up :meth:`extra_tensors`."""

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state (see :class:`~vifamily.solvers._base.Run`)."""
        out = {"mean": self.mean, "matrix": self.matrix, "sum/mean": self.sums[0], "sum/matrix": self.sums[1],
               **self.history.tensors(), **self.extra_tensors()}  # fmt: skip
        for i, (_, (mean, matrix)) in enumerate(self.snapshots):
            out[f"snapshot/{i}/mean"], out[f"snapshot/{i}/matrix"] = mean, matrix
        if self.monitor.rows is not None:
            out["monitor"] = self.monitor.rows.tensor()
        if self.previous is not None:
            out["previous"] = self.previous
        values = {
            "step": self.step_count, "stage": self.stage, "still": self.still,
            "slowness": self.slowness, "step_size": self.step_size,
            "change": plain(self.change), "previous_error": plain(self.previous_error), "notes": list(self.notes),
            "finished": self.finished, "snapshots": [at for at, _ in self.snapshots],
            "first_step": self.monitor.first_step, "goal": self.monitor.goal,
            "stationary_from": self.monitor.stationary_from, "rhat": plain(self.monitor.rhat),
            "error": plain(self.monitor.error),
        }  # fmt: skip
        return {name: tensor.clone().contiguous() for name, tensor in out.items()}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state (see :class:`~vifamily.solvers._base.Run`)."""
        if tensors["mean"].shape != self.mean.shape:
            raise ValueError(f"the means have the shape {tuple(self.mean.shape)}, the saved ones have not")
        self.step_count, self.stage, self.still = (int(values[k]) for k in ("step", "stage", "still"))
        self.step_size, self.notes, self.finished = (
            float(values["step_size"]),
            list(values["notes"]),
            values["finished"],
        )
        self.slowness = float(values["slowness"])
        self.change, self.previous_error = number(values["change"]), number(values["previous_error"])
        self.mean, self.matrix = tensors["mean"].clone(), tensors["matrix"].clone()
        self.sums = (tensors["sum/mean"].clone(), tensors["sum/matrix"].clone())
        self.snapshots = [
            (int(at), (tensors[f"snapshot/{i}/mean"].clone(), tensors[f"snapshot/{i}/matrix"].clone()))
            for i, at in enumerate(values["snapshots"])
        ]
        self.monitor = StageMonitor(self._stage_rule(), int(values["first_step"]), float(values["goal"]))
        self.monitor.stationary_from = values["stationary_from"]
        self.monitor.rhat, self.monitor.error = number(values["rhat"]), number(values["error"])
        self.monitor.rows = Trail.of(tensors["monitor"]) if "monitor" in tensors else None
        self.previous = tensors.get("previous")
        self.history.restore(tensors)
        self.renew()
        self.take_extra(tensors)
