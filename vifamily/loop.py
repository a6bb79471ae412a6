"""The loop behind ``fit``: it builds the runs, drives them, writes checkpoints and packs what comes out."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily import checkpoint as checkpoints
from vifamily.errors import CheckpointError, ConfigError, NonFiniteLossError, VifamilyError
from vifamily.families import Family
from vifamily.families._adapters import as_entry
from vifamily.families._local_view import LocalView, joint_noise_spec
from vifamily.families._stack import StackedFamily
from vifamily.families.local import LocalFamily
from vifamily.interrupts import Interrupts
from vifamily.numerics.gaussian_start import GaussianStart
from vifamily.numerics.threads import few_threads
from vifamily.plan import Plan, describe
from vifamily.posterior import FitRecord, Posterior, trace_of, versions
from vifamily.progress import FitProgress
from vifamily.rng import NoiseStream, draw_noise, generator
from vifamily.solvers import Run, StepReport, Task, worth_compiling
from vifamily.start import gaussian_starts, initialise
from vifamily.trackers import Tracker
from vifamily.types import Batch, Capability, Loss
from vifamily.watch import BY_REQUEST, Watch, deadline_after

__all__ = ["FitLoop"]

_MONITOR_DRAWS = 64


class FitLoop:
    """One fit: builds the run, drives it, and packs what comes out."""

    def __init__(
        self, planned: Plan, *, seed: int, most_steps: int, restarts: int, init: Any, folder: Path | None, every: int,
        encoder: torch.nn.Module | None, local_family: Any, watched: bool = False,
    ) -> None:  # fmt: skip
        self.plan, self.seed, self.most_steps, self.restarts = planned, seed, most_steps, restarts
        self.folder, self.every = folder, every
        self.encoder, self.local_family = encoder, local_family
        self.notes = [*planned.notes, *(f"warning: {text}" for text in planned.warnings)]
        self.saved = None if folder is None else checkpoints.read_if_any(folder)
        self.began, self.seconds_before = time.monotonic(), 0.0
        self.torn = False
        self.local = Capability.LOCAL in planned.model.capabilities
        if not self.local and (encoder is not None or local_family is not None):
            raise ConfigError("encoder= and local_family= are for models with local latents; this model has none.")
        # local latents are drawn for the data of a batch, so all data are one batch
        self.batch_size = planned.model.num_data if self.local and planned.batch_size is None else planned.batch_size
        self.batches = planned.model.batches(self.batch_size, seed=seed)
        starts = None
        if not planned.solver.own_start:
            starts = gaussian_starts(planned.entry, planned.model, init, seed=seed, restarts=restarts,
                                     minibatches=planned.batch_size is not None)  # fmt: skip
        self.families = [self._build(r, init, starts) for r in range(restarts)]
        # on fixed draws that all restarts share, those that start at one Gaussian are one calculation
        self.place = starts[1] if starts is not None and self._shares_draws() else list(range(restarts))
        if len(set(self.place)) < restarts:
            self.notes.append(
                f"{restarts} restarts started at {len(set(self.place))} distinct Gaussian(s): one fit each"
            )
        self.compiled = self._compile_choice(most_steps, watched=watched)
        with few_threads(self._numbers()):
            self.runs = [self._start(group) for group in self._groups()]
        self._tell_compiled()

    # -- compiled steps and threads ------------------------------------------------------------------------------------
    def _numbers(self) -> int:
        """Numbers that one step passes over, about: draws times restarts times coordinates or data."""
        plan = self.plan
        data = self.batch_size or plan.model.num_data or 1
        return plan.draws * self.restarts * max(plan.latent.dim, data)

    def _compile_choice(self, most_steps: int, *, watched: bool) -> bool:
        """Whether to compile: as asked, as in the checkpoint that is taken up, or where it pays."""
        asked = self.plan.compile
        if asked != "auto":
            return bool(asked)
        if self.saved is not None:
            return bool((self.saved[1].get("config") or {}).get("compile", False))
        if not self.plan.solver.compiles:
            return False
        if watched:
            self.notes.append(
                "steps not compiled: callbacks and trackers see every step (compile=True: every hundredth)"
            )
            return False
        size = sum(p.numel() for family in self.families for p in family.parameters())
        pays, why = worth_compiling(
            numbers=self._numbers(), parameters=size, steps=most_steps, device=self.plan.latent.device
        )
        if not pays:
            self.notes.append(f"steps not compiled: {why}")
        return pays

    def _tell_compiled(self) -> None:
        if not self.compiled:
            return
        self.compiled = all(run.compiled for run in self.runs)
        reasons = [run.not_compiled or "this solver has no compiled steps" for run in self.runs if not run.compiled]
        self.notes.append(f"steps not compiled: {reasons[0]}" if reasons else "steps compiled")

    # -- setting up ----------------------------------------------------------------------------------------------------
    def _shares_draws(self) -> bool:
        # families whose parameters begin at random are different fits from the same Gaussian
        own = [{name: p.detach() for name, p in family.named_parameters()} for family in self.families]
        same = all(torch.equal(p, own[0][name]) for other in own[1:] for name, p in other.items())
        return self.plan.solver.fixed_draws and same and not self._separate()

    def _build(self, restart: int, init: Any, starts: tuple[list[GaussianStart], list[int]] | None) -> Family:
        plan, source = self.plan, generator(self.seed, "family", restart)
        family = plan.entry.build(plan.latent, generator=source)
        family.spec = describe(plan.entry)
        how = initialise(family, plan.entry, plan.model, init, seed=self.seed, restart=restart,
                         minibatches=plan.batch_size is not None, search=not plan.solver.own_start,
                         gaussian=None if starts is None else starts[0][starts[1][restart]])  # fmt: skip
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

    def _separate(self) -> bool:
        return self.local or any(p.requires_grad for p in self.plan.model.parameters())

    def _groups(self) -> list[list[int]]:
        """Restarts that run as one: all distinct ones, or one by one where the model has parameters of its own."""
        if self._separate() and self.restarts > 1:
            return [[r] for r in range(self.restarts)]
        return [sorted({self.place.index(which) for which in self.place})]

    def _start(self, group: list[int]) -> Run:
        members = [self.families[r] for r in group]
        family = members[0] if len(group) == 1 else StackedFamily(members)
        latent, objective = self.plan.latent, self.plan.objective
        loss = _local_loss(objective) if self.local else objective.loss
        spec = joint_noise_spec(family, self.batch_size or 0) if isinstance(family, LocalFamily) else family.noise_spec
        # parameters of the model would be shared by runs that follow each other: each has its own copy
        model = copy.deepcopy(self.plan.model) if self._separate() and self.restarts > 1 else self.plan.model
        rows = self.plan.draws
        if objective.noise_per_datum:
            rows *= self.batch_size or self.plan.model.own_batch_size or self.plan.model.num_data or 1
        stream = NoiseStream(self.seed, spec, draws=rows, restarts=len(group), first_restart=group[0],
                             dtype=latent.dtype, device=latent.device, balanced=objective.linear_in_draws,
                             native=self.compiled)  # fmt: skip
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
            Task(
                loss,
                model,
                family,
                stream.at,
                self.batches.at,
                fixed,
                len(group),
                members[0].step_size,
                state,
                self.plan.draws,
                objective.linear_in_draws,
                self.seed,
                group[0],
                objective,
                stream.span,
                self.batches.index_at,
                self.compiled,
                self.most_steps,
            )  # fmt: skip
        )

    # -- running -------------------------------------------------------------------------------------------------------
    def run(
        self,
        callbacks: Sequence[Callable[[StepReport], Any]],
        tracker: Tracker | None,
        display: FitProgress,
        time_limit: float | None,
    ) -> Posterior:
        """Run to the end and return the posterior; see :func:`vifamily.fit.fit`."""
        self._resume()
        if tracker is not None:
            tracker.start({**self._config(), "resumed_at": max(run.step_count for run in self.runs)})
        reasons: list[str] = []
        deadline = deadline_after(time_limit)
        try:
            with display, Interrupts() as interrupts, few_threads(self._numbers()):
                watch = Watch(callbacks, tracker, display, interrupts, deadline)
                for run in self.runs:
                    reasons.append(self._drive(run, watch))
                    if reasons[-1] in BY_REQUEST:
                        break
        except Exception as error:
            self._rescue(error)
            raise
        finally:
            if tracker is not None:
                tracker.finish()
        self._save()
        return self._posterior(reasons)

    def _drive(self, run: Run, watch: Watch) -> str:
        finished: str | None = getattr(run, "finished", None)
        while finished is None:
            if run.step_count >= self.most_steps:
                return "max_steps"
            try:
                # a step that is cut in two leaves a state that no uninterrupted fit passes through
                self.torn = True
                run.horizon = self._horizon(run.step_count)
                report = run.step()
                self.torn = False
                finished = report.finished
                mean = sum(report.loss) / len(report.loss)
                numbers = {"loss": min(report.loss), "step_size": report.step_size, **report.terms}
                asked = watch.tell(report, loss=mean, phase=report.phase, numbers=numbers)
            except KeyboardInterrupt:
                return "interrupted"
            if finished is not None:
                break
            if self.folder is not None and run.step_count % self.every == 0:
                self._save()
            if (reason := watch.reason(asked=asked)) is not None:
                return reason
        return finished

    def _horizon(self, step: int) -> int:
        """Total of steps at which a call must end: the last step, or the next checkpoint."""
        due = self.most_steps if self.folder is None else (step // self.every + 1) * self.every
        return min(due, self.most_steps)

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

    def count_time(self, seconds: float) -> None:
        """Set the time spent so far; what follows is added."""
        self.began, self.seconds_before = time.monotonic(), seconds

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
            "compile": self.compiled,
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
        if isinstance(meta.get("config"), dict):
            meta["config"].setdefault("compile", False)  # written before steps could be compiled
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
            held = run.task.family
            families += held.members() if isinstance(held, StackedFamily) else [held.copy()]
        losses = [loss for out in outputs for loss in out["losses"]]
        # every restart gets what its distinct fit came to
        row = {which: i for i, which in enumerate(sorted(set(self.place), key=self.place.index))}
        if len(row) < self.restarts:
            families = [families[row[which]].copy() for which in self.place]
            losses = [losses[row[which]] for which in self.place]
        finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
        best = int(np.argmin(finite))
        out = outputs[best if len(outputs) > 1 else 0]
        # runs that followed each other may have ended differently: what counts is the one that is returned
        reason = reasons[best] if len(reasons) == len(self.runs) > 1 and reasons[-1] not in BY_REQUEST else reasons[-1]
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
            trace=trace_of(self.runs[best], 0) if len(self.runs) > 1 else trace_of(self.runs[0], row[self.place[best]]),
            restart_losses=tuple(losses),
            best_restart=best,
            non_finite=non_finite,
            gradient_snr=out["gradient_snr"],
            rhat_iterates=_number_or_none(out["rhat"]),
            mcse_iterates=_number_or_none(out["mcse"]),
            mean_errors=_errors_of(out, best if len(outputs) == 1 else 0),
            k_hat=out.get("k_hat"),
            dropped_per_epoch=getattr(self.batches, "dropped_per_epoch", 0),
            notes=tuple(self.notes),
            versions=versions(),
        )
        for family in families:
            family.requires_grad_(requires_grad=False)
        config = {**self._config(), "problem": getattr(self.plan.problem, "name", None)}
        model = self.runs[best if len(self.runs) > 1 else 0].task.model
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


def _errors_of(out: Mapping[str, Any], restart: int) -> tuple[float, ...]:
    rows = out.get("mean_errors") or []
    chosen = rows[restart] if restart < len(rows) else []
    return tuple(chosen) if all(math.isfinite(v) for v in chosen) else ()


def _number_or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
