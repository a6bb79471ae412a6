"""Two players: a family that descends and a critic that ascends, by simultaneous steps of Adam."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, IncompatibleError
from vifamily.registry import entry_name, register
from vifamily.rng import draw_noise, generator
from vifamily.solvers._adam_run import AdamRun
from vifamily.solvers._base import Solver, StepReport, Task
from vifamily.solvers._flat import FlatParameters
from vifamily.solvers._stopping import StoppingRule
from vifamily.types import Capability, GameState, Loss

__all__ = ["TwoPlayer"]

_AUDIT_DRAWS = 1024
_AUDIT_STEP = 0.01
"""Least step size of the critic in the audit: one too slow in the game would be so there as well."""
_RECENT = 200
"""Steps whose mean value stands for what the critic had."""
_LARGE = 0.05
"""Divergence per coordinate, in standardised units, above which the notes say that the family does not match."""


@register("solvers", "two_player")
@dataclasses.dataclass(frozen=True)
class TwoPlayer(Solver):
    r"""Drives games (``operator``, ``roc_arc_critic``): the family descends on a value, a critic ascends on it.

    Both take one step of Adam on the same draws, from the gradients at the point where both stand (simultaneous, not
    nested, steps); ``inner`` above one gives the critic further steps on draws of their own beforehand. The value of a
    game falls and rises, so it says nothing about convergence. What is watched is the family: means and log sds of its
    coordinates. At each step size they are watched until stationary (split R-hat) and averaged until the Monte-Carlo
    error of their averages is below ``mcse``; then the family's step size is halved, until that changes no average by
    more than ``tolerance`` posterior sds; the critic keeps its pace. Even then the fit goes on if the critic, trained
    on while the family waits, finds more than it had.

    At the end the averaged and the last family are audited: each stays where it is, the critic is trained on for
    ``audit`` steps on fresh draws, and its value on further fresh draws counts. The better one is the answer, and the
    notes report what was found. Restarts are compared by that value too, as what the critic reached on the draws of
    training is optimistic, and of a critic that lags behind says nothing. Stationary iterates may also mean that the
    critic sees no difference where there is one; the audit shows it only as far as that critic can learn to see it.

    Args:
        step_size: First step size of the family; None takes a tenth of what suits the family with ``adam``,
            for Gaussians a fifth.
        critic_step_size: Step size of the critic.
        inner: Steps of the critic for each of the family.
        tolerance: Largest change on halving the step size, in posterior sds and log sds.
        mcse: Largest Monte-Carlo error of the averages, in the same units.
        audit: Steps of the critic in the audit.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> from vifamily import registry
        >>> registry.build("solvers", "two_player(inner=2)").inner
        2
    """

    step_size: float | None = None
    critic_step_size: float = 0.01
    inner: int = 1
    tolerance: float = 0.03
    mcse: float = 0.03
    audit: int = 200

    def __post_init__(self) -> None:
        for name in ("step_size", "critic_step_size", "tolerance", "mcse"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (value is not None or name != "step_size") and not (number and 0 < value < math.inf):
                raise ConfigError(f"two_player({name}=...) must be a positive number, got {value!r}.")
        for name, least in (("inner", 1), ("audit", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"two_player({name}=...) must be an integer of at least {least}, got {value!r}.")

    def check_objective(self, objective: Any) -> None:
        """Refuse an objective without a second player (see :class:`~vifamily.solvers._base.Solver`)."""
        if getattr(objective, "own_solver", None) != entry_name(self):
            raise IncompatibleError(
                f"the solver 'two_player' drives games of a family against a critic, and {entry_name(objective)!r} has "
                "no critic: use objective='operator' or 'roc_arc_critic', or another solver.",
                missing=("a critic",),
                works_with={"objectives": ["operator", "roc_arc_critic"]},
            )

    def start(self, task: Task) -> TwoPlayerRun:
        """Begin a run."""
        self.check_objective(task.objective)
        return TwoPlayerRun(task, self)


class TwoPlayerRun(AdamRun):
    """One run of :class:`TwoPlayer`: that of ``adam`` with a critic for a second group, whose gradient is turned round.

    Args:
        task: What is to be minimised; its objective state holds the critic.
        settings: Hyper-parameters.
    """

    def __init__(self, task: Task, settings: TwoPlayer) -> None:
        self.settings = settings
        rule = StoppingRule(tolerance=settings.tolerance, mcse=settings.mcse)
        # samplers move by their whole network, and must not outrun the critic
        share = 0.2 if Capability.GAUSSIAN in task.family.capabilities else 0.1
        first = settings.step_size or share * task.step_size
        super().__init__(dataclasses.replace(task, compiled=False), rule, first, settings.critic_step_size / first)
        self.objective_state = self.game

    def _others(self) -> FlatParameters:
        state = self.task.objective_state
        if not isinstance(state, GameState):
            raise ConfigError(
                "two_player needs the objective's state with its critic: start it by objective.init_state."
            )
        # a run changes its critic, and the task may start other runs
        self.game = dataclasses.replace(state, critic=copy.deepcopy(state.critic))
        self.task = dataclasses.replace(self.task, objective_state=self.game)
        return FlatParameters(self.game.critic.parameters(), 1)

    def _owner(self, group: FlatParameters) -> Any:
        return self.task.family if group is self.flat else self.game.critic

    # -- one step ------------------------------------------------------------------------------------------------------
    def step(self) -> StepReport:
        """Take one step of both players, after those of the critic alone (see :class:`Run`)."""
        for k in range(self.settings.inner - 1):
            loss, values, packed = self._ascent(self.step_count * self.settings.inner + k)
            self._check_finite(loss, values, packed)
            self._move(packed)
            self.objective_state = loss.state
        return super().step()

    def _move(self, packed: list[Tensor]) -> None:
        for held, gradient in zip(self.optimiser.param_groups, packed, strict=True):
            held["params"][0].grad = gradient
        # a group without a gradient stays, and so do its moments
        self.optimiser.param_groups[0]["params"][0].grad = None
        self.optimiser.step()

    def _evaluate(self, step: int) -> tuple[Loss, list[float], list[Tensor]]:
        inner = self.settings.inner
        loss, values, (family, critic) = super()._evaluate(step * inner + inner - 1)
        return loss, values, [family, -critic]

    def _ascent(self, index: int, noise: Tensor | None = None) -> tuple[Loss, list[float], list[Tensor]]:
        """Value and the critic's gradient alone, the family held where it is."""
        with held(self.flat.parameters), torch.enable_grad():
            at = self.task.noise_at(index) if noise is None else noise
            loss = self._loss(at, index)
            gradients = torch.autograd.grad(loss.surrogate.sum(), self.model_flat.parameters, allow_unused=True)
        zero = torch.zeros_like(self.flat.value)
        return loss, loss.value.reshape(-1).tolist(), [zero, -self.model_flat.gather(gradients)]

    def _rate(self, group: FlatParameters) -> float:
        # the critic keeps its pace while the family slows down, so that it follows ever more closely
        return self.step_size if group is self.flat else self.settings.critic_step_size

    # -- stages --------------------------------------------------------------------------------------------------------
    def _settled(self) -> Tensor:
        """Average of what is watched over the stationary part of the stage."""
        rows = self.monitor.rows
        since = 0 if self.monitor.stationary_from is None else self.monitor.stationary_from - self.monitor.first_step
        if rows is None:
            return self.watch()
        chain = torch.from_numpy(rows.rows)
        return chain[min(since // self.rule.every, len(chain) - 1) :].mean(0)

    def _end_stage(self, verdict: str) -> None:
        """Judge whether smaller steps changed anything, and make them smaller; the players stay where they are."""
        self._note_verdict(verdict)
        row = self._settled()
        small, near = self._compare(row)
        if small and self.stage >= 2 and verdict == "done" and self.monitor.error < self.rule.mcse:
            if not self._lagged():
                self.finished = "converged"
                return
            if self.stage + 1 < self.rule.stages:
                # on from here at the same pace, against the critic that was trained on
                self.stage += 1
                self.previous, self.previous_error = row, self.monitor.error
                self._new_stage(self.rule.mcse)
                return
        self.previous_error, self.stage = self.monitor.error, self.stage + 1
        if self.stage >= self.rule.stages:
            self.finished = "smallest_step"
            return
        self.previous = row
        self.step_size *= self.rule.shrink
        for group, one in zip(self.groups, self.optimiser.param_groups, strict=True):
            one["lr"] = self._rate(group)
        self._new_stage(self.rule.mcse if near else self.rule.rough)

    def _new_stage(self, goal: float) -> None:
        self._begin_watch(self.step_count, goal)
        self._forget()

    def _lagged(self) -> bool:
        """Whether the critic, trained on against the family as it stands, finds more than it had; it then stays so."""
        tau, state = getattr(self.task.objective, "tau", None), self.objective_state
        if tau is None or not self.settings.audit:
            return False
        kept = self.model_flat.value.clone(), copy.deepcopy(self.optimiser.state)
        before = torch.from_numpy(self.history.losses.rows[-_RECENT:].copy())
        found = self._audit(self.flat.value.clone(), keep=True)["value"].double()
        error = torch.hypot(before.std(0) / math.sqrt(len(before)), found.std(0) / math.sqrt(len(found)))
        least = _LARGE * self.task.family.latent.dim / (4 * tau)
        if bool((found.mean(0) - before.mean(0) > least + 3 * error).any()):
            self.notes.append(f"step {self.step_count}: the critic had lagged behind, and was trained on")
            return True
        self.model_flat.set(kept[0])
        self.optimiser.state.clear()
        self.optimiser.state.update(kept[1])
        self.objective_state = state
        return False

    # -- the answer ----------------------------------------------------------------------------------------------------
    def _audit(self, value: Tensor, *, keep: bool = False) -> dict[str, Tensor]:
        """Train the critic on against a family that stays, and evaluate it on fresh draws.

        Args:
            value: Parameters of the family.
            keep: Whether the critic stays as it was trained; otherwise nothing is changed.

        Returns:
            The value and its terms on eight sets of fresh draws, name to ``(8, restart)``.
        """
        kept = [g.value.clone() for g in self.groups]
        kept_state = {p: {k: v.clone() for k, v in s.items()} for p, s in self.optimiser.state.items()}
        counted = self.objective_state
        self.flat.set(value)
        source = generator(self.task.seed, "audit", self.task.first_restart)
        last = self.step_count * self.settings.inner
        pace = max(self.settings.critic_step_size, _AUDIT_STEP)
        for k in range(self.settings.audit):
            self.optimiser.param_groups[1]["lr"] = pace * 0.03 ** (k / self.settings.audit)
            loss, _, packed = self._ascent(last + k, self._fresh(source, self.task.draws))
            if not bool(torch.isfinite(packed[1]).all()):
                break
            self._move(packed)
            self.objective_state = loss.state
        rows: dict[str, list[Tensor]] = {}
        for k in range(8):
            with torch.no_grad():
                loss = self._loss(self._fresh(source, max(64, _AUDIT_DRAWS // self.task.restarts)), last + k)
            for name, part in {"value": loss.value, **loss.terms}.items():
                rows.setdefault(name, []).append(part.reshape(-1))
        self.flat.set(kept[0])
        self.optimiser.param_groups[1]["lr"] = self.settings.critic_step_size
        if not keep:
            self.model_flat.set(kept[1])
            self.optimiser.state.clear()
            self.optimiser.state.update(kept_state)
            self.objective_state = counted
        return {name: torch.stack(parts) for name, parts in rows.items()}

    def _fresh(self, source: torch.Generator, draws: int) -> Tensor:
        family, like = self.task.family, self.task.monitor_noise
        leading = (draws,) if self.task.restarts == 1 else (self.task.restarts, draws)
        return draw_noise(family.noise_spec, leading, source, dtype=like.dtype, device=like.device)

    def output(self) -> Mapping[str, Any]:
        """Write the better of the averaged and the last family (see :class:`~vifamily.solvers._base.Run`)."""
        last, average = self.flat.value.clone(), self.average()[0]
        found = [self._audit(value) for value in (average, last)]
        score = [f["value"].mean(0).nan_to_num(math.inf, posinf=math.inf, neginf=math.inf) for f in found]
        apart = (found[0]["value"] - found[1]["value"]).std(0) / math.sqrt(8)
        chosen = score[1] < score[0] - 2 * apart.nan_to_num(0.0)
        self.flat.set(torch.where(chosen.unsqueeze(-1), last, average))
        rows = {k: torch.where(chosen, found[1][k], found[0][k]) for k in found[0]}
        return {
            "losses": rows["value"].mean(0).tolist(),
            "rhat": self.monitor.rhat,
            "mcse": self.monitor.error,
            "gradient_snr": self._gradient_snr(),
            "notes": (*self.notes, *self._report_of(rows, int(chosen.sum()))),
            "change": self.change,
        }

    def _report_of(self, rows: dict[str, Tensor], last: int) -> list[str]:
        """What the audit found, in words."""
        best = int(rows["value"].mean(0).nan_to_num(math.inf).argmin())
        said = [
            f"{name} {float(part[:, best].mean()):.3g} ± {float(part[:, best].std()) / math.sqrt(8):.1g}"
            for name, part in rows.items()
        ]
        out = [f"audit on fresh draws, the critic trained on: {', '.join(said)}"]
        tau = getattr(self.task.objective, "tau", None)
        if tau is not None and "penalty" in rows:
            divergence = 4 * tau * rows["value"][:, best]
            error = float(divergence.std()) / math.sqrt(8)
            out.append(f"Fisher divergence in standardised coordinates: {float(divergence.mean()):.3g} ± {error:.1g}")
            if float(divergence.mean()) > _LARGE * self.task.family.latent.dim + 3 * error:
                out.append("the scores of family and target differ by that much: the family does not match the target")
        if last:
            out.append("the last iterate was better than the average, and is returned")
        return out

    # -- writing down --------------------------------------------------------------------------------------------------
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state (see :class:`~vifamily.solvers._base.Run`)."""
        out, values = super().tensors()
        return out, {**values, "evaluations": self.objective_state.step, "seed": self.objective_state.seed}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state (see :class:`~vifamily.solvers._base.Run`)."""
        super().restore(tensors, values)
        self.objective_state = dataclasses.replace(self.game, step=int(values["evaluations"]), seed=int(values["seed"]))


@contextlib.contextmanager
def held(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hold parameters fixed, so that no graph is built through them."""
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
