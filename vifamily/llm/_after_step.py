"""What changes after each step of the optimiser beside what it trains: weights, alpha, and members that died."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vifamily.errors import CheckpointError, VifamilyWarning
from vifamily.llm._alpha import AlphaControl
from vifamily.llm._extra import require
from vifamily.llm._reseeding import DeadMembers, reseed
from vifamily.llm._routed import Tally
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.manifest import base_digest, read_manifest
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.saving import load_members
from vifamily.llm.stochastic import StochasticCausalLM

__all__ = ["AfterStep", "step_callback"]


class AfterStep:
    """Keeps what a step's responsibilities say until it has been taken, and acts on it.

    Args:
        options: The ensemble's options.
        num_members: Number of members.
        seed: Root seed of the noise of reseeding.

    Attributes:
        alpha: The alpha of each step.
        dead: Who is dying.
        reseeded: How often members have been put beside others.
    """

    def __init__(self, options: EnsembleOptions, num_members: int, seed: int) -> None:
        self.alpha, self.dead = AlphaControl(options, num_members), DeadMembers(options, num_members)
        self.reseeded = 0
        self._options, self._seed, self._tally = options, seed, Tally()
        self._batch = (-1, 0)

    def add(self, tally: Tally) -> None:
        """Add the sums of one batch of the step."""
        self._tally.add(tally)

    def act(self, model: StackedCausalLM, optimiser: Any, reduce: Any, step: int) -> None:
        """Act on the step's sums.

        Args:
            model: The ensemble.
            optimiser: What trains it.
            reduce: Sums a tensor over processes; None where there is one.
            step: Number of steps taken.
        """
        tally, self._tally = self._tally, Tally()
        options = self._options
        if tally.usage is None or not (options.learn_weights or self.alpha.held or options.reseed_below is not None):
            return
        sums = [tally.units, tally.sums.get("routing/entropy", 0.0), tally.slope]
        counts = torch.cat([tally.usage, torch.tensor(sums, dtype=torch.float64)])
        if reduce is not None:
            counts = reduce(counts.to(model.log_weight)).cpu()
        units, entropy, slope = counts[-3:].tolist()
        usage = counts[:-3] / units
        self.alpha.after_step(entropy / units, slope / units)
        if options.learn_weights:
            _move_weights(model, usage, options.weight_rate)
        for member, source in self.dead.after_step(usage.tolist()):
            reseed(model, optimiser, member, source, noise=options.reseed_noise, seed=self._seed, step=step)
            self.reseeded += 1
            warnings.warn(
                f"member {member} explained less than {options.reseed_below:g} of an equal share for "
                f"{options.reseed_patience} steps: at step {step} it was put beside member {source}.",
                VifamilyWarning,
                stacklevel=2,
            )

    # --- one uncertain adapter, whose draws are the members ---

    def draw(self, model: StackedCausalLM, step: int | None) -> None:
        """Draw members anew for a batch of a step, or those that are evaluated; other ensembles are left alone."""
        if isinstance(model, StochasticCausalLM):
            if step is None:
                model.redraw()
            else:
                # batches of one step are told apart by their number
                self._batch = (step, self._batch[1] + 1 if self._batch[0] == step else 0)
                model.redraw(*self._batch)

    def save(self, model: StackedCausalLM, folder: Path) -> None:
        """Write the distribution of an uncertain adapter, and draw the members that are saved beside it."""
        if isinstance(model, StochasticCausalLM):
            model.save_posterior(folder)
            model.redraw()

    def load(self, model: StackedCausalLM, folder: Path, *, state: bool = True) -> None:
        """Read what a checkpoint holds, and with ``state`` go on from it.

        Raises:
            CheckpointError: If it is damaged, or of another run.
        """
        if isinstance(model, StochasticCausalLM):
            model.load_posterior(folder)
            manifest = read_manifest(folder)
            if manifest.base_digest != (model.known_digest or base_digest(model.base)):
                raise CheckpointError(f"the adapter in {folder} was trained on another base. Load that base.")
        else:
            manifest = load_members(model, folder)
        if state:
            self.restore(manifest.training.get("routing_state"))

    def plain(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold, as plain values."""
        return {"alpha": self.alpha.plain(), "dead": self.dead.plain(), "reseeded": self.reseeded}

    def restore(self, state: Any) -> None:
        """Go on from what a checkpoint holds; one without it is of an earlier version, and starts anew.

        Raises:
            CheckpointError: If it cannot be read, or is of a run of another kind.
        """
        if state is None:
            return
        try:
            if not isinstance(state, Mapping):
                raise TypeError(type(state).__name__)
            self.alpha.restore(state["alpha"])
            self.dead.restore(state["dead"])
            self.reseeded = int(state["reseeded"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of routing in the checkpoint cannot be read: {error}.") from error


@torch.no_grad()
def _move_weights(model: StackedCausalLM, usage: torch.Tensor, rate: float) -> None:
    """A step of expectation maximisation: weights towards mean responsibilities."""
    log_weight = model.log_weight
    weight = (1 - rate) * log_weight.exp() + rate * usage.to(log_weight)
    weight = weight.clamp(min=1e-3 / len(weight))
    log_weight.copy_((weight / weight.sum()).log())


def step_callback(act: Any) -> Any:
    """Return a callback of transformers that calls ``act`` after each step of the optimiser, before what is saved."""

    class Step(require("transformers", "training an ensemble").TrainerCallback):  # type: ignore[misc]
        """Acts after a step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            act()

    return Step()
