"""Particles moved along a vector field until they come to rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, IncompatibleError, NonFiniteLossError
from vifamily.numerics.newton import value_and_gradient
from vifamily.registry import entry_name, register
from vifamily.solvers._base import Solver, StepReport, Task
from vifamily.solvers._history import History, RunWithHistory

__all__ = ["ParticleFlow"]

_WINDOW = 25
"""Steps over which movement is judged."""
_STAGE_WINDOWS = 20
_STAGES = 12
_SMALLEST = 0.02
"""Step size, in tolerances, from which on no smaller one is tried."""
_STILL = 2.0
"""Movement between two windows, in step sizes, below which a smaller step is taken; at most it is the window."""
_NEAR = 10.0
"""Distance left to go, in tolerances, beyond which particles that hardly move do not count as at rest."""
_FLOOR = 1e-3
"""Least spread of the particles, in standardised coordinates, that counts as a unit."""


@register("solvers", "particle_flow")
@dataclasses.dataclass(frozen=True)
class ParticleFlow(Solver):
    r"""Moves particles along the vector field of an objective (``svgd``) until nothing drives them any more.

    In the family's standardised coordinates every coordinate of every particle takes steps of Adam or Adagrad along its
    velocity :math:`\phi`. With :math:`\kappa_i` the mean size of the kernel between particle i and all,
    :math:`\phi_i / \kappa_i` is about the distance that is left to go, since a shift of all particles by
    :math:`\delta` changes :math:`\phi_i` by about :math:`\kappa_i \delta` in these coordinates. The fit ends when its
    root mean square over the particles, in units of their standard deviation, is below ``tolerance`` for every
    coordinate, on average over 25 steps. The step size is halved whenever the particles move, from one average over 25
    steps to the next, less than twice its length; what Adam or Adagrad remember is then forgotten.

    It ends too when halving the step size has twice in a row moved the particles, averaged over 25 steps, by less than
    ``tolerance`` and the distance left to go is below ten times that. On minibatches the velocity is noisy and never
    vanishes: there the halvings alone decide, and the average is the answer.

    Restarts run side by side and end together. The weights of the particles stay equal.

    Args:
        step_size: First step size in standardised coordinates; None takes the one that suits the family.
        method: ``"adam"`` or ``"adagrad"``.
        tolerance: Largest distance left to go, in posterior sds.

    Raises:
        ConfigError: If a number is not positive or there is no such method.

    Example:
        >>> from vifamily import registry
        >>> registry.build("solvers", "particle_flow(method=adagrad)").method
        'adagrad'
    """

    step_size: float | None = None
    method: str = "adam"
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        for name in ("step_size", "tolerance"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (value is not None or name != "step_size") and not (number and 0 < value < math.inf):
                raise ConfigError(f"particle_flow({name}=...) must be a positive number, got {value!r}.")
        if self.method not in ("adam", "adagrad"):
            raise ConfigError(f"particle_flow(method=...) is 'adam' or 'adagrad', got {self.method!r}.")

    def default_family(self) -> str:
        """Fifty particles."""
        return "ensemble(size=50)"

    def check_objective(self, objective: Any) -> None:
        """Refuse an objective that moves no particles (see :class:`~vifamily.solvers._base.Solver`)."""
        if not hasattr(objective, "flow"):
            raise IncompatibleError(
                f"the solver 'particle_flow' moves particles along an objective's vector field, and "
                f"{entry_name(objective)!r} has none: use objective='svgd', or another solver.",
                missing=("a vector field on particles",),
                works_with={"objectives": ["svgd"]},
            )

    def start(self, task: Task) -> ParticleRun:
        """Begin a run."""
        self.check_objective(task.objective)
        return ParticleRun(task, self.step_size or task.step_size, self.method, self.tolerance)


class ParticleRun(RunWithHistory):
    """One run of :class:`ParticleFlow`; its state is ``points`` ``(restart, particle, dim)``, in float64."""

    def __init__(self, task: Task, step_size: float, method: str, tolerance: float) -> None:
        self.task, self.step_size, self.method, self.tolerance = task, step_size, method, tolerance
        points = task.family.particles()
        self.points = (points if task.restarts > 1 else points.unsqueeze(0)).double()
        self.step_count, self.stage, self.stage_step, self.quiet = 0, 0, 0, 0
        self.left = float("nan")
        self.memory = self._forget()
        self.sums = self._empty_sums()
        self.before: Tensor | None = None
        self.last_stage: Tensor | None = None
        self.history = History(task.restarts)
        self.notes: list[str] = []
        caution = task.objective.caution(*self.points.shape[-2:])
        if caution is not None:
            self.notes.append(caution)
        self.finished: str | None = None

    def _forget(self) -> tuple[Tensor, Tensor, int]:
        """First and second moments of the velocity, and the steps they hold."""
        return torch.zeros_like(self.points), torch.zeros_like(self.points), 0

    def _empty_sums(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Sums over a window: positions, distances left to go, their squares; and their number."""
        zero = torch.zeros_like(self.points)
        return zero, zero, zero, 0

    # -- one step ------------------------------------------------------------------------------------------------------
    def _value_and_score(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint ``(restart, particle)`` and its gradient in standardised coordinates."""
        task, batch = self.task, self.task.batch_at(self.step_count)
        stacked, dtype = task.restarts > 1, task.monitor_noise.dtype

        def log_joint(u: Tensor) -> Tensor:
            at = u.to(dtype)
            out: Tensor = task.model.log_joint(task.family.to_latent(at if stacked else at[0]), batch)
            return (out if stacked else out.unsqueeze(0)).double()

        return value_and_gradient(log_joint, points)

    def step(self) -> StepReport:
        """Take one step; a run that has ended stays as it is (see :class:`~vifamily.solvers._base.Run`)."""
        if self.finished is not None:
            return self._report()
        value, score = self._value_and_score(self.points)
        attraction = self.task.objective.attraction(self.step_count)
        flow = self.task.objective.flow(self.points, score, attraction=attraction)
        terms = {
            "log_joint": value.mean(-1), "largest_score": score.abs().amax((-2, -1)), "bandwidth": flow.bandwidth,
            "attraction": torch.full_like(flow.bandwidth, attraction),
        }  # fmt: skip
        self._check_finite(value, score, flow)
        self.points = self.points + self._move(flow.direction)
        means = {name: float(term.mean()) for name, term in terms.items()}
        self.history.add(flow.discrepancy.tolist(), self.step_size, means)
        self.step_count += 1
        if self.step_count > self.task.objective.annealing_steps:
            self._watch(flow.direction / flow.strength.clamp_min(1e-12).unsqueeze(-1))
        return self._report()

    def _move(self, direction: Tensor) -> Tensor:
        first, second, count = self.memory
        count += 1
        if self.method == "adagrad":
            second = second + direction.square()
            self.memory = (first, second, count)
            return self.step_size * direction / (second.sqrt() + 1e-12)
        first, second = 0.9 * first + 0.1 * direction, 0.99 * second + 0.01 * direction.square()
        self.memory = (first, second, count)
        return self.step_size * (first / (1 - 0.9**count)) / ((second / (1 - 0.99**count)).sqrt() + 1e-12)

    def _check_finite(self, value: Tensor, score: Tensor, flow: Any) -> None:
        parts = {"log_joint": value, "the score": score, "the velocity": flow.direction, "the loss": flow.discrepancy}
        bad = [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
        if bad:
            raise NonFiniteLossError(
                f"step {self.step_count}: {bad[0]} is not finite, first seen in the parameter 'points'; loss "
                f"{flow.discrepancy.tolist()}. The fit stopped at its last finite state. Usual causes: a density that "
                "overflows far from its mode, a start point outside the support, or too large a step size.",
                step=self.step_count,
                term=bad[0],
                parameter="points",
            )

    def _report(self) -> StepReport:
        history = self.history
        annealing = self.step_count <= self.task.objective.annealing_steps and self.task.objective.annealing_steps > 0
        phase = "annealing" if annealing else f"stage {self.stage + 1}"
        used = self.step_size if history.last_step_size is None else history.last_step_size
        return StepReport(self.step_count, history.last_losses, history.last_terms, used, self.finished, phase)

    # -- stages --------------------------------------------------------------------------------------------------------
    def _unit(self) -> Tensor:
        """Standard deviation of the particles ``(restart, 1, dim)``; one for a single particle."""
        if self.points.shape[-2] == 1:
            return torch.ones_like(self.points)
        spread: Tensor = self.points.std(-2, correction=0, keepdim=True)
        return spread.clamp_min(_FLOOR)

    def _size(self, apart: Tensor) -> float:
        """Largest root mean square over particles of a displacement, in standard deviations."""
        return float((apart / self._unit()).square().mean(-2).sqrt().max())

    def _watch(self, left: Tensor) -> None:
        """Add a step to the window; at its end, judge whether to stop or to take smaller steps."""
        position, total, square, count = self.sums
        self.sums = (position + self.points, total + left, square + left.square(), count + 1)
        self.stage_step += 1
        if count + 1 < _WINDOW:
            return
        now = self.sums[0] / _WINDOW
        noisy = self.task.batch_at(self.step_count - 1) is not None
        # noise of minibatches averages out, swinging about a point of rest must not
        typical = self.sums[1] / _WINDOW if noisy else (self.sums[2] / _WINDOW).sqrt()
        self.left = self._size(typical)
        moved = math.inf if self.before is None else self._size(now - self.before)
        self.before, self.sums = now, self._empty_sums()
        if not noisy and self.left < self.tolerance:
            self.finished = "converged"
        elif moved < _STILL * self.step_size or self.stage_step >= _STAGE_WINDOWS * _WINDOW:
            self._end_stage(now, noisy=noisy, slow=moved >= _STILL * self.step_size)

    def _end_stage(self, now: Tensor, *, noisy: bool, slow: bool) -> None:
        change = math.inf if self.last_stage is None else self._size(now - self.last_stage)
        # without noise, steps that have become too short to move anything must not pass for rest
        rest = noisy or self.left < _NEAR * self.tolerance
        self.quiet = self.quiet + 1 if change < self.tolerance and not slow and rest else 0
        self.last_stage = now
        if self.quiet >= 2:
            self.finished = "converged"
        elif self.stage + 1 >= _STAGES and self.step_size < _SMALLEST * self.tolerance:
            self.finished = "smallest_step"
        if self.finished is not None:
            return
        self.stage, self.stage_step = self.stage + 1, 0
        self.step_size *= 0.5
        self.before, self.memory = None, self._forget()

    # -- output --------------------------------------------------------------------------------------------------------
    def output(self) -> Mapping[str, Any]:
        """Put the particles into the family (see :class:`~vifamily.solvers._base.Run`)."""
        noisy = self.task.batch_at(max(self.step_count - 1, 0)) is not None
        points = self.before if noisy and self.before is not None and self.finished is None else self.points
        if noisy and self.finished is not None and self.last_stage is not None:
            points = self.last_stage
        self.task.family.set_particles((points if self.task.restarts > 1 else points[0]).to(self.task.monitor_noise))
        _, score = self._value_and_score(points)
        return {
            "losses": self.task.objective.flow(points, score).discrepancy.tolist(), "rhat": float("nan"),
            "mcse": float("nan"), "gradient_snr": None, "change": self.left,
            "notes": (*self.notes, f"the particles have about {self.left:.2g} posterior sds left to go"),
        }  # fmt: skip

    # -- writing down --------------------------------------------------------------------------------------------------
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state (see :class:`~vifamily.solvers._base.Run`)."""
        out = {
            "points": self.points, "memory/first": self.memory[0], "memory/second": self.memory[1],
            "sum/position": self.sums[0], "sum/left": self.sums[1], "sum/square": self.sums[2],
            **self.history.tensors(),
        }  # fmt: skip
        out = {name: tensor.clone() for name, tensor in out.items()}
        for name, tensor in (("before", self.before), ("last_stage", self.last_stage)):
            if tensor is not None:
                out[name] = tensor.clone()
        values = {
            "step": self.step_count, "stage": self.stage, "stage_step": self.stage_step, "quiet": self.quiet,
            "step_size": self.step_size, "left": None if math.isnan(self.left) else self.left,
            "remembered": self.memory[2], "summed": self.sums[3], "notes": list(self.notes), "finished": self.finished,
        }  # fmt: skip
        return out, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state (see :class:`~vifamily.solvers._base.Run`)."""
        if tensors["points"].shape != self.points.shape:
            raise ValueError(f"the particles have the shape {tuple(self.points.shape)}, the saved ones have not")
        self.points = tensors["points"].clone()
        self.memory = (tensors["memory/first"].clone(), tensors["memory/second"].clone(), int(values["remembered"]))
        sums = [tensors[f"sum/{name}"].clone() for name in ("position", "left", "square")]
        self.sums = (sums[0], sums[1], sums[2], int(values["summed"]))
        self.before, self.last_stage = tensors.get("before"), tensors.get("last_stage")
        self.step_count, self.stage, self.stage_step, self.quiet = (
            int(values[name]) for name in ("step", "stage", "stage_step", "quiet")
        )
        self.step_size, self.notes, self.finished = (
            float(values["step_size"]),
            list(values["notes"]),
            values["finished"],
        )
        self.left = float("nan") if values["left"] is None else float(values["left"])
        self.history.restore(tensors)
