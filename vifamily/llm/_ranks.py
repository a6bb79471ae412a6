"""Members shared out over processes: each evaluates its own on the whole batch, and log probabilities are exchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.llm._batches import Inputs
from vifamily.llm._passes import LossOf, PaddedRows, Score

__all__ = ["own_members", "ranks_pass", "whole_batch"]

Exchange = Callable[[Tensor], Tensor]


def own_members(num_members: int, rank: int, world_size: int) -> tuple[int, int]:
    """First member of a process, and the one after its last.

    Raises:
        ConfigError: If there are fewer members than processes.

    Example:
        >>> [own_members(8, rank, 3) for rank in range(3)]
        [(0, 2), (2, 5), (5, 8)]
    """
    if num_members < world_size:
        raise ConfigError(
            f"{num_members} members cannot be shared out over {world_size} processes: start at most as many processes "
            "as there are members, or use another route."
        )
    return num_members * rank // world_size, num_members * (rank + 1) // world_size


def whole_batch(inputs: Inputs, gather: Exchange) -> Inputs:
    """The rows of all processes, the same on each; groups of different processes stay apart.

    Args:
        inputs: The rows of this process.
        gather: From ``(1, ...)`` to the values of all processes, ``(rank, ...)``.

    Returns:
        All rows, in the order of the processes.
    """
    rows, sides, count = inputs.rows, 2 if inputs.pairs else 1, len(inputs.group)
    device = inputs.group.device
    own = torch.tensor([[count, rows.input_ids.shape[1], int(inputs.group.max()) + 1]], device=device)
    shapes = gather(own)
    most, width = int(shapes[:, 0].max()), int(shapes[:, 1].max())
    counts = shapes[:, 0].tolist()

    def collect(value: Tensor, sides: int) -> Tensor:
        value = value.unflatten(0, (sides, count))
        wide = value.dim() == 3
        shape = (1, sides, most, width) if wide else (1, sides, most)
        padded = torch.zeros(shape, dtype=value.dtype if value.is_floating_point() else torch.long, device=device)
        place = padded[0, :, :count, : value.shape[-1]] if wide else padded[0, :, :count]
        place.copy_(value)
        parts = [each[:, :n] for each, n in zip(gather(padded), counts, strict=True)]
        return torch.cat(parts, 1).flatten(0, 1)

    first = (shapes[:, 2].cumsum(0) - shapes[:, 2]).repeat_interleave(shapes[:, 0])
    return dataclasses.replace(
        inputs,
        rows=PaddedRows(
            collect(rows.input_ids, sides),
            collect(rows.attention_mask, sides),
            collect(rows.completion_mask, sides).bool(),
        ),
        group=collect(inputs.group, 1) + first,
        reference=None if inputs.reference is None else collect(inputs.reference, sides),
    )


def ranks_pass(
    score: Score,
    rows: PaddedRows,
    blocks: Sequence[Tensor],
    loss_of: LossOf,
    backward: Callable[[Tensor], object],
    members: tuple[int, int],
    num_members: int,
    total: Exchange,
) -> Tensor:
    """Add the part of a loss's gradient that falls to some members; the parts of all processes sum to the gradient.

    A member's part needs the log probabilities of the others and not their gradients, so what is exchanged is one
    number for each member and token, outside of autograd.

    Args:
        score: The model.
        rows: The batch, the same in every process.
        blocks: Indices of the rows of each block; units must not be split.
        loss_of: The loss of a block.
        backward: Called with a number whose gradient is the part of this process and block.
        members: The members of this process.
        num_members: Number of all members.
        total: Sum of a tensor over processes.

    Returns:
        The loss over all blocks, detached; the same in every process.
    """
    first, last = members
    found: list[Tensor] = []
    for index in blocks:
        own = score(rows.take(index), members)
        value = own.new_zeros(num_members, own.shape[1])
        value[first:last] = own.detach()
        value = total(value)
        with torch.enable_grad():
            value = value.detach().requires_grad_()
            loss = loss_of(value, index)
            (slope,) = torch.autograd.grad(loss, value)
        backward((slope[first:last] * own).sum())
        found.append(loss.detach())
    return torch.stack(found).sum()
