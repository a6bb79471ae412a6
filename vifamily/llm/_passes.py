"""Exact gradients of a routed loss, with memory that does not grow with the number of members."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vifamily.llm._stacked import completion_rows

__all__ = ["LossOf", "PaddedRows", "Score", "stacked_pass", "two_pass"]

Score = Callable[["PaddedRows", "tuple[int, int] | None"], Tensor]
"""From rows and members to log probabilities of the scored tokens, ``(member, token)``."""

LossOf = Callable[[Tensor, Tensor], Tensor]
"""From such log probabilities and the indices of the rows they belong to, in order, to a number.

It must be a sum over blocks of rows that keep units whole.
"""


@dataclasses.dataclass(frozen=True)
class PaddedRows:
    """Token ids ready for a model, padded on the right.

    Attributes:
        input_ids: ``(row, position)``.
        attention_mask: The same shape.
        completion_mask: The same shape, true where a token is scored.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    def take(self, index: Tensor) -> PaddedRows:
        """Some of the rows, cut to the longest of them."""
        mask = self.attention_mask[index]
        width = max(2, int(mask.sum(-1).max()))
        return PaddedRows(self.input_ids[index, :width], mask[:, :width], self.completion_mask[index, :width])

    @property
    def token_row(self) -> Tensor:
        """Row of each scored token, ``(token,)``."""
        return completion_rows(self.completion_mask)


def stacked_pass(
    score: Score, rows: PaddedRows, blocks: Sequence[Tensor], loss_of: LossOf, backward: Callable[[Tensor], object]
) -> Tensor:
    """Add the gradient of a loss, one block of rows after the other with all members at once.

    Args:
        score: The model.
        rows: The batch.
        blocks: Indices of the rows of each block; units must not be split.
        loss_of: The loss of a block.
        backward: Called with the loss of each block.

    Returns:
        The loss over all blocks, detached.
    """
    total: Tensor | None = None
    for index in blocks:
        loss = loss_of(score(rows.take(index), None), index)
        backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    return torch.zeros(()) if total is None else total


def two_pass(
    score: Score,
    rows: PaddedRows,
    blocks: Sequence[Tensor],
    loss_of: LossOf,
    backward: Callable[[Tensor], object],
    *,
    num_members: int,
) -> Tensor:
    """Add the same gradient with one member at a time: log probabilities first, then each member's own pass.

    The gradient of the loss in a log probability is known after the first pass, which keeps nothing; with it fixed,
    members are independent. Units may span blocks. One forward pass more than :func:`stacked_pass`.

    Args:
        score: The model.
        rows: The batch.
        blocks: Indices of the rows evaluated at once.
        loss_of: The loss of the whole batch.
        backward: Called with a number whose gradient is the part of one member and block.
        num_members: Number of members.

    Returns:
        The loss, detached.
    """
    parts = [rows.take(index) for index in blocks]
    with torch.no_grad():
        found = [torch.cat([score(part, (k, k + 1)) for k in range(num_members)]) for part in parts]
    with torch.enable_grad():
        value = torch.cat(found, 1).requires_grad_()
        loss = loss_of(value, torch.cat(list(blocks)))
        (slope,) = torch.autograd.grad(loss, value)
    offset = 0
    for part, each in zip(parts, found, strict=True):
        width = each.shape[1]
        for k in range(num_members):
            own = slope[k : k + 1, offset : offset + width]
            backward((own * score(part, (k, k + 1))).sum())
        offset += width
    return loss.detach()
