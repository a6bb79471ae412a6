"""One run of Adam: its steps, its stages of halved step sizes, and the averages that it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, NonFiniteLossError
from vifamily.solvers._base import StepReport, Task
from vifamily.solvers._compiled import AdamLoop, compile_adam
from vifamily.solvers._flat import FlatParameters
from vifamily.solvers._history import History, RunWithHistory, number, plain
from vifamily.solvers._stopping import StageMonitor, StoppingRule
from vifamily.solvers._trail import Trail
from vifamily.solvers._watch import bad_parameter, units, watched
from vifamily.types import Loss

__all__ = ["AdamRun"]

_SNAPSHOTS = 64


class AdamRun(RunWithHistory):
    """One run of :class:`~vifamily.solvers.Adam`."""

    def __init__(self, task: Task, rule: StoppingRule, step_size: float, model_factor: float) -> None:
        self.task, self.rule, self.step_size, self.model_factor = task, rule, step_size, model_factor
        self.flat = FlatParameters(task.family.parameters(), task.restarts)
        self.model_flat = self._others()
        self.groups = [g for g in (self.flat, self.model_flat) if g.parameters]
        if not self.groups:
            raise ConfigError("there is nothing to optimise: neither the family nor the model has parameters.")
        self.optimiser = torch.optim.Adam(
            [{"params": [nn.Parameter(g.value)], "lr": self._rate(g)} for g in self.groups], foreach=False
        )
        for group, held in zip(self.groups, self.optimiser.param_groups, strict=True):
            # the optimiser's parameter and the flat tensor share memory
            held["params"][0].data = group.value
        self.step_count, self.stage = 0, 0
        self.loop: AdamLoop | None = None
        # while the loss itself changes nothing can be judged: the first stage begins when that is over
        self._begin_watch(getattr(task.objective, "warmup_steps", 0), rule.rough)
        self.objective_state = task.objective_state
        self.sums = [torch.zeros_like(g.value) for g in self.groups]
        self.snapshots: list[tuple[int, list[Tensor]]] = [(0, [s.clone() for s in self.sums])]
        self.previous: Tensor | None = None
        self.change, self.previous_error = float("nan"), float("inf")
        self.gradient_sum, self.gradient_square = torch.zeros_like(self.flat.value), torch.zeros_like(self.flat.value)
        self.gradient_count = 0
        self.history = History(task.restarts)
        self.notes: list[str] = []
        self.finished: str | None = None
        if task.compiled:
            found = compile_adam(self)
            if isinstance(found, AdamLoop):
                self.loop, self.compiled = found, True
                self._begin_watch(0, rule.rough)
            else:
                self.not_compiled = found
                self.optimiser.state.clear()

    def _others(self) -> FlatParameters:
        """Parameters beside the family's: point-estimated ones of the model."""
        own = {id(p) for p in self.flat.parameters}
        return FlatParameters([p for p in self.task.model.parameters() if id(p) not in own], 1)

    def _owner(self, group: FlatParameters) -> Any:
        """The module that a group's parameters come from."""
        return self.task.family if group is self.flat else self.task.model

    def _rate(self, group: FlatParameters) -> float:
        return self.step_size * (1.0 if group is self.flat else self.model_factor)

    def pace(self, first: int, count: int) -> np.ndarray:
        """Step sizes of some steps as parts of ``step_size``, ``(count,)``: the same for all steps of a stage."""
        return np.ones(count)

    def _set_rates(self) -> None:
        """Give torch's optimiser the size of the next step."""
        part = float(self.pace(self.step_count, 1)[0])
        for group, held in zip(self.groups, self.optimiser.param_groups, strict=True):
            held["lr"] = part * self._rate(group)

    def _begin_watch(self, first_step: int, goal: float) -> None:
        self.monitor = StageMonitor(self.rule, first_step, goal, native=self.loop is not None)

    # -- one step ------------------------------------------------------------------------------------------------------
    def _loss(self, noise: Tensor, step: int) -> Loss:
        return self.task.objective_loss(
            self.task.family, self.task.model, noise, self.task.batch_at(step), self.objective_state
        )

    def step(self) -> StepReport:
        """Take one step, or all up to the next judgement where they are compiled (see :class:`Run`)."""
        if self.loop is not None:
            report = self._block(self.loop)
            if report is not None:
                return report
        loss, values, packed = self._evaluate(self.step_count)
        self._check_finite(loss, values, packed)
        for held, gradient in zip(self.optimiser.param_groups, packed, strict=True):
            held["params"][0].grad = gradient
        self._set_rates()
        self.optimiser.step()
        self.objective_state = loss.state
        self._record(loss, values, packed[0])
        return self._report(values, watch=True)

    def _evaluate(self, step: int) -> tuple[Loss, list[float], list[Tensor]]:
        """Loss, its values and its gradients laid out as the groups are, at the parameters as they stand."""
        flat_parameters = [p for g in self.groups for p in g.parameters]
        # the caller may have switched gradients off around the whole fit
        with torch.enable_grad():
            loss = self._loss(self.task.noise_at(step), step)
            gradients = torch.autograd.grad(loss.surrogate.sum(), flat_parameters, allow_unused=True)
        values = loss.value.reshape(-1).tolist()
        taken = 0
        packed = []
        for group in self.groups:
            packed.append(group.gather(gradients[taken : taken + len(group.parameters)]))
            taken += len(group.parameters)
        return loss, values, packed

    def _block(self, loop: AdamLoop) -> StepReport | None:
        """Take compiled steps up to the next judgement; None where the first is not finite, for torch to say why."""
        since = self.step_count - self.monitor.first_step
        count = self.rule.next_check(since) - since
        if self.horizon is not None:
            count = max(1, min(count, self.horizon - self.step_count))
        taken, losses, terms, rows = loop(self, count)
        if taken == 0:
            return None
        sizes = (self.step_size * self.pace(self.step_count, taken)).tolist()
        self.step_count += taken
        columns = terms.numpy()
        self.record(losses.numpy(), sizes, {name: columns[:, k : k + 1] for k, name in enumerate(loop.names)})
        self.gradient_count += taken
        self.monitor.add(rows)
        return self._report(losses[-1].tolist(), watch=False)

    def record(self, losses: np.ndarray, sizes: Sequence[float], terms: Mapping[str, np.ndarray]) -> None:
        """Note what some steps gave: losses ``(step, restart)``, step sizes and each term, ``(step, 1)``."""
        self.history.extend(losses, sizes, terms)

    def _check_finite(self, loss: Loss, values: list[float], packed: list[Tensor]) -> None:
        if all(abs(v) < float("inf") for v in values) and all(bool(torch.isfinite(g).all()) for g in packed):
            return
        bad = [name for name, term in loss.terms.items() if not bool(torch.isfinite(term).all())]
        # a term of a sum that is fine apart makes the sum itself the culprit
        term = bad[0] if bad else "the loss" if not all(abs(v) < float("inf") for v in values) else "the gradient"
        owners = [self._owner(g) for g in self.groups]
        parameter = bad_parameter(self.groups, owners, packed)
        where = f", first seen in the parameter {parameter!r}" if parameter else ""
        raise NonFiniteLossError(
            f"step {self.step_count}: {term} is not finite{where}; loss {values}. "
            "The fit stopped at its last finite state. "
            "Usual causes: a density that overflows far from its mode, a start point outside the support, "
            "or too large a step size.",
            step=self.step_count,
            term=term,
            parameter=parameter,
        )

    def _record(self, loss: Loss, values: list[float], gradient: Tensor) -> None:
        size = self.step_size * float(self.pace(self.step_count, 1)[0])
        self.step_count += 1
        means = {name: float(term.double().mean()) for name, term in loss.terms.items()}
        self.history.add(values, size, means)
        for total, group in zip(self.sums, self.groups, strict=True):
            total += group.value
        self.gradient_sum += gradient
        self.gradient_square += gradient**2
        self.gradient_count += 1

    def _report(self, values: list[float], *, watch: bool) -> StepReport:
        step, used = self.step_count, self.step_size
        since = step - self.monitor.first_step
        terms = self.history.last_terms
        if since <= 0:
            if since == 0:
                self._forget()
            return StepReport(step, tuple(values), terms, used, None, "warm-up")
        if watch and since % self.rule.every == 0:
            self.monitor.add(self.watch())
        if since == self.rule.next_check(since - 1):
            self._snapshot()
            verdict = self.monitor.judge(step, self.unit())
            if verdict is not None:
                self._end_stage(verdict)
        phase = f"stage {self.stage + 1}" + (", averaging" if self.monitor.stationary_from is not None else "")
        return StepReport(step, tuple(values), terms, used, self.finished, phase)

    # -- watching ------------------------------------------------------------------------------------------------------
    def watch(self) -> Tensor:
        """What :func:`~vifamily.solvers._watch.watched` gives of the family as it stands."""
        found = None if self.loop is None else self.loop.watched_at(self, [g.value for g in self.groups])
        return watched(self.task.family, self.task.monitor_noise, self.flat.value) if found is None else found

    def unit(self) -> Tensor:
        """Unit of each watched quantity at the last watched state."""
        rows = self.monitor.rows
        if rows is None:
            raise ValueError("nothing was watched yet")
        return units(self.task.family, torch.from_numpy(rows.rows[-1]))

    # -- averaging and stages ------------------------------------------------------------------------------------------
    def _snapshot(self) -> None:
        self.snapshots.append((self.step_count, [s.clone() for s in self.sums]))
        if len(self.snapshots) > _SNAPSHOTS:
            # keep the ends and every other one between: windows may then start a little later than asked
            self.snapshots = [self.snapshots[0], *self.snapshots[1:-1:2], self.snapshots[-1]]

    def average(self) -> list[Tensor]:
        """Average of the parameters over the stationary window, or the last half of the stage before there is one."""
        now = self.step_count
        start = self.monitor.stationary_from
        if start is None:
            start = (self.monitor.first_step + now) // 2
        at, base = min((s for s in self.snapshots if s[0] < now), key=lambda s: abs(s[0] - start), default=(now, []))
        if at == now:
            return [g.value.clone() for g in self.groups]
        return [(total - old) / (now - at) for total, old in zip(self.sums, base, strict=True)]

    def _end_stage(self, verdict: str) -> None:
        for group, value in zip(self.groups, self._better(), strict=True):
            group.set(value)
        self._note_verdict(verdict)
        row = self.watch()
        small, near = self._compare(row)
        # two halvings at least: one small change may be chance
        if (
            small
            and self.stage >= 2
            and verdict == "done"
            and max(self.monitor.error, 0.5 * self.previous_error) < self.rule.mcse
        ):
            self.finished = "converged"
            return
        self.previous_error = self.monitor.error
        self.stage += 1
        if self.stage >= self.rule.stages:
            self.finished = "smallest_step"
            return
        self.previous = row
        self.step_size *= self.rule.shrink
        for group, held in zip(self.groups, self.optimiser.param_groups, strict=True):
            held["lr"] = self._rate(group)
        # the second moments still remember the large gradients of the way here, which makes steps too short and drift
        # pass for stationarity
        self.optimiser.state.clear()
        # once shrinking the step size changes little, what is left is Monte-Carlo error: ask for a good average
        self._begin_watch(self.step_count, self.rule.mcse if near else self.rule.rough)
        self._forget()

    def _compare(self, row: Tensor) -> tuple[bool, bool]:
        """Note how far the watched quantities moved since the last stage; whether that is little, and nearly so."""
        if self.previous is not None:
            self.change = float(((row - self.previous).abs() / units(self.task.family, row)).nan_to_num(0.0).max())
        # a change that the Monte-Carlo errors of the two averages explain is no change
        noise = 2 * math.hypot(self.monitor.error, self.previous_error)
        small = self.change < min(max(self.rule.tolerance, noise), 2 * self.rule.tolerance)
        return small, self.change < max(4 * self.rule.tolerance, noise)

    def _note_verdict(self, verdict: str) -> None:
        """Note a stage that ended by its limit, and what it lacked."""
        if verdict != "slow":
            return
        what = "did not become stationary" if self.monitor.stationary_from is None else "were not averaged well enough"
        self.notes.append(f"the iterates at step size {self.step_size:.3g} {what} within {self.rule.stage} steps")

    def _forget(self) -> None:
        """Begin the averages of iterates and gradients anew."""
        self.snapshots = [(self.step_count, [s.clone() for s in self.sums])]
        self.gradient_sum.zero_()
        self.gradient_square.zero_()
        self.gradient_count = 0

    @torch.no_grad()
    def _probe(self, value: list[Tensor]) -> Tensor:
        """Loss at given parameters on eight fixed noises, ``(8, restart)``."""
        found = None if self.loop is None else self.loop.losses_at(self, value, 8)
        if found is not None:
            return found
        kept = [g.value.clone() for g in self.groups]
        for group, v in zip(self.groups, value, strict=True):
            group.set(v)
        rows = [self._loss(self.task.noise_at(i), i).value.reshape(-1) for i in range(8)]
        for group, v in zip(self.groups, kept, strict=True):
            group.set(v)
        return torch.stack(rows)

    def _better(self) -> list[Tensor]:
        """The average, unless the last iterate is clearly better.

        Averages of weights of networks (flows) need not be good even where each iterate is; for Gaussians the
        average always wins.
        """
        average, last = self.average(), [g.value.clone() for g in self.groups]
        difference = self._probe(average) - self._probe(last)
        error = difference.std(0) / difference.shape[0] ** 0.5
        worse = (difference.mean(0) > 3 * error + 1e-12) | ~torch.isfinite(difference).all(0)
        if not bool(worse.any()):
            return average
        rows = worse.unsqueeze(-1)
        return [
            torch.where(rows if a.shape[0] == rows.shape[0] else rows.any(), b, a)
            for a, b in zip(average, last, strict=True)
        ]

    def output(self) -> Mapping[str, Any]:
        """Write the averaged state into the family (see :class:`~vifamily.solvers._base.Run`)."""
        if self.finished is None and self.step_count > self.monitor.first_step:
            for group, value in zip(self.groups, self._better(), strict=True):
                group.set(value)
        return {
            "losses": self._probe([g.value.clone() for g in self.groups]).mean(0).tolist(),
            "rhat": self.monitor.rhat,
            "mcse": self.monitor.error,
            "gradient_snr": self._gradient_snr(),
            "notes": (*self.notes, *self._unfinished_warmup()),
            "change": self.change,
        }

    def _gradient_snr(self) -> float | None:
        """Median over parameters of the gradient's mean over its standard deviation; None before there are two."""
        if self.gradient_count < 2:
            return None
        mean = self.gradient_sum / self.gradient_count
        sd = (self.gradient_square / self.gradient_count - mean**2).clamp_min(0).sqrt()
        ratio = (mean.abs() / sd)[sd > 0]
        return float(ratio.median()) if ratio.numel() else float("inf")

    def _unfinished_warmup(self) -> tuple[str, ...]:
        left = self.monitor.first_step - self.step_count
        return () if left <= 0 else (f"the fit ended {left} steps before the end of the objective's warm-up",)

    # -- writing down --------------------------------------------------------------------------------------------------
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state (see :class:`~vifamily.solvers._base.Run`)."""
        out = self.history.tensors()
        for i, (group, total, held) in enumerate(zip(self.groups, self.sums, self.optimiser.param_groups, strict=True)):
            out[f"value/{i}"], out[f"sum/{i}"] = group.value.clone(), total.clone()
            for key, value in self.optimiser.state[held["params"][0]].items():
                out[f"optimiser/{i}/{key}"] = value.clone()
            for j, (_, base) in enumerate(self.snapshots):
                out[f"snapshot/{j}/{i}"] = base[i].clone()
        out["gradient/sum"], out["gradient/square"] = self.gradient_sum.clone(), self.gradient_square.clone()
        if self.monitor.rows is not None:
            out["monitor"] = self.monitor.rows.tensor()
        if self.previous is not None:
            out["previous"] = self.previous.clone()
        values = {
            "step": self.step_count, "stage": self.stage, "step_size": self.step_size,
            "change": plain(self.change), "previous_error": plain(self.previous_error), "notes": list(self.notes),
            "finished": self.finished, "gradient_count": self.gradient_count,
            "snapshots": [at for at, _ in self.snapshots],
            "first_step": self.monitor.first_step, "goal": self.monitor.goal,
            "stationary_from": self.monitor.stationary_from, "rhat": plain(self.monitor.rhat),
            "error": plain(self.monitor.error),
        }  # fmt: skip
        if isinstance(self.objective_state, Tensor):
            out["objective_state"] = self.objective_state.clone()
        return out, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state (see :class:`~vifamily.solvers._base.Run`)."""
        self.step_count, self.stage, self.step_size = (
            int(values["step"]),
            int(values["stage"]),
            float(values["step_size"]),
        )
        self.change, self.notes, self.finished = number(values["change"]), list(values["notes"]), values["finished"]
        self.gradient_count = int(values["gradient_count"])
        self.previous_error = number(values["previous_error"])
        self._begin_watch(int(values["first_step"]), float(values["goal"]))
        self.monitor.stationary_from = values["stationary_from"]
        self.monitor.rhat, self.monitor.error = number(values["rhat"]), number(values["error"])
        self.monitor.rows = Trail.of(tensors["monitor"]) if "monitor" in tensors else None
        self.previous = tensors.get("previous")
        self.gradient_sum, self.gradient_square = tensors["gradient/sum"].clone(), tensors["gradient/square"].clone()
        for i, (group, held) in enumerate(zip(self.groups, self.optimiser.param_groups, strict=True)):
            if tensors[f"value/{i}"].shape != group.value.shape:
                raise ValueError(f"the parameters have the shape {tuple(group.value.shape)}, the saved ones have not")
            group.set(tensors[f"value/{i}"])
            self.sums[i] = tensors[f"sum/{i}"].clone()
            held["lr"] = self._rate(group)
            prefix = f"optimiser/{i}/"
            state = {key.removeprefix(prefix): v.clone() for key, v in tensors.items() if key.startswith(prefix)}
            if state:
                self.optimiser.state[held["params"][0]] = state
        self.snapshots = [
            (int(at), [tensors[f"snapshot/{j}/{i}"].clone() for i in range(len(self.groups))])
            for j, at in enumerate(values["snapshots"])
        ]
        self.history.restore(tensors)
        self.objective_state = tensors.get("objective_state", self.objective_state)
