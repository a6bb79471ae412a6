"""From a simulator, a conditional family and an encoder to an amortised posterior."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vifamily import registry
from vifamily.errors import ConfigError, ShapeError
from vifamily.families.flow import Flow
from vifamily.interrupts import Interrupts
from vifamily.models import Simulations, Simulator
from vifamily.models._calls import check_count
from vifamily.numerics.threads import few_threads
from vifamily.objectives import Objective
from vifamily.objectives._joint_ratio import JointRatio
from vifamily.plan import describe, make_plan
from vifamily.posterior._record import FitRecord, versions
from vifamily.posterior.amortised import _by_critic as game
from vifamily.posterior.amortised._by_likelihood import (
    ByLikelihood,
    draws_per_datum,
    refuse_without_likelihood,
)
from vifamily.posterior.amortised._family import AmortisedFamily
from vifamily.posterior.amortised._going_on import checked_init, entry_of
from vifamily.posterior.amortised._posterior import AmortisedPosterior
from vifamily.posterior.amortised._training import EpochReport, EpochTrainer, Pairs, Trainer, drive
from vifamily.posterior.amortised.encoders import EncoderEntry, Vector, as_encoder, encoder_spec
from vifamily.progress import FitProgress
from vifamily.rng import generator, split
from vifamily.solvers import StepReport
from vifamily.trackers import Tracker
from vifamily.types import Batch, Capability, LatentSpec
from vifamily.watch import BY_REQUEST, Watch, deadline_after

__all__ = ["fit_amortised"]

_BATCH = 256
_FRESH_BATCHES = 64
"""Batches of fresh simulations that count as an epoch."""
_FEWEST_PAIRS = 20
_SIMULATIONS, _HOLDOUT, _PATIENCE = 10_000, 0.1, 20
"""For objectives that do not say: simulations to make, share held out, passes without an improvement that end a fit."""
_LEAST_STEPS = 30
"""Steps that make an epoch at least."""
_MOST_STEPS = 50_000
_REGRESSION = 10_000
"""Pairs from which a family's start is set, at most."""
_SCALING = 1000
"""Simulations that set the scales of data and parameters where observations are learnt from."""

Done = tuple[EpochTrainer, AmortisedFamily, str]
"""A trainer that has ended, what it trained, and why it ended."""


def fit_amortised(
    simulator: Simulator,
    family: Any = "auto",
    objective: Any = "inclusive_kl",
    *,
    encoder: Any = None,
    seed: int = 0,
    steps: int | None = None,
    restarts: int = 1,
    draws: int | None = None,
    batch_size: int | None = None,
    step_size: float | None = None,
    init: Any = "auto",
    callbacks: Sequence[Callable[[StepReport], Any]] = (),
    tracker: Tracker | None = None,
    progress: bool | None = None,
    time_limit: float | None = None,
    workers: int = 1,
) -> AmortisedPosterior:
    """Fit a conditional family to a simulator's joint; ``vf.fit`` calls this for a simulator.

    By ``inclusive_kl`` simulated pairs are all that is needed. Other objectives (``elbo``, ``iwae``, ``renyi``,
    ``reweighted_wake``, ``msc``, ...) evaluate the likelihood of a simulator that has one, and are averaged over data:
    those of :meth:`~vifamily.models.Simulator.with_observations`, or simulated ones.

    Args:
        simulator: The simulator; the simulations or observations it carries are used, where it does.
        family: A conditional family's name or entry; ``"auto"`` takes a neural spline flow.
        objective: ``inclusive_kl``, with options; ``roc_arc_critic``, a game on draws alone; or an objective by the
            likelihood.
        encoder: A module, or a name such as ``"set(outputs=16)"``; None takes the standardised data for a flow, whose
            networks see them, and a perceptron for other families.
        seed: Root seed of simulations, networks and the order of the pairs.
        steps: Most steps, of a game the length of its schedule; None takes 50,000, and 4,000 for a game.
        restarts: Networks to train on the same simulations; the best on the held-out ones is returned.
        draws: Draws of q at each datum of a step, for objectives that draw from it; None takes two where the loss is a
            mean over draws, four for a game, and the objective's default elsewhere.
        batch_size: Pairs per step; None takes 256, or less where simulations are few.
        step_size: First step size of Adam; None takes what suits the family, 0.01 for
            flows on residuals and 0.004 elsewhere, and 0.001 for a game.
        init: ``"auto"``, or an amortised posterior to go on from.
        callbacks: Functions called after every epoch with a :class:`~vifamily.solvers.StepReport`; a true result ends
            the fit.
        tracker: Where the numbers of every epoch go.
        progress: Whether to show a progress line; None shows it on a terminal only.
        time_limit: Most seconds for the descent.
        workers: Processes that simulate.

    Returns:
        The amortised posterior.

    Raises:
        IncompatibleError: If family or objective cannot be used for a simulator.
        ConfigError: If a number is out of range.
        ModelError: If prior or simulator raise.
    """
    run = _Run(simulator, family, objective, encoder, seed, draws, batch_size, step_size, steps, init, workers)
    began = time.monotonic()
    run.prepare()
    simulated = time.monotonic() - began
    deadline = deadline_after(time_limit)
    done: list[Done] = []
    if tracker is not None:
        tracker.start(run.config(restarts))
    try:
        numbers = run.batch_size * max(simulator.dim, run.all.x[0].numel())
        with (
            FitProgress(show=progress, most_steps=run.steps) as display,
            Interrupts() as interrupts,
            few_threads(numbers),
        ):
            watch = Watch(callbacks, tracker, display, interrupts, deadline)
            for r in range(restarts):
                trainer, module = run.trainer(r)
                reason = drive(trainer, run.steps, watch)
                trainer.restore_best()
                done.append((trainer, module, reason))
                if reason in BY_REQUEST:
                    break
    finally:
        if tracker is not None:
            tracker.finish()
    return run.posterior(done, restarts, time.monotonic() - began, simulated)


class _Run:
    """What a fit is made of."""

    def __init__(
        self, simulator: Simulator, family: Any, objective: Any, encoder: Any, seed: int, draws: int | None,
        batch_size: int | None, step_size: float | None, steps: int | None, init: Any,
        workers: int,
    ) -> None:  # fmt: skip
        self.simulator, self.seed, self.workers = simulator, seed, workers
        asked = registry.build("objectives", objective) if isinstance(objective, (str, registry.Spec)) else objective
        self.by_likelihood = isinstance(asked, Objective) and not asked.pairs_alone
        if self.by_likelihood:
            if Capability.LOG_JOINT in asked.needs_model:
                refuse_without_likelihood(simulator, asked)
            draws = draws_per_datum(asked, draws)
        self.by_critic = isinstance(asked, Objective) and asked.by_pairs
        if self.by_critic:
            draws = game.DRAWS if draws is None else draws
        elif not self.by_likelihood and draws is not None:
            raise ConfigError("draws= is for objectives that draw from q: the pairs in a step are batch_size=.")
        planned = make_plan(simulator, family, asked, "auto", draws=draws, batch_size=batch_size, device=None,
                            dtype=None)  # fmt: skip
        self.objective: Any = asked if self.by_likelihood else planned.objective
        self.draws = planned.draws
        self.init = checked_init(init, simulator)
        self.entry = entry_of(self.init, planned.entry.for_pairs(), chosen=family != "auto")
        plain = isinstance(self.entry, Flow)
        self.encoder: EncoderEntry = (
            (Vector() if plain else Vector(hidden=(64, 64))) if encoder is None else as_encoder(encoder)
        )
        self.asked_batch = None if batch_size is None else check_count(batch_size, "batch_size")
        self.steps = steps or (game.MOST_STEPS if self.by_critic else _MOST_STEPS)
        self.step_size = step_size
        self.notes: list[str] = [*planned.notes, *(f"warning: {text}" for text in planned.warnings)]

    # -- simulations ---------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Make or take the simulations, and set the held-out ones apart."""
        number = getattr(self.objective, "simulations", _SIMULATIONS)
        stored = self.simulator.stored
        observed = self.simulator.observations if self.by_likelihood else None
        sleeps = self.by_likelihood and Capability.SIMULATE in self.objective.needs_model
        if observed is not None and not sleeps:
            number = _SCALING
        self.fresh = stored is None and number is None
        self.batch_size = self.asked_batch or _BATCH
        if stored is None:
            first = max(2 * _BATCH, 1000) if number is None else number
            stored = self.simulator.simulations(
                first, seed=split(self.seed, "amortised simulations"), workers=self.workers
            )
        self.non_finite = stored.non_finite
        pairs = self._pairs(stored)
        if len(pairs) < _FEWEST_PAIRS:
            raise ConfigError(f"{len(pairs)} finite simulations are too few: make {_FEWEST_PAIRS} at least.")
        self.all = pairs
        if observed is not None:
            self._observed(observed)
        elif self.fresh:
            self.holdout, self.kept = pairs, pairs
            self.notes.append("fresh simulations at every step")
        else:
            order = torch.randperm(len(pairs), generator=generator(self.seed, "holdout")).to(pairs.z.device)
            held = max(2, round(getattr(self.objective, "holdout", _HOLDOUT) * len(pairs)))
            apart, rest = order[:held], order[held:]
            self.holdout = Pairs(pairs.z[apart], pairs.x[apart])
            self.kept = Pairs(pairs.z[rest], pairs.x[rest])
            if self.asked_batch is None:
                # some thirty steps in an epoch at least, where there are few pairs
                self.batch_size = max(32, min(_BATCH, len(self.kept) // _LEAST_STEPS))
            self.notes.append(f"{len(self.kept)} simulations to learn from, {held} held out")
        if self.non_finite:
            self.notes.append(f"warning: {self.non_finite} simulations were not finite and left out")

    def _observed(self, data: Tensor) -> None:
        """Learn from observations; some are held out where there are enough."""
        if tuple(data.shape[1:]) != tuple(self.all.x.shape[1:]):
            raise ShapeError(
                f"observations must have the shape of simulations, {tuple(self.all.x.shape[1:])}, got "
                f"{tuple(data.shape[1:])}."
            )
        order = torch.randperm(len(data), generator=generator(self.seed, "holdout")).to(data.device)
        held = round(_HOLDOUT * len(data)) if len(data) >= _FEWEST_PAIRS else 0
        apart, rest = order[:held], order[held:]
        kept = data[rest]
        # rows in the place of parameters, which are not known
        self.kept = Pairs(torch.arange(len(kept), device=data.device).unsqueeze(-1), kept)
        self.holdout = self.kept if not held else Pairs(apart.unsqueeze(-1), data[apart])
        self.batch_size = min(self.batch_size, len(kept))
        self.notes.append(f"{len(kept)} observations to learn from, {held} held out")

    def _pairs(self, given: Simulations) -> Pairs:
        return Pairs(self.simulator.unconstrained(given.theta), given.x.to(self.simulator.device, self.simulator.dtype))

    def _epoch(self, restart: int) -> Callable[[int], Pairs]:
        if not self.fresh:
            return lambda epoch: self.kept

        def simulate(epoch: int) -> Pairs:
            made = self.simulator.simulations(
                _FRESH_BATCHES * self.batch_size, seed=split(self.seed, "fresh simulations", restart, epoch),
                workers=self.workers,
            )  # fmt: skip
            self.non_finite += made.non_finite
            return self._pairs(made)

        return simulate

    # -- networks ------------------------------------------------------------------------------------------------------
    def _module(self, restart: int) -> AmortisedFamily:
        if self.init is not None:
            return self.init.family.copy().requires_grad_()
        source = generator(self.seed, "family", restart)
        options: dict[str, Any] = {"dtype": self.simulator.dtype, "device": self.simulator.device}
        encoder = self.encoder.build(tuple(self.all.x.shape[1:]), generator=source, **options)
        encoder.fit_scale(self.all.x)
        with torch.no_grad():
            size = encoder(self.all.x[:2]).shape[-1]
        model = self.simulator
        latent = LatentSpec(model.dim, model.space, model.num_categories, int(size), **options)
        family = self.entry.build(latent, generator=source)
        family.spec = describe(self.entry)
        z = self.all.z.double()
        with torch.no_grad():
            parts = [encoder(part) for part in self.all.x[:_REGRESSION].split(4096)]
        if not family.start_from(self.all.z[:_REGRESSION], torch.cat(parts), model.layout.bounded()):
            family.precondition(z.mean(0), z.std(0).clamp_min(1e-12))
        return AmortisedFamily(encoder, family)

    def trainer(self, restart: int) -> tuple[EpochTrainer, AmortisedFamily]:
        """Build a network and what trains it."""
        module = self._module(restart)
        if self.by_likelihood:
            return self._likelihood_trainer(module, restart), module
        if self.by_critic:
            return self._game_trainer(module, restart), module
        objective, simulator = self.objective, self.simulator
        noise = torch.zeros(0, dtype=simulator.dtype, device=simulator.device)

        def loss(family: nn.Module, batch: Batch) -> Tensor:
            out: Tensor = objective.loss(family, simulator, noise, batch).surrogate
            return out

        def pointwise(family: nn.Module, pairs: Pairs) -> Tensor:
            parts = zip(pairs.z.split(4096), pairs.x.split(4096), strict=True)
            return torch.cat([-family.log_prob(z, x) for z, x in parts])  # type: ignore[operator]

        trainer = Trainer(
            module, loss, pointwise, self._epoch(restart), self.holdout, batch_size=self.batch_size,
            step_size=self.step_size or module.family.pairs_step_size, patience=objective.patience,
            seed=split(self.seed, "order", restart), fresh=self.fresh,
        )  # fmt: skip
        return trainer, module

    def _game_trainer(self, module: AmortisedFamily, restart: int) -> game.GameTrainer:
        source = generator(self.seed, "critic", restart)
        options: dict[str, Any] = {"dtype": self.simulator.dtype, "device": self.simulator.device}
        encoder = self.encoder.build(tuple(self.all.x.shape[1:]), generator=source, **options)
        encoder.fit_scale(self.all.x)
        critic = JointRatio(encoder, self.all.z, self.all.x, self.objective.hidden, source)
        return game.GameTrainer(
            module, critic, self.objective.joint_loss, self._epoch(restart), self.holdout, batch_size=self.batch_size,
            draws=self.draws, step_size=self.step_size or game.STEP_SIZE, most_steps=self.steps,
            seed=split(self.seed, "order", restart), fresh=self.fresh,
        )  # fmt: skip

    def _likelihood_trainer(self, module: AmortisedFamily, restart: int) -> Trainer:
        kept = Pairs(torch.arange(len(self.kept), device=self.kept.x.device).unsqueeze(-1), self.kept.x)
        way = ByLikelihood(self.objective, self.simulator, module, kept.x, self.all, draws=self.draws,
                           seed=split(self.seed, "likelihood", restart))  # fmt: skip
        self.resolved = way.objective
        # few observations are seen often in what counts as an epoch
        times = max(1, _LEAST_STEPS * self.batch_size // len(kept))
        epoch = kept if times == 1 else Pairs(kept.z.repeat(times, 1), kept.x.repeat(times, *[1] * (kept.x.dim() - 1)))
        return Trainer(
            module, way.loss, way.pointwise, lambda _: epoch, self.holdout, batch_size=self.batch_size,
            step_size=self.step_size or module.family.pairs_step_size,
            patience=getattr(self.objective, "patience", _PATIENCE),
            seed=split(self.seed, "order", restart), fresh=False,
        )  # fmt: skip

    # -- packing -------------------------------------------------------------------------------------------------------
    def config(self, restarts: int) -> dict[str, Any]:
        """What was asked for, plain data."""
        return {
            "model": self.simulator.name or type(self.simulator).__name__, "dim": self.simulator.dim,
            "family": describe(self.entry), "encoder": encoder_spec(self.encoder),
            "objective": describe(self.objective),
            "seed": self.seed, "restarts": restarts, "batch_size": self.batch_size, "resumed_at": 0,
        }  # fmt: skip

    def _estimator(self) -> str | None:
        found = getattr(self, "resolved", self.objective if self.by_critic else None)
        return None if found is None else getattr(found, "estimator", None)

    def posterior(
        self,
        done: Sequence[Done],
        restarts: int,
        seconds: float,
        simulated: float,
    ) -> AmortisedPosterior:
        """Pack the best network."""
        losses = [trainer.best_loss for trainer, _, _ in done]
        best = min(range(len(done)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        trainer, module, reason = done[best]
        reports = trainer.reports
        self.notes += trainer.notes
        self.notes.append(f"simulating took {simulated:.1f} s of {seconds:.1f} s")
        record = FitRecord(
            objective=describe(self.objective), estimator=self._estimator(), family=describe(self.entry),
            solver="two_player" if self.by_critic else "adam",
            seed=self.seed, steps=trainer.step, stop_reason=reason, converged=reason == "converged", seconds=seconds,
            draws_per_step=self.batch_size * (self.draws if self.by_likelihood or self.by_critic else 1),
            num_restarts=len(done), restart_losses=tuple(losses), best_restart=best,
            non_finite=self.non_finite + trainer.non_finite, notes=tuple(self.notes), versions=versions(),
            trace={
                name: _column(reports, key)
                for name, key in (("step", "step"), ("loss", "loss"), ("loss_error", "loss_error"),
                                  ("step_size", "step_size"), ("term:holdout", "holdout"))
            },
        )  # fmt: skip
        module.requires_grad_(requires_grad=False)
        return AmortisedPosterior(
            self.simulator, module, record, layout=self.simulator.layout, encoder_spec=encoder_spec(self.encoder),
            config=self.config(restarts),
        )  # fmt: skip


def _column(reports: Sequence[EpochReport], key: str) -> Any:
    return np.array([getattr(report, key) for report in reports], dtype=np.float64)
