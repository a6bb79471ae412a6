"""Descent on simulated pairs: epochs over stored ones with a held-out part, or fresh ones without end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vifamily.errors import NonFiniteLossError
from vifamily.rng import generator
from vifamily.solvers import StepReport
from vifamily.types import Batch
from vifamily.watch import Watch

__all__ = ["EpochReport", "EpochTrainer", "Pairs", "Trainer", "batches_of", "drive", "finite_values", "move_average"]

_LEAST_FRACTION = 0.05
"""Share of the first step size at which a plateau ends the fit."""
_SHRINK = 0.3
_LARGEST_NORM = 5.0
_WINDOW = 0.5
"""Share of an epoch over which the running average of the parameters looks back, in e-folds."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Parameters on unconstrained space ``(pair, dim)`` and data ``(pair, *shape)``."""

    z: Tensor
    x: Tensor

    def __len__(self) -> int:
        return int(self.z.shape[0])


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """What one epoch did.

    Attributes:
        step: Steps taken so far.
        loss: Mean loss over the epoch.
        loss_error: Its standard error.
        holdout: Loss on the held-out pairs at the averaged parameters.
        holdout_error: Its standard error.
        step_size: Step size used.
        finished: Why the fit is over, or None.
    """

    step: int
    loss: float
    loss_error: float
    holdout: float
    holdout_error: float
    step_size: float
    finished: str | None = None


def batches_of(pairs: Pairs, batch_size: int, order: tuple[int, int] | None) -> list[Batch]:
    """Cut the pairs of an epoch into batches of one size; those that are left over sit out.

    Args:
        pairs: The pairs.
        batch_size: Pairs of a batch, at most.
        order: Root seed and number of the epoch, which give the order; None keeps that of the pairs.
    """
    if order is not None:
        seed, epoch = order
        places = torch.randperm(len(pairs), generator=generator(seed, "batches", epoch)).to(pairs.z.device)
        pairs = Pairs(pairs.z[places], pairs.x[places])
    size = min(batch_size, len(pairs))
    starts = range(0, len(pairs) // size * size, size)
    return [Batch((pairs.z[i : i + size], pairs.x[i : i + size]), size) for i in starts]


def move_average(average: list[Tensor], parameters: Sequence[Tensor], step: int, look_back: float) -> None:
    """Move a running average of parameters on, which early on looks back less, so that the start is soon forgotten."""
    keep = min(math.exp(-1 / max(1.0, look_back)), step / (step + 10))
    torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)


def finite_values(losses: Sequence[Tensor], *, step: int, epoch: int, term: str) -> Tensor:
    """Return the finite losses of an epoch, in float64.

    Raises:
        NonFiniteLossError: If there is none.
    """
    values = torch.stack(list(losses)).double() if losses else torch.full((1,), math.nan)
    values = values[values.isfinite()]
    if not len(values):
        raise NonFiniteLossError(
            f"the loss was not finite in every step of epoch {epoch}: the simulated data or parameters may span too "
            "many orders of magnitude; simulate their logarithms.",
            step=step,
            term=term,
        )
    return values


class EpochTrainer(Protocol):
    """What trains an amortised family: by epochs, each of which ends with a judgement on held-out pairs."""

    best_loss: float
    step: int
    non_finite: int
    reports: list[EpochReport]
    notes: list[str]

    def run_epoch(self, most_steps: int) -> EpochReport:
        """Take the steps of one epoch."""

    def restore_best(self) -> None:
        """Put what is to be returned into the module."""


class Trainer:
    """Adam on minibatches of pairs, with averaged parameters and a step size that shrinks on plateaus.

    Each epoch ends with the loss of held-out pairs at a running average of the parameters (Polyak and Juditsky 1992).
    Where it has not improved for some epochs, the step size shrinks and the descent goes on from the best state; where
    it has been shrunk to a twentieth, or has not improved for ``patience`` epochs in all, the fit is over and the best
    state is restored.

    Args:
        module: What is trained; its loss is ``loss(module, batch)``.
        loss: From the module and a batch to the mean loss.
        pointwise: From the module and pairs to the loss of each, for the held-out part.
        train: A function of the epoch that gives the pairs of the epoch.
        holdout: Pairs that are held out.
        batch_size: Pairs per step.
        step_size: First step size.
        patience: Epochs without an improvement after which the fit is over.
        seed: Root seed of the order of the pairs.
        fresh: Whether every epoch has new pairs, which need no shuffling.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, Batch], Tensor],
        pointwise: Callable[[nn.Module, Pairs], Tensor],
        train: Callable[[int], Pairs],
        holdout: Pairs,
        *,
        batch_size: int,
        step_size: float,
        patience: int,
        seed: int,
        fresh: bool,
    ) -> None:
        self.module, self.loss, self.pointwise = module, loss, pointwise
        self.train, self.holdout = train, holdout
        self.batch_size, self.first_step_size, self.patience = batch_size, step_size, patience
        self.seed, self.fresh = seed, fresh
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimiser = self._optimiser(step_size)
        self.average = [p.detach().clone() for p in self.parameters]
        self.best = [p.detach().clone() for p in self.parameters]
        self.best_loss, self.best_error = math.inf, math.nan
        self.step, self.epoch, self.since_best, self.since_cut = 0, 0, 0, 0
        self.non_finite = 0
        self.reports: list[EpochReport] = []
        self.notes: list[str] = []

    def _optimiser(self, step_size: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters, lr=step_size, fused=True)

    @property
    def step_size(self) -> float:
        """The step size now."""
        return float(self.optimiser.param_groups[0]["lr"])

    def run_epoch(self, most_steps: int) -> EpochReport:
        """Take the steps of one epoch and evaluate the held-out pairs.

        Raises:
            NonFiniteLossError: If the loss of several steps running is not finite.
        """
        batches = batches_of(self.train(self.epoch), self.batch_size, None if self.fresh else (self.seed, self.epoch))
        look_back = _WINDOW * len(batches)
        losses = []
        for batch in batches:
            if self.step >= most_steps:
                break
            losses.append(self._one(batch))
            move_average(self.average, self.parameters, self.step, look_back)
        self.epoch += 1
        values = finite_values(losses, step=self.step, epoch=self.epoch, term="log q")
        return self._judge(values, most_steps)

    def _one(self, batch: Batch) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(self.module, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, _LARGEST_NORM)
        self.step += 1
        if bool(norm.isfinite()):
            self.optimiser.step()
        else:
            self.non_finite += 1
        return loss.detach()

    def _judge(self, values: Tensor, most_steps: int) -> EpochReport:
        each = self._with(self.average, lambda: self.pointwise(self.module, self.holdout).double())
        held = float(each.mean())
        error = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan
        used, finished = self.step_size, None
        if held < self.best_loss:
            self.best_loss, self.best_error, self.since_best, self.since_cut = held, error, 0, 0
            for mine, now in zip(self.best, self.average, strict=True):
                mine.copy_(now)
        else:
            self.since_best, self.since_cut = self.since_best + 1, self.since_cut + 1
        if self.since_cut >= max(2, self.patience // 4):
            if self.step_size * _SHRINK < _LEAST_FRACTION * self.first_step_size:
                finished = "converged"
            else:
                self._cut()
        if self.since_best >= self.patience:
            finished = "converged"
        if finished is None and self.step >= most_steps:
            finished = "max_steps"
        spread = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        report = EpochReport(self.step, float(values.mean()), spread, held, error, used, finished)
        self.reports.append(report)
        return report

    def _cut(self) -> None:
        """Go on from the best state with smaller steps."""
        size = self.step_size * _SHRINK
        self.since_cut = 0
        with torch.no_grad():
            for p, best, average in zip(self.parameters, self.best, self.average, strict=True):
                p.copy_(best)
                average.copy_(best)
        self.optimiser = self._optimiser(size)

    @torch.no_grad()
    def _with(self, values: list[Tensor], call: Callable[[], Any]) -> Any:
        """Call with other parameters in place, and put the own ones back."""
        own = [p.detach().clone() for p in self.parameters]
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)
        try:
            return call()
        finally:
            for p, value in zip(self.parameters, own, strict=True):
                p.copy_(value)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best state into the module."""
        if math.isfinite(self.best_loss):
            for p, value in zip(self.parameters, self.best, strict=True):
                p.copy_(value)


def drive(trainer: EpochTrainer, most_steps: int, watch: Watch) -> str:
    """Run epochs until a fit is over, and tell of each; returns why it is over."""
    while True:
        try:
            report: EpochReport = trainer.run_epoch(most_steps)
        except KeyboardInterrupt:
            return "interrupted"
        told = StepReport(report.step, (report.loss,), {"holdout": report.holdout}, report.step_size, report.finished)
        numbers = {"loss": report.loss, "step_size": report.step_size, "holdout": report.holdout}
        asked = watch.tell(told, loss=report.loss, phase=f"held out {report.holdout:.4g}", numbers=numbers)
        reason = report.finished or watch.reason(asked=asked)
        if reason is not None:
            return reason
