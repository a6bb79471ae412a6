"""Reference draws as objectives use them: all at each step, or parts that take turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vifamily.errors import ConfigError
from vifamily.objectives._base import restart_shape
from vifamily.types import FamilyLike, ModelLike

__all__ = ["check_number", "check_part", "first_state", "reference_part", "reference_sd", "remembered"]


def check_number(name: str, value: Any, low: float, high: float, allowed: str) -> None:
    """Refuse what is not a number strictly between two bounds.

    Raises:
        ConfigError: With what was got and what is allowed.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and low < value < high):
        raise ConfigError(f"{name} must be {allowed}, got {value!r}.")


def check_part(size: Any) -> None:
    """Refuse a number of reference draws per step that is not None or an integer of 2 or more.

    Raises:
        ConfigError: With what was got.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
        raise ConfigError(f"reference_batch must be an integer of 2 or more, or None for all draws, got {size!r}.")


def first_state(model: ModelLike, family: FamilyLike, size: int | None) -> Tensor | None:
    """Return a count of steps, one per restart, or None where all reference draws are used at every step."""
    draws = model.reference_draws
    if size is None or draws.shape[0] <= size:
        return None
    return torch.zeros(restart_shape(family), dtype=torch.int64, device=draws.device)


def reference_part(model: ModelLike, size: int | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the reference draws of a step, and the state of the next.

    The parts are windows that go round a fixed order of the draws, so that in the long run each is used equally often.
    In that order neighbours lie far apart in the order in which they were given: a part of a Markov chain is the chain
    thinned, not a stretch of it.

    Args:
        model: A model with reference draws.
        size: Most draws of one step, or None for all.
        state: Number of steps so far, one per restart (all the same), or None.

    Returns:
        Draws ``(draw, dim)`` and the next state, None where all draws are used.
    """
    draws = model.reference_draws
    total = draws.shape[0]
    if size is None or total <= size:
        return draws, None
    step = 0 if state is None else int(state.reshape(-1)[0])
    stride = -(-total // size)
    order = torch.cat([torch.arange(first, total, stride) for first in range(stride)])
    chosen = order[(step * size + torch.arange(size)) % total].to(draws.device)
    before = torch.zeros((), dtype=torch.int64) if state is None else state
    return draws[chosen], before + 1


_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remembered(draws: Tensor, what: Any, compute: Callable[[], float]) -> float:
    """Return a number that depends on the reference draws alone, computed once for each tensor of draws."""
    known = _KEPT.setdefault(draws, {})
    if what not in known:
        with torch.no_grad():
            known[what] = compute()
    found: float = known[what]
    return found


def reference_sd(model: ModelLike) -> Tensor:
    """Standard deviation of each coordinate of all reference draws, ``(dim,)``; one where they do not vary."""
    sd = model.reference_draws.std(0)
    return torch.where(sd > 0, sd, torch.ones_like(sd))
