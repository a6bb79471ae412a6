"""Sets of fixed draws: how many there are, what is on them, and a loss on one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.solvers._base import Task
from vifamily.solvers._fixed_draws import FixedLoss, Grouped, balanced_draws, independent_draws, part_size, stream
from vifamily.types import NoiseSpec

__all__ = ["draws_of", "fewest_draws", "fix_on", "fixed_loss", "numbers_of_draws"]

_GROWTH = 4


def fewest_draws(family: Any) -> int | None:
    """Draws from which on the optimum of a family is bounded; None where it does not say."""
    fewest = getattr(family, "fewest_fixed_draws", None)
    return None if fewest is None else fewest()


def numbers_of_draws(task: Task, family: Any, most: int) -> tuple[list[int], list[str]]:
    """Numbers of draws of the levels, and what is to be noted about the first."""
    if math.prod(family.noise_spec.shape) == 0:
        return [2], []
    # groups of the draws that one value combines, and as many of their mirror images
    unit = 2 if task.linear_in_draws else 2 * task.draws
    first = max(task.draws, 2) if task.linear_in_draws else 64
    # on just enough draws the optimum is bounded but far off: twice as many
    fewest = 2 * (fewest_draws(family) or 1)
    # powers of two are what Sobol points are made for, and can be evaluated a part at a time
    count = 2 ** math.ceil(math.log2(max(first, fewest)))
    notes = []
    if first < fewest:
        notes.append(
            f"the first number of fixed draws was raised from {first} to {count}: on fewer than {fewest // 2} the "
            "optimum of this family is unbounded"
        )
    counts = [unit * math.ceil(count / unit)]
    while len(counts) < 2 or counts[-1] * _GROWTH <= most:
        counts.append(counts[-1] * _GROWTH)
    return counts, notes


def draws_of(task: Task, family: Any, count: int, level: int, check: int = 0) -> Tensor:
    """The draws of a level, or of one of its checks: the same for all restarts."""
    seed = stream(task.seed, level, 0, check)
    spec: NoiseSpec = family.noise_spec
    return (balanced_draws if task.linear_in_draws else independent_draws)(spec, count, seed)


def fix_on(task: Task, loss: FixedLoss, draws: Tensor, options: dict[str, Any]) -> None:
    """Fix one set of draws for all rows of a loss, in parts that its memory allows."""
    # a group is never cut
    count, num_data = len(draws), getattr(task.model, "num_data", None)
    unit = 1 if task.linear_in_draws or count % task.draws else task.draws
    held = None
    if num_data is None and part_size(count, loss.rows, None) < count:
        held = loss.held_by_a_draw(draws, unit, options)
    part = unit * part_size(count // unit, unit * loss.rows, num_data, held)
    loss.fix([draws] * loss.rows, part, options)


def fixed_loss(task: Task, family: Any, parameters: Sequence[torch.nn.Parameter], rows: int) -> FixedLoss:
    """The loss of a task on draws that are yet to be fixed."""
    # families of points have no draws to group
    single = task.linear_in_draws or math.prod(family.noise_spec.shape) == 0
    held = family if single else Grouped(family, task.draws)
    return FixedLoss(lambda noise: task.objective_loss(held, task.model, noise, None, None), parameters, rows)
