"""Rows of token ids, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vifamily.errors import DataError

__all__ = ["PairRow", "Row", "Rows", "collate_pairs", "collate_sft"]

Ids = tuple[int, ...]
AnyRow = TypeVar("AnyRow", "Row", "PairRow")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One example of supervised fine-tuning.

    Attributes:
        prompt_ids: What is given; never empty, since the first token of all has nothing that predicts it.
        completion_ids: What follows.
        scored: For each of ``completion_ids``, whether it counts; turns of the user inside a conversation do not.
        index: Position of the record in its data set.
        group: Value of the group column, or None.
    """

    prompt_ids: Ids
    completion_ids: Ids
    scored: tuple[bool, ...]
    index: int = 0
    group: str | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_scored(self) -> int:
        """Number of tokens that count."""
        return sum(self.scored)


@dataclasses.dataclass(frozen=True, slots=True)
class PairRow:
    """One preference: two answers to one prompt, all of whose tokens count.

    Attributes:
        prompt_ids: What is given; never empty.
        chosen_ids: The answer that was preferred.
        rejected_ids: The other.
        index: Position of the record in its data set.
        group: Value of the group column, or None.
    """

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    index: int = 0
    group: str | None = None

    @property
    def length(self) -> int:
        """Number of tokens of the prompt with the longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def num_scored(self) -> int:
        """Number of tokens that count, of both answers."""
        return len(self.chosen_ids) + len(self.rejected_ids)


@dataclasses.dataclass(frozen=True)
class Rows(Sequence[AnyRow], Generic[AnyRow]):
    """Rows that are ready, with the count of those that are not; prints as a sentence.

    Attributes:
        rows: The rows, in the order of their records.
        num_records: Records that were read.
        dropped: Positions of records left out as too long.
        trimmed: Positions of records whose prompt lost its start.
        longest: Tokens of the longest record before any of that.
        max_length: The limit, or None.
        unaligned: Records where the prompt alone has other tokens at its end than before its completion.
    """

    rows: tuple[AnyRow, ...]
    num_records: int
    dropped: tuple[int, ...]
    trimmed: tuple[int, ...]
    longest: int
    max_length: int | None
    unaligned: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[AnyRow]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def groups(self) -> dict[str | None, list[int]]:
        """Positions of the rows of each group, in order of appearance; one group None where there is no column."""
        out: dict[str | None, list[int]] = {}
        for position, row in enumerate(self.rows):
            out.setdefault(row.group, []).append(position)
        return out

    @property
    def num_scored(self) -> int:
        """Number of tokens that count, over all rows."""
        return sum(row.num_scored for row in self.rows)

    def __str__(self) -> str:
        """Say what is there, and what was left out."""
        limit = "" if self.max_length is None else f" (limit {self.max_length})"
        parts = [
            f"{len(self.rows)} rows of {self.num_records} records, {self.num_scored} scored tokens, longest record "
            f"{self.longest} tokens{limit}"
        ]
        if self.dropped:
            parts.append(f"{len(self.dropped)} left out as too long")
        if self.trimmed:
            parts.append(f"{len(self.trimmed)} with a shortened prompt")
        if self.unaligned:
            parts.append(f"{self.unaligned} with a prompt that is tokenised otherwise before its completion")
        return "; ".join(parts) + "."


# --- batches ---


def collate_sft(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Pad rows on the right to one batch.

    Args:
        rows: At least one.
        pad_token_id: Id that fills up.

    Returns:
        ``input_ids`` and ``attention_mask``, integers, and ``completion_mask``, true where a token is scored; all
        ``(row, token)``.

    Raises:
        DataError: If there are no rows.

    Example:
        >>> batch = collate_sft([Row((5, 6), (7,), (True,)), Row((5,), (8, 9, 2), (True, False, True))], 0)
        >>> batch["input_ids"].tolist()
        [[5, 6, 7, 0], [5, 8, 9, 2]]
        >>> batch["completion_mask"].int().tolist()
        [[0, 0, 1, 0], [0, 1, 0, 1]]
    """
    return _padded([(row.prompt_ids, row.completion_ids, row.scored) for row in rows], pad_token_id)


def collate_pairs(rows: Sequence[PairRow], pad_token_id: int) -> dict[str, Tensor]:
    """Pad pairs to one batch in which all chosen answers stand before all rejected ones.

    Args:
        rows: At least one.
        pad_token_id: Id that fills up.

    Returns:
        As :func:`collate_sft`, ``(2 * pair, token)``.

    Raises:
        DataError: If there are no rows.

    Example:
        >>> collate_pairs([PairRow((5, 6), (7,), (8, 9))], 0)["input_ids"].tolist()
        [[5, 6, 7, 0], [5, 6, 8, 9]]
    """
    chosen = [(row.prompt_ids, row.chosen_ids, (True,) * len(row.chosen_ids)) for row in rows]
    rejected = [(row.prompt_ids, row.rejected_ids, (True,) * len(row.rejected_ids)) for row in rows]
    return _padded([*chosen, *rejected], pad_token_id)


def _padded(rows: Sequence[tuple[Ids, Ids, tuple[bool, ...]]], pad_token_id: int) -> dict[str, Tensor]:
    if not rows:
        raise DataError("a batch needs at least one row.")
    width = max(len(prompt) + len(completion) for prompt, completion, _ in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    seen = torch.zeros(len(rows), width, dtype=torch.long)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, completion, mask) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        seen[i, :end] = 1
        scored[i, start:end] = torch.tensor(mask, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": seen, "completion_mask": scored}
