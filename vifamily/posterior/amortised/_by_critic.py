"""A game on simulated pairs: a critic learns to tell them from pairs with draws of q, and q learns to prevent it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.posterior.amortised._at_data import FamilyAtData
from vifamily.posterior.amortised._family import AmortisedFamily
from vifamily.posterior.amortised._training import EpochReport, Pairs, batches_of, finite_values, move_average
from vifamily.rng import draw_noise, generator
from vifamily.types import Batch, Loss

__all__ = ["DRAWS", "MOST_STEPS", "STEP_SIZE", "GameTrainer"]

MOST_STEPS = 4000
"""Steps of a game that is given no number of them."""
STEP_SIZE = 1e-3
"""First step size of both players, a quarter of what descent on a loss takes: flows run away from a critic at more."""
DRAWS = 4
"""Draws of q at each datum of a step."""
_INNER = 2
"""Steps of the critic for one of the family."""
_BETAS = (0.5, 0.99)
"""Of Adam: a long memory of gradients carries players round each other."""
_FLAT, _LAST = 0.5, 0.02
"""Share of the steps after which step sizes fall, and what they fall to."""
_AVERAGED = 0.05
"""Share of the steps over which the average of the family's parameters looks back."""
_AUDIT_EPOCHS, _AUDIT_PACE = 20, 1e-3
_LARGE = 0.01
"""Value of the audit below which q passes for the posterior; equal laws have 0, laws apart 0.586."""
_LARGEST_NORM = 5.0


class GameTrainer:
    """Two players on simulated pairs, by alternating steps of Adam on one schedule.

    The step size of q is constant over the first half of the steps and falls to a fiftieth along half a cosine, that
    of the critic stays; what is returned is a running average of q's parameters. At the end the critic is trained on
    against that average, which stays, and judged on held-out pairs: the audit, whose value compares restarts, and says
    whether q can still be told from the posterior.

    Args:
        module: The family and its encoder.
        critic: The critic.
        joint_loss: From an amortised family at data, noise, a batch and the critic to the loss at each datum.
        train: A function of the epoch that gives its pairs.
        holdout: Pairs that are held out.
        batch_size: Pairs per step.
        draws: Draws of q at each datum of a step.
        step_size: First step size of q, and the step size of the critic.
        most_steps: Length of the schedule.
        seed: Root seed of order and noise.
        fresh: Whether every epoch has new pairs, which need no shuffling.
    """

    def __init__(
        self,
        module: AmortisedFamily,
        critic: nn.Module,
        joint_loss: Callable[[Any, Tensor, Batch, Any], Loss],
        train: Callable[[int], Pairs],
        holdout: Pairs,
        *,
        batch_size: int,
        draws: int,
        step_size: float,
        most_steps: int,
        seed: int,
        fresh: bool,
    ) -> None:
        self.module, self.critic, self.joint_loss = module, critic, joint_loss
        self.train, self.holdout = train, holdout
        self.batch_size, self.draws, self.first_step_size = batch_size, draws, step_size
        self.total, self.seed, self.fresh = most_steps, seed, fresh
        self.players = [[p for p in m.parameters() if p.requires_grad] for m in (module, critic)]
        self.optimisers = [torch.optim.Adam(group, lr=step_size, betas=_BETAS) for group in self.players]
        self.average = [p.detach().clone() for p in self.players[0]]
        self.noise = generator(seed, "noise")
        self.step, self.epoch, self.non_finite = 0, 0, 0
        self.best_loss = math.inf
        self.reports: list[EpochReport] = []
        self.notes: list[str] = []

    @property
    def step_size(self) -> float:
        """The family's step size now."""
        return self.first_step_size * self._pace()

    def _pace(self) -> float:
        late = max(0.0, self.step / self.total - _FLAT) / (1 - _FLAT)
        return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, late)))

    # -- one epoch -----------------------------------------------------------------------------------------------------
    def run_epoch(self, most_steps: int) -> EpochReport:
        """Take the steps of one epoch and evaluate the value on held-out pairs; the last one ends with the audit.

        Raises:
            NonFiniteLossError: If the value is finite in no step.
        """
        values = []
        for batch in self._batches(self.epoch):
            if self.step >= min(self.total, most_steps):
                break
            values.append(self._one(batch))
        self.epoch += 1
        seen = finite_values(values, step=self.step, epoch=self.epoch, term="log ratio")
        used, finished = self.step_size, None
        if self.step >= min(self.total, most_steps):
            finished = self._audit()
        held, error = self._held_out()
        self.best_loss = held
        spread = float(seen.std() / math.sqrt(len(seen))) if len(seen) > 1 else math.nan
        report = EpochReport(self.step, float(seen.mean()), spread, held, error, used, finished)
        self.reports.append(report)
        return report

    def _batches(self, epoch: int) -> list[Batch]:
        return batches_of(self.train(epoch), self.batch_size, None if self.fresh else (self.seed, epoch))

    def _one(self, batch: Batch) -> Tensor:
        # the critic keeps its pace while q slows down, so that it follows ever more closely
        self.optimisers[0].param_groups[0]["lr"] = self.step_size
        for _ in range(_INNER):
            self._ascend(batch)
        value = self._descend(batch)
        self.step += 1
        move_average(self.average, self.players[0], self.step, _AVERAGED * self.total)
        return value

    def _game(self, batch: Batch, source: torch.Generator, draws: int) -> Loss:
        x = batch.data[1]
        family = FamilyAtData(self.module, x)
        noise = draw_noise(family.noise_spec, (len(x), draws), source, dtype=x.dtype, device=x.device)
        return self.joint_loss(family, noise, batch, self.critic)

    def _ascend(self, batch: Batch) -> None:
        """One step of the critic, q held."""
        for p in self.players[0]:
            p.requires_grad = False
        try:
            surrogate = self._game(batch, self.noise, self.draws).surrogate.mean()
            self._move(1, torch.autograd.grad(-surrogate, self.players[1]))
        finally:
            for p in self.players[0]:
                p.requires_grad = True

    def _descend(self, batch: Batch) -> Tensor:
        """One step of q, the critic held; returns the value before it."""
        loss = self._game(batch, self.noise, self.draws)
        self._move(0, torch.autograd.grad(loss.surrogate.mean(), self.players[0], allow_unused=True))
        return loss.value.mean()

    def _move(self, player: int, gradients: tuple[Tensor | None, ...]) -> None:
        group = self.players[player]
        for p, gradient in zip(group, gradients, strict=True):
            p.grad = gradient
        norm = nn.utils.clip_grad_norm_(group, _LARGEST_NORM)
        if bool(norm.isfinite()):
            self.optimisers[player].step()
        else:
            self.non_finite += 1
        for p in group:
            p.grad = None

    # -- judging -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _held_out(self) -> tuple[float, float]:
        """The value on held-out pairs at the average, on the same noise every time, and its standard error."""
        source, parts = generator(self.seed, "held out"), []
        own = self._swap(self.average)
        for z, x in zip(self.holdout.z.split(1024), self.holdout.x.split(1024), strict=True):
            parts.append(self._game(Batch((z, x), len(x)), source, 8).value.double())
        self._swap(own)
        each = torch.cat(parts)
        return float(each.mean()), float(each.std() / math.sqrt(len(each)))

    @torch.no_grad()
    def _swap(self, values: list[Tensor]) -> list[Tensor]:
        own = [p.detach().clone() for p in self.players[0]]
        for p, value in zip(self.players[0], values, strict=True):
            p.copy_(value)
        return own

    def _audit(self) -> str:
        """Train the critic on against the averaged family and judge by held-out pairs; returns why the fit is over."""
        self._swap(self.average)
        self.optimisers[1] = torch.optim.Adam(self.players[1], lr=_AUDIT_PACE, betas=_BETAS)
        best, error = self._held_out()
        kept = [p.detach().clone() for p in self.players[1]]
        for epoch in range(_AUDIT_EPOCHS):
            for batch in self._batches(self.epoch + epoch):
                self._ascend(batch)
            held, spread = self._held_out()
            # the critic that tells them apart best counts; more training may only learn the pairs by heart
            if held > best:
                best, error = held, spread
                kept = [p.detach().clone() for p in self.players[1]]
        with torch.no_grad():
            for p, value in zip(self.players[1], kept, strict=True):
                p.copy_(value)
        self.notes.append(
            f"audit: trained on against the fixed posterior, the critic finds {best:.3g} ± {error:.1g} on held-out "
            f"pairs (0 where it is exact, {2 - math.sqrt(2):.3f} where it is told apart without error)"
        )
        return "converged" if best < _LARGE + 3 * error else "max_steps"

    def restore_best(self) -> None:
        """Put the average into the module; there is no earlier state that could be told to be better."""
        self._swap(self.average)
