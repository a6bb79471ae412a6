"""Batches of rows for an ensemble: whole groups, micro-batches that keep units whole, and reference values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import DataError
from vifamily.llm._passes import PaddedRows
from vifamily.llm.rows import PairRow, Row, collate_pairs, collate_sft

__all__ = ["Collator", "GroupedRows", "Inputs", "blocks_of"]


class GroupedRows(Sequence[Any]):
    """Rows taken a group at a time, so that a batch holds whole groups.

    Example:
        >>> rows = [Row((1,), (2,), (True,), i, name) for i, name in enumerate("aba")]
        >>> [[row.index for row in group] for group in GroupedRows(rows)]
        [[0, 2], [1]]
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        groups: dict[Any, list[Any]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        if None in groups:
            raise DataError("rows have no group: prepare them with group_column=.")
        self._groups = list(groups.values())

    def __len__(self) -> int:
        """Number of groups."""
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        """Rows of one group."""
        return self._groups[index]


@dataclasses.dataclass(frozen=True)
class Collator:
    """From rows, or groups of rows, to tensors.

    Attributes:
        pad_token_id: Id that fills up.
        pairs: Whether rows are preferences.
        reference: Log probabilities of chosen and rejected answers under the reference by position of the record.
    """

    pad_token_id: int
    pairs: bool
    reference: Sequence[tuple[float, float]] | None = None

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Collate; see the class."""
        rows = [row for item in items for row in (item if isinstance(item, (list, tuple)) else [item])]
        kind: type = PairRow if self.pairs else Row
        if not all(isinstance(row, kind) for row in rows):
            raise DataError(
                f"rows must be {kind.__name__}s: prepare them with prepare_{'pairs' if self.pairs else 'sft'}."
            )
        out = (collate_pairs if self.pairs else collate_sft)(rows, self.pad_token_id)
        numbers: dict[Any, int] = {}
        out["group"] = torch.tensor([numbers.setdefault(row.group, len(numbers)) for row in rows])
        if self.pairs and self.reference is not None:
            known = [self.reference[row.index] for row in rows]
            out["reference_log_prob"] = torch.tensor([c for c, _ in known] + [r for _, r in known], dtype=torch.float64)
        return out


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch: rows for the model, and what they belong to.

    Attributes:
        rows: Padded rows; of preferences, all chosen ones before all rejected ones.
        group: Group of each row or pair.
        pairs: Whether rows are preferences.
        reference: Log probability of each row under the reference, where known.
    """

    rows: PaddedRows
    group: Tensor
    pairs: bool
    reference: Tensor | None = None

    @classmethod
    def from_dict(cls, batch: dict[str, Tensor], *, pairs: bool) -> Inputs:
        """Read what a collator made."""
        rows = PaddedRows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        return cls(rows, batch["group"], pairs, batch.get("reference_log_prob"))

    def items(self) -> int:
        """What the loss is averaged over: scored tokens, or pairs."""
        return len(self.group) if self.pairs else int(self.rows.completion_mask[:, 1:].sum())

    def model_rows(self, item: Tensor) -> Tensor:
        """Rows for the model of some rows or pairs."""
        return torch.cat([item, item + len(self.group)]) if self.pairs else item


def blocks_of(group: Tensor, size: int, *, whole_groups: bool) -> tuple[list[Tensor], bool]:
    """Indices of micro-batches, and whether each holds at most ``size`` items.

    Args:
        group: Group of each item, ``(item,)``.
        size: Most items of a micro-batch; a larger group has one of its own.
        whole_groups: Whether groups must stay together.

    Example:
        >>> found, fits = blocks_of(torch.tensor([0, 1, 0, 2]), 2, whole_groups=True)
        >>> [block.tolist() for block in found], fits
        ([[0, 2], [1, 3]], True)
    """
    if not whole_groups:
        return list(torch.arange(len(group), device=group.device).split(size)), True
    blocks: list[list[int]] = []
    members: dict[int, list[int]] = {}
    for i, g in enumerate(group.tolist()):
        members.setdefault(g, []).append(i)
    for own in members.values():
        if blocks and len(blocks[-1]) + len(own) <= size:
            blocks[-1] += own
        else:
            blocks.append(list(own))
    fits = all(len(block) <= size for block in blocks)
    return [torch.tensor(block, device=group.device) for block in blocks], fits
