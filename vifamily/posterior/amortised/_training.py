"""Descent on simulated pairs: epochs over stored ones with a held-out part, or fresh ones without end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import NonFiniteLossError
from vifamily.rng import generator
from vifamily.types import Batch

__all__ = ["EpochReport", "Pairs", "Trainer"]

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
        pairs = self.train(self.epoch)
        if not self.fresh:
            order = torch.randperm(len(pairs), generator=generator(self.seed, "batches", self.epoch))
            order = order.to(pairs.z.device)
            pairs = Pairs(pairs.z[order], pairs.x[order])
        size = min(self.batch_size, len(pairs))
        count = len(pairs) // size
        # early averages look back less, so that the start is soon forgotten
        decay = math.exp(-1 / max(1.0, _WINDOW * count))
        losses = []
        for i in range(count):
            if self.step >= most_steps:
                break
            here = slice(i * size, (i + 1) * size)
            losses.append(self._one(Batch((pairs.z[here], pairs.x[here]), size)))
            keep = min(decay, self.step / (self.step + 10))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        self.epoch += 1
        values = torch.stack(losses).double() if losses else torch.full((1,), math.nan)
        values = values[values.isfinite()]
        if not len(values):
            raise NonFiniteLossError(
                f"the loss was not finite in every step of epoch {self.epoch}: the simulated data or parameters may "
                "span too many orders of magnitude; simulate their logarithms.",
                step=self.step, term="log q",
            )  # fmt: skip
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
