"""The loop: from a model, a family and an objective to a posterior that says how it went."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily import checkpoint as checkpoints
from vifamily.errors import CheckpointError, ConfigError, ConvergenceWarning, NonFiniteLossError, VifamilyError
from vifamily.families import Family
from vifamily.families._adapters import as_entry
from vifamily.families._local_view import LocalView, joint_noise_spec
from vifamily.families._stack import StackedFamily
from vifamily.families.local import LocalFamily
from vifamily.interrupts import Interrupts
from vifamily.plan import Plan, describe, make_plan
from vifamily.plan import plan as plan
from vifamily.posterior import FitRecord, Posterior, versions
from vifamily.progress import FitProgress
from vifamily.rng import NoiseStream, check_seed, draw_noise, generator
from vifamily.solvers import Run, StepReport, Task
from vifamily.start import initialise
from vifamily.trackers import Tracker
from vifamily.types import Batch, Capability, Loss

__all__ = ["fit", "plan"]

_MOST_STEPS = 50_000
_BY_REQUEST = ("interrupted", "time_limit", "callback")
_MONITOR_DRAWS = 64
_TRACE_POINTS = 2000


def fit(
    model: Any,
    family: Any = "auto",
    objective: Any = "elbo",
    solver: Any = "adam",
    *,
    seed: int = 0,
    steps: int | None = None,
    restarts: int = 1,
    draws: int | None = None,
    batch_size: int | None = None,
    init: Any = "auto",
    callbacks: Sequence[Callable[[StepReport], Any]] = (),
    tracker: Tracker | None = None,
    progress: bool | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    time_limit: float | None = None,
    encoder: torch.nn.Module | None = None,
    local_family: Any = None,
) -> Posterior:
    """Fit a posterior.

    Args:
        model: A model, a problem, or a problem's name such as ``"eight_schools"``.
        family: A family's name such as ``"low_rank(rank=3)"``, an entry, a Pyro guide, a zuko flow, or a module
            with a family's methods; ``"auto"`` takes full rank up to 100 coordinates and mean field above.
        objective: An objective's name such as ``"renyi(alpha=0.5)"``, or an objective.
        solver: A solver's name or a solver.
        seed: Root seed; the same seed gives the same fit.
        steps: Most steps; None leaves it to the stopping rule (at most 50,000).
        restarts: Fits from different start points, run as one; the best is returned, the others are kept and compared.
        draws: Draws per step; None takes the objective's default.
        batch_size: Data per step; None means all.
        init: ``"auto"`` (the best of a few cheap Gaussian approximations), ``"laplace"``, ``"prior"``, named
            values, an unconstrained point, or another posterior to continue from.
        callbacks: One or several functions, called with each :class:`~vifamily.solvers.StepReport`; a true result ends
            the fit.
        tracker: Where per-step numbers go (see :mod:`vifamily.trackers`).
        progress: Whether to show a progress line; None shows it on a terminal only.
        device: Device to run on; None leaves the model where it is.
        dtype: Floating dtype; None leaves the model's.
        checkpoint: Folder for a checkpoint, written every ``checkpoint_every`` steps; when it holds one of this
            same fit, the fit goes on from there, bit for bit on CPU.
        checkpoint_every: Steps between checkpoints.
        time_limit: Most seconds that this call may take steps; the averaged posterior so far is returned.
        encoder: For models with local latents: a module from a batch's data to a context; None gives each datum its
            own parameters.
        local_family: For models with local latents: the family of one datum's latents; None takes mean field.

    Returns:
        The posterior: draws, density, summary, diagnosis.

    Raises:
        IncompatibleError: If model, family and objective cannot meet.
        UnknownNameError: If a name is not registered.
        ConfigError: If a number is out of range, or the checkpoint folder cannot be written.
        CheckpointError: If the checkpoint is corrupt or belongs to another fit.
        NonFiniteLossError: If the loss stops being finite; its ``posterior`` is the last finite state.

    Warns:
        ConvergenceWarning: If the fit ended before its stopping rule was met and no one asked it to.

    Ctrl-C ends the fit after the step in progress and returns the averaged posterior so far.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", family="full_rank", seed=0)
        >>> posterior.record.stop_reason
        'converged'
    """
    _check_numbers(seed, steps, restarts, checkpoint_every, time_limit)
    calls = _checked_callbacks(callbacks)
    if tracker is not None and (isinstance(tracker, type) or not isinstance(tracker, Tracker)):
        what = f"the class {tracker.__name__}" if isinstance(tracker, type) else type(tracker).__name__
        raise ConfigError(
            f"a tracker is an object with start, log and finish, such as CsvTracker('a.csv'), got {what}."
        )
    planned = make_plan(
        model, family, objective, solver, draws=draws, batch_size=batch_size, device=device, dtype=dtype
    )
    folder = None if checkpoint is None else checkpoints.prepare(checkpoint)
    loop = _Loop(planned, seed=seed, most_steps=steps or _MOST_STEPS, restarts=restarts, init=init, folder=folder,
                 every=checkpoint_every, encoder=encoder, local_family=local_family)  # fmt: skip
    posterior = loop.run(calls, tracker, FitProgress(show=progress, most_steps=steps or _MOST_STEPS), time_limit)
    record = posterior.record
    if steps is None and record.stop_reason in ("max_steps", "smallest_step"):
        warnings.warn(
            f"the fit stopped after {record.steps} steps ({record.stop_reason}) before its averages settled: look at "
            "posterior.diagnose(), and try more draws=, another family, or init= this posterior to go on.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return posterior


def _check_numbers(seed: int, steps: int | None, restarts: int, every: int, time_limit: float | None) -> None:
    check_seed(seed)
    for name, value in (("steps", steps), ("restarts", restarts), ("checkpoint_every", every)):
        optional = value is None and name == "steps"
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    number = isinstance(time_limit, (int, float)) and not isinstance(time_limit, bool)
    if time_limit is not None and not (number and time_limit > 0):
        raise ConfigError(f"time_limit must be a positive number of seconds, got {time_limit!r}.")


def _checked_callbacks(callbacks: Any) -> tuple[Callable[[StepReport], Any], ...]:
    found = (callbacks,) if callable(callbacks) else callbacks
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(callable(call) for call in found):
        raise ConfigError(f"callbacks must be functions that take a StepReport, got {callbacks!r:.80}.")
    return tuple(found)


class _Loop:
    """One fit: builds the run, drives it, and packs what comes out."""

    def __init__(
        self, planned: Plan, *, seed: int, most_steps: int, restarts: int, init: Any, folder: Path | None, every: int,
        encoder: torch.nn.Module | None, local_family: Any,
    ) -> None:  # fmt: skip
        self.plan, self.seed, self.most_steps, self.restarts = planned, seed, most_steps, restarts
        self.folder, self.every = folder, every
        self.encoder, self.local_family = encoder, local_family
        self.notes = list(planned.notes)
        self.saved = None if folder is None else checkpoints.read_if_any(folder)
        self.began, self.seconds_before = time.monotonic(), 0.0
        self.torn = False
        self.local = Capability.LOCAL in planned.model.capabilities
        if not self.local and (encoder is not None or local_family is not None):
            raise ConfigError("encoder= and local_family= are for models with local latents; this model has none.")
        # local latents are drawn for the data of a batch, so all data are one batch
        self.batch_size = planned.model.num_data if self.local and planned.batch_size is None else planned.batch_size
        self.batches = planned.model.batches(self.batch_size, seed=seed)
        self.families = [self._build(r, init) for r in range(restarts)]
        self.runs = [self._start(group) for group in self._groups()]

    # -- setting up ----------------------------------------------------------------------------------------------------
    def _build(self, restart: int, init: Any) -> Family:
        plan, source = self.plan, generator(self.seed, "family", restart)
        family = plan.entry.build(plan.latent, generator=source)
        family.spec = describe(plan.entry)
        how = initialise(family, plan.entry, plan.model, init, seed=self.seed, restart=restart,
                         minibatches=plan.batch_size is not None)  # fmt: skip
        if restart == 0:
            self.notes.append(f"started {how}")
        return self._with_locals(family, source) if self.local else family

    def _with_locals(self, family: Family, source: torch.Generator) -> Family:
        entry = as_entry("mean_field" if self.local_family is None else self.local_family)
        encoder, context_dim = copy.deepcopy(self.encoder), None
        if encoder is not None:
            first = self.batches.at(0)
            context = encoder(None if first is None else first.data)
            context_dim = context.shape[-1]
        return LocalFamily.from_entries(family, entry, self.plan.model.local_dim, generator=source,
                                        num_data=self.plan.model.num_data, encoder=encoder,
                                        context_dim=context_dim)  # fmt: skip

    def _groups(self) -> list[list[int]]:
        """Restarts that run as one: all of them, or one by one where the model has parameters of its own."""
        own = self.local or any(p.requires_grad for p in self.plan.model.parameters())
        return [[r] for r in range(self.restarts)] if own and self.restarts > 1 else [list(range(self.restarts))]

    def _start(self, group: list[int]) -> Run:
        members = [self.families[r] for r in group]
        family = members[0] if len(group) == 1 else StackedFamily(members)
        latent, objective = self.plan.latent, self.plan.objective
        loss = _local_loss(objective) if self.local else objective.loss
        spec = joint_noise_spec(family, self.batch_size or 0) if isinstance(family, LocalFamily) else family.noise_spec
        # parameters of the model would be shared by runs that follow each other: each has its own copy
        model = self.plan.model if len(group) == self.restarts else copy.deepcopy(self.plan.model)
        stream = NoiseStream(self.seed, spec, draws=self.plan.draws, restarts=len(group), first_restart=group[0],
                             dtype=latent.dtype, device=latent.device, balanced=objective.linear_in_draws)  # fmt: skip
        half = draw_noise(
            family.noise_spec,
            (_MONITOR_DRAWS // 2,),
            generator(self.seed, "monitor"),
            dtype=latent.dtype,
            device=latent.device,
        )
        fixed = torch.cat([half, -half if family.noise_spec.law == "normal" else 1 - half])
        if len(group) > 1:
            fixed = fixed.expand(len(group), *fixed.shape)
        state = objective.init_state(model, family, generator=generator(self.seed, "objective"))
        return self.plan.solver.start(
            Task(loss, model, family, stream.at, self.batches.at, fixed, len(group), members[0].step_size, state)
        )

    # -- running -------------------------------------------------------------------------------------------------------
    def run(
        self,
        callbacks: Sequence[Callable[[StepReport], Any]],
        tracker: Tracker | None,
        display: FitProgress,
        time_limit: float | None,
    ) -> Posterior:
        self._resume()
        if tracker is not None:
            tracker.start({**self._config(), "resumed_at": max(run.step_count for run in self.runs)})
        reasons: list[str] = []
        deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        try:
            with display, Interrupts() as interrupts:
                for run in self.runs:
                    reasons.append(self._drive(run, callbacks, tracker, display, deadline, interrupts))
                    if reasons[-1] in _BY_REQUEST:
                        break
        except Exception as error:
            self._rescue(error)
            raise
        finally:
            if tracker is not None:
                tracker.finish()
        self._save()
        return self._posterior(reasons)

    def _drive(
        self,
        run: Run,
        callbacks: Sequence[Callable[[StepReport], Any]],
        tracker: Tracker | None,
        display: FitProgress,
        deadline: float,
        interrupts: Interrupts,
    ) -> str:
        finished: str | None = getattr(run, "finished", None)
        while finished is None:
            if run.step_count >= self.most_steps:
                return "max_steps"
            try:
                # a step that is cut in two leaves a state that no uninterrupted fit passes through
                self.torn = True
                report = run.step()
                self.torn = False
                finished = report.finished
                display.update(report.step, sum(report.loss) / len(report.loss), report.step_size, report.phase)
                if tracker is not None:
                    tracker.log(report.step, {"loss": min(report.loss), "step_size": report.step_size, **report.terms})
                asked_to_stop = any([call(report) for call in callbacks])
            except KeyboardInterrupt:
                return "interrupted"
            if finished is not None:
                break
            if self.folder is not None and run.step_count % self.every == 0:
                self._save()
            if asked_to_stop:
                return "callback"
            if interrupts.asked:
                return "interrupted"
            if time.monotonic() > deadline:
                return "time_limit"
        return finished

    def _rescue(self, error: Exception) -> None:
        """Keep what was computed when the model, a callback or the loss ends the fit."""
        if isinstance(error, VifamilyError):
            self.torn = False  # raised by the loss, before the step changed anything
        if self.folder is not None and not self.torn:
            with contextlib.suppress(ConfigError):
                self._save()
                error.add_note(f"The state before the failure is in the checkpoint {self.folder}.")
        if isinstance(error, NonFiniteLossError):
            with contextlib.suppress(VifamilyError):
                error.posterior = self._posterior(["non_finite"], non_finite=1)

    def _seconds(self) -> float:
        return time.monotonic() - self.began + self.seconds_before

    # -- checkpoints ---------------------------------------------------------------------------------------------------
    def _config(self) -> dict[str, Any]:
        return {
            "model": getattr(self.plan.problem, "name", None) or type(self.plan.model).__name__,
            "dim": self.plan.latent.dim,
            "num_data": self.plan.model.num_data,
            "dtype": str(self.plan.latent.dtype),
            "family": describe(self.plan.entry),
            "objective": describe(self.plan.objective),
            "solver": describe(self.plan.solver),
            "seed": self.seed,
            "restarts": self.restarts,
            "draws": self.plan.draws,
            "batch_size": self.plan.batch_size,
        }

    def _save(self) -> None:
        if self.folder is None or self.torn:
            return
        tensors: dict[str, Tensor] = {}
        values = []
        for i, run in enumerate(self.runs):
            own, plain = run.tensors()
            tensors.update({f"run/{i}/{name}": t for name, t in own.items()})
            values.append(plain)
        for r, family in enumerate(self.families):
            tensors[f"shift/{r}"], tensors[f"scale/{r}"] = family.shift, family.scale
        meta = {
            "kind": "fit",
            "config": self._config(),
            "runs": values,
            "seconds": self._seconds(),
            "versions": versions(),
        }
        checkpoints.write(self.folder, tensors, meta)

    def _resume(self) -> None:
        if self.saved is None:
            return
        tensors, meta = self.saved
        if meta.get("kind") != "fit" or meta.get("config") != self._config():
            theirs, ours = meta.get("config") or {}, self._config()
            different = [f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in ours.items() if theirs.get(k) != v]
            raise CheckpointError(
                f"the checkpoint in {self.folder} belongs to another fit ({'; '.join(different) or 'not a fit'}). "
                "Use another folder, or remove it."
            )
        try:
            for r, family in enumerate(self.families):
                same = torch.equal(tensors[f"shift/{r}"], family.shift)
                if not same or not torch.equal(tensors[f"scale/{r}"], family.scale):
                    raise CheckpointError(
                        f"the checkpoint in {self.folder} started from another point: the model or the data have "
                        "changed. Use another folder."
                    )
            for i, (run, plain) in enumerate(zip(self.runs, meta["runs"], strict=True)):
                prefix = f"run/{i}/"
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                run.restore(own, plain)
            self.seconds_before = float(meta["seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the checkpoint in {self.folder} lacks what this fit needs: {error!r}.") from error

    # -- packing -------------------------------------------------------------------------------------------------------
    def _posterior(self, reasons: Sequence[str], non_finite: int = 0) -> Posterior:
        outputs = [run.output() for run in self.runs]
        families: list[Family] = []
        for run in self.runs:
            held = run.task.family  # type: ignore[attr-defined]
            families += held.members() if isinstance(held, StackedFamily) else [held.copy()]
        losses = [loss for out in outputs for loss in out["losses"]]
        finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
        best = int(np.argmin(finite))
        out = outputs[best if len(outputs) > 1 else 0]
        # runs that followed each other may have ended differently: what counts is the one that is returned
        reason = reasons[best] if len(reasons) == len(self.runs) > 1 and reasons[-1] not in _BY_REQUEST else reasons[-1]
        for note in (n for o in outputs for n in o["notes"]):
            self.notes.append(note)
        record = FitRecord(
            objective=describe(self.plan.objective),
            estimator=self.plan.estimator,
            family=describe(self.plan.entry),
            solver=describe(self.plan.solver),
            seed=self.seed,
            steps=max(run.step_count for run in self.runs),
            stop_reason=reason,
            converged=reason in ("converged", "closed_form"),
            seconds=self._seconds(),
            draws_per_step=self.plan.draws,
            num_restarts=self.restarts,
            trace=_trace(self.runs[best if len(self.runs) > 1 else 0], best if len(self.runs) == 1 else 0),
            restart_losses=tuple(losses),
            best_restart=best,
            non_finite=non_finite,
            gradient_snr=out["gradient_snr"],
            rhat_iterates=_number_or_none(out["rhat"]),
            mcse_iterates=_number_or_none(out["mcse"]),
            dropped_per_epoch=getattr(self.batches, "dropped_per_epoch", 0),
            notes=tuple(self.notes),
            versions=versions(),
        )
        for family in families:
            family.requires_grad_(requires_grad=False)
        config = {**self._config(), "problem": getattr(self.plan.problem, "name", None)}
        model = self.runs[best if len(self.runs) > 1 else 0].task.model  # type: ignore[attr-defined]
        return Posterior(
            model, families[best], record, layout=model.layout, problem=self.plan.problem,
            restarts=tuple(families) if len(families) > 1 else (), objective=self.plan.objective, config=config,
        )  # fmt: skip


def _local_loss(objective: Any) -> Callable[..., Loss]:
    def loss(family: Any, model: Any, noise: Tensor, batch: Batch | None, state: Any) -> Loss:
        if batch is None:
            raise ConfigError("a fit with local latents needs batches.")
        result: Loss = objective.loss(LocalView(family, batch), model, noise, batch, state)
        return result

    return loss


def _number_or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _trace(run: Run, restart: int) -> Mapping[str, np.ndarray]:
    """Loss, its error, step size and terms over at most 2,000 blocks of steps."""
    losses = run.losses[:, min(restart, run.losses.shape[1] - 1)].numpy()
    if losses.size == 0:
        return {name: np.zeros(0) for name in ("step", "loss", "loss_error", "step_size")}
    width = max(1, math.ceil(losses.size / _TRACE_POINTS))
    edges = np.arange(0, losses.size, width)
    counts = np.diff(np.append(edges, losses.size))

    def mean(column: np.ndarray) -> np.ndarray:
        return np.add.reduceat(column, edges) / counts

    loss = mean(losses)
    # error of a short running mean: what a reader of the curve takes for its noise
    smooth = max(1, min(50, losses.size // 4))
    deviation = np.sqrt(np.maximum(_running(losses**2, smooth) - _running(losses, smooth) ** 2, 0) / smooth)
    out = {
        "step": edges + counts,
        "loss": loss,
        "loss_error": mean(deviation),
        "step_size": mean(run.step_sizes.numpy()),
    }
    out.update(
        {f"term:{name}": mean(column.numpy()) for name, column in run.terms.items() if column.numel() == losses.size}
    )
    return out


def _running(column: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window, shorter at the ends."""
    total = np.concatenate([[0.0], np.cumsum(column)])
    at = np.arange(column.size)
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, column.size)
    out: np.ndarray = (total[high] - total[low]) / (high - low)
    return out
