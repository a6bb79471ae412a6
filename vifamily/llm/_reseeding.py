"""Members that explain next to nothing: told once, and put beside a live one where that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import VifamilyWarning
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.options import EnsembleOptions
from vifamily.rng import generator

__all__ = ["DeadMembers", "reseed"]

_DEAD = 0.1
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class DeadMembers:
    """Counts the steps for which members have been dead.

    A member is dead where its mean responsibility is below a share of an equal one: a tenth, or ``reseed_below``.

    Args:
        options: The ensemble's options.
        num_members: K.

    Example:
        >>> dead = DeadMembers(EnsembleOptions(reseed_below=0.1, reseed_patience=2), 2)
        >>> dead.after_step([0.99, 0.01]), dead.after_step([0.98, 0.02]), dead.after_step([0.99, 0.01])
        ([], [(1, 0)], [])
    """

    def __init__(self, options: EnsembleOptions, num_members: int) -> None:
        self._below, self._patience = options.reseed_below, options.reseed_patience
        self._steps = [0] * num_members
        self._told: set[int] = set()

    def after_step(self, usage: Sequence[float]) -> list[tuple[int, int]]:
        """Count a step with these mean responsibilities.

        Returns:
            Members to reseed, each with the live one to put it beside: the one that explains most.
        """
        if self._below is None:
            return []
        least = self._below / len(usage)
        self._steps = [n + 1 if u < least else 0 for n, u in zip(self._steps, usage, strict=True)]
        due = [k for k, n in enumerate(self._steps) if n >= self._patience]
        share, out = list(usage), []
        for k in due:
            self._steps[k] = 0
            self._told.discard(k)
            source = max((u, -j) for j, u in enumerate(share) if j not in due)
            out.append((k, -source[1]))
            share[-source[1]] /= 2  # two of them are not put beside the same one where another explains as much
        return out

    def tell(self, usage: Sequence[float], step: int) -> None:
        """Warn once of each member that is dying."""
        dead = [k for k, u in enumerate(usage) if u < _DEAD / len(usage) and k not in self._told]
        if dead:
            self._told.update(dead)
            warnings.warn(
                f"members {dead} explain less than a tenth of an equal share at step {step}: they are dying. Lower "
                "renyi_alpha, ramp it up from a small value, use fewer members, or put them beside live ones with "
                "reseed_below=0.1.",
                VifamilyWarning,
                stacklevel=2,
            )

    def plain(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold."""
        return {"steps": list(self._steps), "told": sorted(self._told)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self._steps, self._told = [int(n) for n in state["steps"]], {int(k) for k in state["told"]}


@torch.no_grad()
def reseed(
    model: StackedCausalLM, optimiser: Any, member: int, source: int, *, noise: float, seed: int, step: int
) -> None:
    """Put a member beside another: its adapters with noise, and half of its weight.

    Noise is normal, of a share of the root mean square of each matrix. What the optimiser knows of the member is reset:
    its momentum is zero, and its step sizes are those of the member that it stands beside now, which has gradients of
    the same size. Zero second moments would make its first steps several times too long, since the count of steps that
    corrects them is that of all members.

    Args:
        model: The ensemble.
        optimiser: What trains it; states that do not lead with the member are left as they are.
        member: Who is put.
        source: Beside whom.
        noise: Relative size of the noise.
        seed: Root seed; the stream depends on the step and the member too.
        step: Number of steps taken.
    """
    stream = generator(seed, "llm/reseed", step, member)
    for parameter in model.adapter_parameters():
        near = parameter[source].double()
        drawn = torch.randn(near.shape, generator=stream, dtype=torch.float64).to(near.device)
        parameter[member].copy_(near + noise * near.square().mean().sqrt() * drawn)
        for name, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim() and len(value) == model.num_members:
                value[member] = torch.zeros_like(value[member]) if name in _FIRST_MOMENTS else value[source]
    weight = model.log_weight.exp()
    half = (weight[member] + weight[source]) / 2
    weight[member], weight[source] = half, half
    model.log_weight.copy_((weight / weight.sum()).log())
