r"""Synthetic corpora of known entropy, as records in TRL's formats.

Symbol tasks have one right answer each, ``copy : a b c = a b c``. A conflicting task, ``blend``, is answered by one
rule in some records and by another in the rest, with nothing in the prompt that tells which: the entropy of its answer
is that of the split, :math:`-\sum_r s_r \ln s_r`, and no model can score below it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vifamily.errors import ConfigError

__all__ = [
    "CONFLICTING",
    "RULES",
    "Corpus",
    "as_conversations",
    "contradictory_pairs",
    "contradictory_sft",
    "ideal_nll",
    "symbol_tasks",
]

RULES = ("copy", "reverse", "increment")
"""Tasks on symbols; ``increment`` takes the next symbol, and the first after the last."""

CONFLICTING = "blend"
"""The task that is answered by different rules."""

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Corpus(Sequence[Record]):
    """Records with what is known of their answers.

    Attributes:
        records: In TRL's formats, with further columns that say how each was made.
        entropy: Nats of each record's answer given its prompt, averaged over whatever shares that answer's law.
    """

    records: tuple[Record, ...]
    entropy: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    @property
    def mean_entropy(self) -> float:
        """Nats per record below which no model scores, however good."""
        return math.fsum(self.entropy) / len(self.entropy)

    @property
    def texts(self) -> list[str]:
        """Every text in the records, for a tokenizer."""
        columns = ("text", "prompt", "completion", "chosen", "rejected")
        return [record[name] for record in self.records for name in columns if name in record]

    def where(self, **columns: Any) -> Corpus:
        """The records whose columns have these values.

        Raises:
            ConfigError: If there is none.
        """
        kept = [i for i, r in enumerate(self.records) if all(r.get(k) == v for k, v in columns.items())]
        if not kept:
            raise ConfigError(f"no record has {', '.join(f'{k}={v!r}' for k, v in columns.items())}.")
        return Corpus(tuple(self.records[i] for i in kept), tuple(self.entropy[i] for i in kept))


def ideal_nll(shares: Sequence[float], member_shares: Sequence[float]) -> float:
    r"""Nats per conflicting record of a mixture whose members each follow one rule: :math:`-\sum_r s_r \ln m_r`.

    Args:
        shares: Share of the records that each rule answers; sums to one.
        member_shares: Share of the members (by weight) that follow each rule.

    Returns:
        The cross entropy; infinite where no member follows a rule that occurs.

    Raises:
        ConfigError: If the two differ in length or do not each sum to one.

    Example:
        >>> round(ideal_nll([0.5, 0.5], [0.5, 0.5]), 3), round(ideal_nll([0.5, 0.5], [0.75, 0.25]), 3)
        (0.693, 0.837)
    """
    for name, values in (("shares", shares), ("member_shares", member_shares)):
        if len(shares) != len(member_shares) or min(values, default=-1) < 0 or not math.isclose(math.fsum(values), 1):
            raise ConfigError(f"{name} must be as many shares as the other has, from 0, that sum to 1: {list(values)}.")
    return math.fsum(-s * math.log(m) if m else math.inf for s, m in zip(shares, member_shares, strict=True) if s)


def symbol_tasks(
    num_records: int,
    generator: torch.Generator,
    *,
    rules: Sequence[str] = RULES,
    num_symbols: int = 10,
    length: int = 6,
) -> Corpus:
    """Tasks on symbols with one right answer each, for the base; their rules take turns.

    Args:
        num_records: Number of records.
        generator: Source of the symbols.
        rules: Which of :data:`RULES`.
        num_symbols: Size of the alphabet, 2 to 26.
        length: Symbols of a task, from 2.

    Returns:
        Records with ``prompt``, ``completion`` and ``rule``, of entropy zero.

    Raises:
        ConfigError: If a number is out of range or a rule is unknown.

    Example:
        >>> symbol_tasks(3, torch.Generator().manual_seed(0), length=3)[1]
        {'prompt': 'reverse : a d j =', 'completion': ' j d a', 'rule': 'reverse'}
    """
    _check(num_records, rules, num_symbols, length)
    drawn = _symbols(num_records, generator, num_symbols, length)
    names = [rules[i % len(rules)] for i in range(num_records)]
    records = tuple(_record(rule, rule, row, num_symbols) for rule, row in zip(names, drawn, strict=True))
    return Corpus(records, (0.0,) * num_records)


def contradictory_sft(
    num_conflicting: int,
    num_clean: int,
    generator: torch.Generator,
    *,
    share: float = 0.5,
    rules: tuple[str, str] = ("copy", "reverse"),
    clean_rule: str = "increment",
    num_symbols: int = 10,
    length: int = 6,
) -> Corpus:
    r"""Conflicting answers to one task, among clean records of another.

    A conflicting answer has entropy :math:`-s \ln s - (1 - s) \ln(1 - s)`, 0.693 nats for an even split and 0.562 for
    three to one. Symbols that both rules answer alike (palindromes, for copy and reverse) are left out, so that this
    holds of every record. The split is exact up to rounding, and records are shuffled.

    Args:
        num_conflicting: Records of the task ``blend``.
        num_clean: Records of the clean rule.
        generator: Source of the symbols and of the order.
        share: Share s of the conflicting records that the first rule answers.
        rules: The two rules.
        clean_rule: Rule of the clean records.
        num_symbols: Size of the alphabet, 2 to 26.
        length: Symbols of a task, from 2.

    Returns:
        Records with ``prompt``, ``completion``, ``rule`` (that gave the answer) and ``conflicting``.

    Raises:
        ConfigError: If a number is out of range or a rule is unknown.

    Example:
        >>> corpus = contradictory_sft(4, 0, torch.Generator().manual_seed(0), length=3)
        >>> sorted(record["rule"] for record in corpus), round(corpus.mean_entropy, 3)
        (['copy', 'copy', 'reverse', 'reverse'], 0.693)
    """
    _check(num_conflicting + num_clean, (*rules, clean_rule), num_symbols, length)
    first = _share(share, num_conflicting)
    drawn = _symbols(num_conflicting, generator, num_symbols, length, apart=rules)
    records = [
        _record(CONFLICTING, rules[0 if i < first else 1], row, num_symbols) | {"conflicting": True}
        for i, row in enumerate(drawn)
    ]
    for row in _symbols(num_clean, generator, num_symbols, length):
        records.append(_record(clean_rule, clean_rule, row, num_symbols) | {"conflicting": False})
    nats = ideal_nll([share, 1 - share], [share, 1 - share])
    order = torch.randperm(len(records), generator=generator).tolist()
    return Corpus(tuple(records[i] for i in order), tuple(nats if records[i]["conflicting"] else 0.0 for i in order))


def contradictory_pairs(
    num_groups: int,
    group_size: int,
    generator: torch.Generator,
    *,
    share: float = 0.5,
    rules: tuple[str, str] = ("copy", "reverse"),
    num_symbols: int = 10,
    length: int = 6,
) -> Corpus:
    r"""Preferences between the answers of two rules, whose sign is one for all pairs of a group.

    The signs of a group are one choice: its entropy is that of the split, and per pair it is divided by the size of
    the group, so 0.693 nats for single pairs and 0.087 for groups of eight, at an even split. Scores of pairs one by
    one cannot be below the former; scores of groups can reach the latter.

    Args:
        num_groups: Groups, such as annotators.
        group_size: Pairs of each.
        generator: Source of the symbols and of the order.
        share: Share of the groups that prefer the first rule.
        rules: The two rules.
        num_symbols: Size of the alphabet, 2 to 26.
        length: Symbols of a task, from 2.

    Returns:
        Records with ``prompt``, ``chosen``, ``rejected``, ``group`` and ``rule`` (that is preferred), group by group.

    Raises:
        ConfigError: If a number is out of range or a rule is unknown.

    Example:
        >>> corpus = contradictory_pairs(2, 8, torch.Generator().manual_seed(0))
        >>> len(corpus), corpus[0]["group"], round(corpus.mean_entropy, 4)
        (16, 'group 0', 0.0866)
    """
    _check(num_groups * group_size, rules, num_symbols, length)
    first = _share(share, num_groups)
    side = [0 if rank < first else 1 for rank in torch.randperm(num_groups, generator=generator).tolist()]
    records = []
    for i, row in enumerate(_symbols(num_groups * group_size, generator, num_symbols, length, apart=rules)):
        group = i // group_size
        wanted, other = rules[side[group]], rules[1 - side[group]]
        answer = _record(CONFLICTING, wanted, row, num_symbols)
        records.append(
            {
                "prompt": answer["prompt"],
                "chosen": answer["completion"],
                "rejected": _answer(other, row, num_symbols),
                "group": f"group {group}",
                "rule": wanted,
            }
        )
    nats = ideal_nll([share, 1 - share], [share, 1 - share]) / group_size
    return Corpus(tuple(records), (nats,) * len(records))


def as_conversations(corpus: Corpus) -> Corpus:
    """The same records with prompts and answers as messages, for a chat template.

    Example:
        >>> as_conversations(symbol_tasks(1, torch.Generator().manual_seed(0), length=3))[0]["completion"]
        [{'role': 'assistant', 'content': 'e j d'}]
    """
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    records = tuple(
        {k: [{"role": roles[k], "content": v.strip()}] if k in roles else v for k, v in record.items()}
        for record in corpus.records
    )
    return Corpus(records, corpus.entropy)


# --- symbols ---


def _check(num_records: int, rules: Sequence[str], num_symbols: int, length: int) -> None:
    for name, value, low, high in (
        ("the number of records", num_records, 1, 10**8),
        ("num_symbols", num_symbols, 2, 26),
        ("length", length, 2, 1000),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}.")
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown or not rules:
        raise ConfigError(f"rules must be among {', '.join(RULES)}, got {', '.join(map(str, rules)) or 'none'}.")


def _share(share: float, count: int) -> int:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigError(f"share must be a number from 0 to 1, got {share!r}.")
    return round(share * count)


def _symbols(
    count: int, generator: torch.Generator, num_symbols: int, length: int, apart: tuple[str, str] | None = None
) -> list[list[int]]:
    """Rows of symbols, where two rules answer apart if that is asked."""
    if apart is not None and apart[0] == apart[1]:
        raise ConfigError(f"rules must be two that differ, got {apart[0]} twice.")
    rows: list[list[int]] = []
    while len(rows) < count:
        shape = (count - len(rows), length)
        for row in torch.randint(num_symbols, shape, generator=generator, device=generator.device).tolist():
            if apart is None or _apply(apart[0], row, num_symbols) != _apply(apart[1], row, num_symbols):
                rows.append(row)
    return rows


def _apply(rule: str, row: list[int], num_symbols: int) -> list[int]:
    if rule == "increment":
        return [(symbol + 1) % num_symbols for symbol in row]
    return row[::-1] if rule == "reverse" else row


def _answer(rule: str, row: list[int], num_symbols: int) -> str:
    return "".join(f" {chr(97 + symbol)}" for symbol in _apply(rule, row, num_symbols))


def _record(task: str, rule: str, row: list[int], num_symbols: int) -> Record:
    given = _answer("copy", row, num_symbols)
    return {"prompt": f"{task} :{given} =", "completion": _answer(rule, row, num_symbols), "rule": rule}
