"""One run of L-BFGS on fixed draws: its evaluations, its levels, and restarts that meet or are left behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError, ModelError, NonFiniteLossError
from vifamily.numerics.newton import is_numerical
from vifamily.solvers._base import StepReport, Task
from vifamily.solvers._draw_sets import draws_of, fix_on, fixed_loss, numbers_of_draws
from vifamily.solvers._fixed_draws import FixedLoss
from vifamily.solvers._flat import FlatParameters
from vifamily.solvers._history import History, RunWithHistory, plain
from vifamily.solvers._quasi_newton import Descent, FirstGuess, NotFinite, first_guess
from vifamily.solvers._stragglers import PATIENCE, hopeless, only_stragglers
from vifamily.solvers._watch import bad_parameter, has_moments, meetings, units, watched
from vifamily.types import Capability

__all__ = ["LbfgsRun"]

_CHECKS = 3
"""Independent sets of draws on which the Monte-Carlo error of a minimum is judged."""
_MOST_EVALUATIONS = 1000
_FRESH_DRAWS = 256
_FRESH = 1000
"""Number of the level whose draws are kept for judging the answer."""


class LbfgsRun(RunWithHistory):
    """One run of :class:`~vifamily.solvers.Lbfgs`."""

    def __init__(self, task: Task, tolerance: float, most_draws: int) -> None:
        self.task, self.tolerance = task, tolerance
        self.family, self.rows, self.place = task.family, task.restarts, list(range(task.restarts))
        self.flat = self.whole = FlatParameters(task.family.parameters(), task.restarts)
        own = {id(p) for p in self.flat.parameters}
        self.model_flat = FlatParameters([p for p in task.model.parameters() if id(p) not in own], 1)
        self.groups = [g for g in (self.flat, self.model_flat) if g.parameters]
        if not self.groups:
            raise ConfigError("there is nothing to optimise: neither the family nor the model has parameters.")
        if self.model_flat.parameters and task.restarts > 1:
            raise ConfigError("restarts of a model with parameters of its own run one after the other, not stacked.")
        self.options: dict[str, Any] = {"dtype": task.monitor_noise.dtype, "device": task.monitor_noise.device}
        self.counts, self.notes = numbers_of_draws(task, self.family, most_draws)
        self.loss = self._loss_of_rows()
        # a mean that is off by a tenth of the tolerance costs half its square; a hundredth of that, as under strong
        # dependence a factorised family may move by many of its own sds at little cost
        self.descent = Descent(
            self._held(), goal=0.005 * (0.1 * tolerance) ** 2, resolution=float(torch.finfo(self.options["dtype"]).eps),
            first=self._guesses(),
        )  # fmt: skip
        self.step_count, self.level, self.level_from = 0, 0, 0
        self.previous: Tensor | None = None
        self.checked: list[Tensor] = []
        self.change, self.error = float("nan"), float("nan")
        self.mean_errors: list[list[float]] = []
        self.history = History(task.restarts)
        self.at_minimum = False
        self.left: list[np.ndarray] = []
        self.left_values: list[float] = []
        self.gaps: list[list[float]] = []
        self.finished: str | None = None
        self._fix()

    # -- draws ---------------------------------------------------------------------------------------------------------
    def _loss_of_rows(self) -> FixedLoss:
        return fixed_loss(self.task, self.family, [p for g in self.groups for p in g.parameters], self.rows)

    def _fix(self) -> None:
        """Take the draws of the level, or another set of as many that judges its minimum."""
        # one set for all restarts: what tells them apart is where they start, not chance
        count = self.counts[self.level]
        draws = draws_of(self.task, self.family, count, self.level, len(self.checked))
        fix_on(self.task, self.loss, draws, self.options)

    def _guesses(self) -> list[FirstGuess | None]:
        """What the families know of the curvature before the first evaluation."""
        if self.model_flat.parameters:
            return [None] * self.rows
        family = self.family
        names = {id(p): name for name, p in family.named_parameters()}
        order = [(names[id(p)], size) for p, size in zip(self.flat.parameters, self.flat.sizes, strict=True)]
        if hasattr(family, "inverse_curvatures"):
            return [first_guess(said, order) for said in family.inverse_curvatures()]
        return [first_guess(getattr(family, "inverse_curvature", lambda: None)(), order)]

    # -- parameters ----------------------------------------------------------------------------------------------------
    def _held(self) -> np.ndarray:
        held: np.ndarray = torch.cat([g.value for g in self.groups], dim=1).double().cpu().numpy().copy()
        return held

    def _set(self, x: np.ndarray) -> None:
        start = 0
        for group in self.groups:
            width = group.value.shape[1]
            group.set(torch.from_numpy(np.ascontiguousarray(x[:, start : start + width])).to(group.value))
            start += width

    def _packed(self, gradients: list[Tensor | None]) -> list[Tensor]:
        taken, out = 0, []
        for group in self.groups:
            out.append(group.gather(gradients[taken : taken + len(group.parameters)]))
            taken += len(group.parameters)
        return out

    # -- one evaluation ------------------------------------------------------------------------------------------------
    def step(self) -> StepReport:
        """Evaluate once; a run that has ended stays as it is (see :class:`~vifamily.solvers._base.Run`)."""
        if self.finished is not None:
            return self._report()
        descent = self.descent
        try:
            self._set(descent.proposal())
            values, gradients, terms = self._evaluate()
        finally:
            self._set(descent.x)
        packed = self._packed(gradients)
        gradient = torch.cat(packed, dim=1).double().cpu().numpy()
        taken = 0.0 if self.checked else float(np.mean(descent.t))
        if self.checked:
            if self.gaps:
                self.gaps.append((values - values[int(np.argmin(descent.value))]).tolist())
            self._check(gradient)
        else:
            try:
                descent.update(values, gradient)
            except NotFinite as error:
                raise self._failure(values, terms, packed) from error
            self._set(descent.x)
        self.step_count += 1
        # a trial beyond a wall is not where the fit stands
        last = self.history.last_terms
        terms = {name: term if math.isfinite(term) else last.get(name, term) for name, term in terms.items()}
        self.history.add(self._spread_out(descent.value.tolist()), taken, terms)
        waits = not descent.finished and self.step_count - self.level_from < _MOST_EVALUATIONS
        if not self.checked and (not waits or self._only_stragglers()):
            # a minimum that is not waited for is judged with the others, on the draws of the checks
            self.gaps = [(descent.value - descent.value.min()).tolist()] if waits else []
            self.at_minimum = not waits and self._at_minimum()
            self.checked = [self._watched()]
            if len(self.counts) > 1:
                self._fix()
        if len(self.checked) == (1 + _CHECKS if len(self.counts) > 1 else 1):
            self._end_level()
        return self._report()

    def _evaluate(self) -> tuple[np.ndarray, list[Tensor | None], dict[str, float]]:
        try:
            return self.loss()
        except ModelError as error:
            if not is_numerical(error) or bool(self.descent.fresh.any()):
                raise
        # a model that cannot be computed at a trial is a wall like any other: the line search backs off
        nothing: list[Tensor | None] = [torch.full_like(p, torch.nan) for g in self.groups for p in g.parameters]
        return np.full(self.rows, np.inf), nothing, {}

    def _report(self) -> StepReport:
        step_size = self.history.last_step_size
        phase = f"{self.counts[self.level]} fixed draws" + (", checking" if self.checked else "")
        return StepReport(
            self.step_count,
            tuple(self._spread_out(self.descent.value.tolist())),
            self.history.last_terms,
            1.0 if step_size is None else step_size,
            self.finished,
            phase,
        )

    def _failure(self, values: np.ndarray, terms: Mapping[str, float], packed: list[Tensor]) -> NonFiniteLossError:
        bad = [name for name, term in terms.items() if not math.isfinite(term)]
        term = bad[0] if bad else "the gradient" if bool(np.isfinite(values).all()) else "the loss"
        owners = [self.family if g is self.flat else self.task.model for g in self.groups]
        parameter = bad_parameter(self.groups, owners, packed)
        where = f", first seen in the parameter {parameter!r}" if parameter else ""
        return NonFiniteLossError(
            f"step {self.step_count}: {term} is not finite{where} on {self.counts[self.level]} fixed draws; loss "
            f"{values.tolist()}. The fit stopped at its last finite state. Usual causes: a density that overflows far "
            "from its mode, or a start point outside the support.",
            step=self.step_count,
            term=term,
            parameter=parameter,
        )

    # -- levels --------------------------------------------------------------------------------------------------------
    def _watched(self) -> Tensor:
        noise = self.task.monitor_noise
        if self.flat is not self.whole:
            # the noise is the same for all restarts
            noise = noise[0] if self.rows == 1 else noise[: self.rows]
        return watched(self.family, noise, self.flat.value)

    def _check(self, gradient: np.ndarray) -> None:
        """Note where the minimum on another set of draws lies, to first order."""
        self._set(self.descent.x - self.descent.newton(gradient))
        self.checked.append(self._watched())
        self._set(self.descent.x)
        self._fix()

    def _end_level(self) -> None:
        waited = not self.gaps
        if not waited:
            self._leave_behind()
        row, unit = self.checked[0], units(self.family, self.checked[0])
        if len(self.counts) > 1:
            spread = torch.stack(self.checked).std(0)
            if has_moments(self.family) and row.numel() == 2 * self.rows * self.family.latent.dim:
                self.mean_errors = spread.chunk(2)[0].reshape(self.rows, -1).tolist()
            spread = spread / unit
            # a loss that is not finite on other draws has no error to speak of
            self.error = float(spread.max()) if bool(torch.isfinite(spread).all()) else math.inf
        if self.previous is not None:
            self.change = float(((row - self.previous).abs() / unit).nan_to_num(0.0).max())
        settled = len(self.counts) == 1 or (2 * self.error < self.tolerance and self.change < 2 * self.tolerance)
        self.checked = []
        if settled and self.at_minimum:
            self.finished = "converged"
        elif waited and not self.descent.finished:
            self.finished = "max_steps"
        elif self.level + 1 == len(self.counts):
            self.finished = "most_draws"
            if not settled:
                self.notes.append(
                    f"the optimum on {self.counts[-1]} fixed draws is still uncertain by {self.error:.2g} and "
                    f"{self.change:.2g} away from that on {self.counts[-2]} "
                    "(posterior sds or log sds): allow more with lbfgs(most_draws=...), or use adam"
                )
        if self.finished is None:
            if self.rows > 1 and self.at_minimum:
                row = self._merge(row)
            self.previous = row
            self.level += 1
            self.level_from = self.step_count
            self._fix()
            self.descent.renew()

    # -- restarts that are left behind ---------------------------------------------------------------------------------
    def _only_stragglers(self) -> bool:
        """Whether every row that is not at its minimum is far above the best, which is at its own."""
        few = self.step_count - self.level_from < PATIENCE
        last = self.level + 1 == len(self.counts)
        if few or last or self.rows < 2 or self.model_flat.parameters or not has_moments(self.family):
            return False
        if self._watched().numel() % (2 * self.rows):
            return False
        return only_stragglers(self.descent, self.tolerance)

    def _leave_behind(self) -> None:
        """Give up the open rows that are worse than the best on every set of draws by more than chance explains."""
        descent, judged = self.descent, len(self.gaps)
        lost, least = hopeless(descent, self.gaps)
        self.gaps = []
        # with one that could still win among them, the next level takes up all of the rest
        self.at_minimum = bool((descent.done == 1).sum() + len(lost) == self.rows)
        if not lost:
            return
        kept = [row for row in range(self.rows) if row not in lost]
        new = {row: i for i, row in enumerate(kept)}
        for row in lost:
            new[row] = -1 - len(self.left)
            self.left.append(descent.x[row].copy())
            self.left_values.append(float(descent.value[row]))
        behind = sum(place in lost for place in self.place)
        self.notes.append(
            f"{behind} of {self.task.restarts} restarts were left behind: after {self.step_count - self.level_from} "
            f"evaluations on {self.counts[self.level]} fixed draws they were not at a minimum and worse than the best "
            f"by {least:.2g} or more on {judged} sets of draws; their losses are those of where "
            "they stood"
        )
        self.checked = [self._columns(row, kept) for row in self.checked]
        self.previous = None if self.previous is None else self._columns(self.previous, kept)
        self._keep(kept, [new[row] if row >= 0 else row for row in self.place])

    def _columns(self, row: Tensor, kept: list[int]) -> Tensor:
        """What is watched of some rows."""
        return row.reshape(2, self.rows, -1)[:, kept].reshape(-1)

    # -- restarts that meet --------------------------------------------------------------------------------------------
    def _spread_out(self, values: list[float]) -> list[float]:
        """Numbers of the rows, as those of all restarts."""
        return [values[row] if row >= 0 else self.left_values[-1 - row] for row in self.place]

    def _merge(self, row: Tensor) -> Tensor:
        """Go on with one of the restarts that met at one minimum of the draws they share; returns what is watched."""
        if Capability.REPARAMETERISED not in self.family.capabilities or row.numel() % (2 * self.rows):
            return row
        kept, new = meetings(row, self.rows, 0.5 * self.tolerance)
        if len(kept) == self.rows:
            return row
        self.mean_errors = [self.mean_errors[i] for i in kept] if self.mean_errors else []
        columns = self._columns(row, kept)
        self._keep(kept, [new[i] if i >= 0 else i for i in self.place])
        return columns

    def _keep(self, rows: list[int], place: list[int]) -> None:
        """Go on with some rows; ``place`` says for each restart which of them is its own."""
        self.family = self.family.subset(rows)
        self.descent.keep(rows)
        self.rows, self.place = len(rows), place
        self.flat = FlatParameters(self.family.parameters(), self.rows)
        self.groups = [self.flat]
        self.loss = self._loss_of_rows()
        self._set(self.descent.x)

    def _at_minimum(self) -> bool:
        """Whether every row is as near its minimum as rounding allows; notes where it is not."""
        descent = self.descent
        floor = np.maximum(10_000 * descent.goal, 100 * descent.resolution * np.abs(descent.value))
        left = (descent.done == 0) | ((descent.stuck == 1) & (0.5 * descent.decrement > floor))
        if left.any():
            self.notes.append(
                f"the minimum on {self.counts[self.level]} fixed draws was not reached in "
                f"{self.step_count - self.level_from} evaluations: the loss may have no minimum (an improper "
                "posterior), or a kink there"
            )
        return not bool(left.any())

    def output(self) -> Mapping[str, Any]:
        """Leave the minimum in the family (see :class:`~vifamily.solvers._base.Run`)."""
        self._set(self.descent.x)
        if self.flat is not self.whole:
            left = [torch.from_numpy(x).to(self.flat.value) for x in self.left]
            self.whole.set(torch.stack([self.flat.value[i] if i >= 0 else left[-1 - i] for i in self.place]))
            # parameters are relative to an affine map: that of the first of the restarts which share a row
            members = self.task.family.members()
            for restart, row in enumerate(self.place):
                self.task.family.adopt(restart, members[self.place.index(row)])
        # one set of draws for all restarts, none of which was fitted to it
        count = max(_FRESH_DRAWS, 8 * self.task.draws) if len(self.counts) > 1 else 2
        fresh = FixedLoss(self.loss.loss, self.loss.parameters, self.rows)
        draws = draws_of(self.task, self.family, count, _FRESH)
        fix_on(self.task, fresh, draws, self.options)
        used = ", ".join(str(n) for n in self.counts[: self.level + 1])
        return {
            "losses": self._losses_of_all(draws) if self.left else self._spread_out(fresh.values().mean(0).tolist()),
            "rhat": float("nan"),
            "mcse": self.error,
            "mean_errors": [self.mean_errors[i] if i >= 0 else [math.nan] * self.family.latent.dim for i in self.place]
            if self.mean_errors
            else [],
            "gradient_snr": None,
            "notes": (*self.notes, f"minimised on {used} fixed draws in turn"),
            "change": self.change,
        }

    def _losses_of_all(self, draws: Tensor) -> list[float]:
        """Losses of all restarts, those left behind too, on the same draws."""
        loss = fixed_loss(self.task, self.task.family, self.whole.parameters, self.task.restarts)
        fix_on(self.task, loss, draws, self.options)
        values: list[float] = loss.values().mean(0).tolist()
        return values

    # -- writing down --------------------------------------------------------------------------------------------------
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state (see :class:`~vifamily.solvers._base.Run`)."""
        out = {f"descent/{name}": torch.from_numpy(array) for name, array in self.descent.arrays().items()}
        out |= self.history.tensors()
        if self.previous is not None:
            out["previous"] = self.previous.clone()
        if self.left:
            out["left"] = torch.from_numpy(np.stack(self.left))
        if self.checked:
            out["checked"] = torch.stack(self.checked)
        values = {
            "step": self.step_count, "level": self.level, "level_from": self.level_from, "finished": self.finished,
            "change": plain(self.change), "error": plain(self.error), "notes": list(self.notes),
            "at_minimum": self.at_minimum, "place": self.place, "mean_errors": self.mean_errors,
            "left_values": list(self.left_values),
            "gaps": [[plain(v) for v in row] for row in self.gaps],
        }  # fmt: skip
        return out, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state (see :class:`~vifamily.solvers._base.Run`)."""
        place = [int(v) for v in values["place"]]
        rows = len({row for row in place if row >= 0})
        if rows < self.rows:
            self._keep([place.index(row) for row in range(rows)], place)
        # checkpoints of before any restart could be left behind say nothing of it
        self.left = list(tensors["left"].numpy()) if "left" in tensors else []
        self.left_values = [float(v) for v in values.get("left_values", [])]
        self.gaps = [[float("nan" if v is None else v) for v in row] for row in values.get("gaps", [])]
        prefix = "descent/"
        own = {k.removeprefix(prefix): v.numpy() for k, v in tensors.items() if k.startswith(prefix)}
        self.descent.restore(own)
        self.step_count, self.level, self.level_from = (int(values[k]) for k in ("step", "level", "level_from"))
        self.finished, self.notes = values["finished"], list(values["notes"])
        # infinity is written as a word, which float reads
        self.change, self.error = (float("nan" if values[k] is None else values[k]) for k in ("change", "error"))
        self.at_minimum, self.mean_errors = bool(values["at_minimum"]), values["mean_errors"]
        self.previous = tensors.get("previous")
        self.checked = list(tensors["checked"]) if "checked" in tensors else []
        self.history.restore(tensors)
        self._set(self.descent.x)
        self._fix()
