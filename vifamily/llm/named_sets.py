"""Data sets that are in no format of TRL, turned into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vifamily.errors import ConfigError, DataError

__all__ = ["FORMATS", "converted"]

Record = dict[str, Any]

_LETTERS = "ABCDEFGHIJ"
_ANSWER = "Sure, I can help with that."
_REFUSAL = "I'm sorry, but I can't help with that."


def _mmlu(record: Mapping[str, Any]) -> Record:
    choices, answer = list(record["choices"]), int(record["answer"])
    if not 0 <= answer < len(choices) <= len(_LETTERS):
        raise ValueError(f"answer {answer} of {len(choices)} choices")
    lines = [
        str(record["question"]).strip(),
        *(f"{a}. {c}" for a, c in zip(_LETTERS, choices, strict=False)),
        "Answer:",
    ]
    return {"prompt": "\n".join(lines), "completion": f" {_LETTERS[answer]}"}


def _or_bench(record: Mapping[str, Any]) -> Record:
    # a harmless prompt that looks harmful: the beginning of an answer is preferred to that of a refusal
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return {
        "prompt": said("user", str(record["prompt"])),
        "chosen": said("assistant", _ANSWER),
        "rejected": said("assistant", _REFUSAL),
        "category": record["category"],
    }


FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Record]] = {"mmlu": _mmlu, "or_bench": _or_bench}
"""From a record of the data set to one of TRL, by the name of the format.

``mmlu`` (columns ``question``, ``choices``, ``answer``) asks for the letter of an answer. ``or_bench`` (columns
``prompt``, ``category``) prefers the beginning of an answer to the beginning of a refusal.
"""


def converted(records: Sequence[Mapping[str, Any]], kind: str) -> list[Record]:
    r"""Turn records into a format of TRL.

    Args:
        records: Records of a data set.
        kind: One of :data:`FORMATS`.

    Raises:
        ConfigError: If the format is unknown.
        DataError: If a record lacks a column, or its answer is not among its choices.

    Example:
        >>> [record] = converted([{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}], "mmlu")
        >>> record["prompt"], record["completion"]
        ('2 + 2?\nA. 3\nB. 4\nAnswer:', ' B')
    """
    if kind not in FORMATS:
        raise ConfigError(f"dataset_format must be one of {', '.join(FORMATS)}, or left out, got {kind!r}.")
    out = []
    for position, record in enumerate(records):
        try:
            out.append(FORMATS[kind](record))
        except KeyError as error:
            columns = ", ".join(map(str, record))
            raise DataError(
                f"record {position} has no column {error}, which dataset_format={kind!r} reads; it has {columns}."
            ) from error
        except (TypeError, ValueError) as error:
            raise DataError(f"record {position} is not as dataset_format={kind!r} reads it: {error}.") from error
    return out
