"""What the columns of a record mean: the data formats of TRL, told apart and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vifamily.errors import ConfigError, DataError

__all__ = ["Conversation", "Pair", "as_pairs", "as_supervised", "groups_of"]

Message = dict[str, Any]
Text = str | list[Message]

_ROLES = {"human": "user", "gpt": "assistant"}  # of the older from/value form
_NAMED = 5
"""Records that an error names before it counts the others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """A record for supervised fine-tuning: a prompt with its completion, or with None a text or messages as a whole."""

    prompt: Text | None
    completion: Text
    template: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A record of a preference: both answers continue one prompt."""

    prompt: Text
    chosen: Text
    rejected: Text
    template: Mapping[str, Any]


def as_supervised(records: Sequence[Mapping[str, Any]]) -> list[Conversation]:
    """Read records in one of the formats ``prompt`` with ``completion``, ``messages`` and ``text``.

    Raises:
        DataError: If columns are missing or of the wrong kind, or an answer is missing; records are named.
    """
    columns = _columns(records)
    if {"chosen", "rejected"} <= columns:
        raise DataError(
            "these records are preference pairs (chosen, rejected): train on them with DPO, or give records with "
            "prompt and completion, messages, or text."
        )
    if "prompt" in columns:
        needed: tuple[str, ...] = ("prompt", "completion")
    elif "messages" in columns or "conversations" in columns:
        needed = ("messages",) if "messages" in columns else ("conversations",)
    elif "text" in columns:
        needed = ("text",)
    else:
        raise DataError(
            "records for supervised fine-tuning need the columns prompt and completion, messages, or text; got "
            f"{_listed(columns)}. Rename columns, or map records before they are passed."
        )
    _check_columns(records, needed)
    if needed == ("text",):
        texts = _texts(records, "text")
        return [Conversation(None, text, {}) for text in texts]
    if len(needed) == 1:
        chats = [_as_messages(record[needed[0]], i, needed[0]) for i, record in enumerate(records)]
        _check_answers(
            [any(_is_answer(m) for m in chat) for chat in chats], "has no message of the assistant with text"
        )
        return [Conversation(None, c, _template(r, i)) for i, (c, r) in enumerate(zip(chats, records, strict=True))]
    both = [_parts(record, i, needed) for i, record in enumerate(records)]
    _check_answers([_answers(completion) for _, completion in both], "has an empty completion")
    return [Conversation(p, c, _template(r, i)) for i, ((p, c), r) in enumerate(zip(both, records, strict=True))]


def as_pairs(records: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Read preference pairs, ``prompt`` with ``chosen`` and ``rejected``; without a prompt, what both share is it.

    Raises:
        DataError: If columns are missing or of the wrong kind, an answer is missing, or two answers are the same.
    """
    columns = _columns(records)
    if not {"chosen", "rejected"} <= columns:
        raise DataError(
            f"records of preferences need the columns prompt, chosen and rejected; got {_listed(columns)}. Records "
            "with one answer each are for supervised fine-tuning."
        )
    needed = ("prompt", "chosen", "rejected") if "prompt" in columns else ("chosen", "rejected")
    _check_columns(records, needed)
    out = []
    for i, record in enumerate(records):
        parts = _parts(record, i, needed)
        prompt, chosen, rejected = parts if len(parts) == 3 else _shared_prompt(parts[0], parts[1])
        out.append(Pair(prompt, chosen, rejected, _template(record, i)))
    _check_answers([_answers(pair.chosen) and _answers(pair.rejected) for pair in out], "has an empty answer")
    _check_answers([pair.chosen != pair.rejected for pair in out], "has the same answer as chosen and as rejected")
    return out


def groups_of(records: Sequence[Mapping[str, Any]], column: str | None) -> list[str | None]:
    """The value of the group column of each record, as text; None for each where there is no column.

    Raises:
        ConfigError: If no record has the column.
        DataError: If some records have no value in it.
    """
    if column is None:
        return [None] * len(records)
    if not any(column in record for record in records):
        raise ConfigError(f"group_column='{column}' is not among the columns {_listed(_columns(records))}.")
    _refuse(
        [i for i, record in enumerate(records) if record.get(column) is None],
        f"has no value in group_column='{column}'",
    )
    return [str(record[column]) for record in records]


# --- columns ---


def _columns(records: Sequence[Mapping[str, Any]]) -> set[str]:
    # a column that is empty in every record is one that a table made up
    return {str(name) for record in records for name, value in record.items() if value is not None}


def _listed(columns: set[str]) -> str:
    return ", ".join(sorted(columns)) or "none"


def _check_columns(records: Sequence[Mapping[str, Any]], needed: Sequence[str]) -> None:
    for name in needed:
        _refuse([i for i, record in enumerate(records) if record.get(name) is None], f"has no column '{name}'")


def _check_answers(fine: Sequence[bool], what: str) -> None:
    _refuse([i for i, good in enumerate(fine) if not good], what)


def _refuse(bad: Sequence[int], what: str) -> None:
    """Raise for the records at these positions, naming the first few."""
    if not bad:
        return
    names = ", ".join(str(i) for i in bad[:_NAMED])
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    plural = "s" if len(bad) > 1 else ""
    raise DataError(
        f"{len(bad)} record{plural}{', each of which' if plural else ''} {what}: {names}{more} (counted from 0). "
        "Mend them or leave them out."
    )


# --- values ---


def _texts(records: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    _refuse([i for i, r in enumerate(records) if not isinstance(r[name], str)], f"has no text in column '{name}'")
    _check_answers([bool(record[name].strip()) for record in records], f"is blank in column '{name}'")
    return [record[name] for record in records]


def _parts(record: Mapping[str, Any], index: int, names: Sequence[str]) -> list[Any]:
    """The columns of one record, all of them texts or all of them messages."""
    kinds = {type(record[name]) for name in names}
    if kinds == {str}:
        return [record[name] for name in names]
    if str in kinds:
        shown = ", ".join(f"{name}: {type(record[name]).__name__}" for name in names)
        raise DataError(f"record {index} mixes texts with lists of messages ({shown}): use one form for all of them.")
    return [_as_messages(record[name], index, name) for name in names]


def _as_messages(value: Any, index: int, name: str) -> list[Message]:
    where = f"column '{name}' of record {index}"
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where} must be a list of messages, each with role and content, got {_short(value)}.")
    return [_as_message(message, where) for message in value]


def _as_message(message: Any, where: str) -> Message:
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        role = str(message["from"])
        message = {"role": _ROLES.get(role, role), "content": message["value"]}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} must hold messages with role and content, got {_short(message)}.")
    if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
        raise DataError(f"{where} has a message of {message['role']} without content: {_short(dict(message))}.")
    return {key: value for key, value in message.items() if value is not None}


def _is_answer(message: Message) -> bool:
    content = message.get("content")
    said = bool(content.strip()) if isinstance(content, str) else bool(content)
    return message["role"] == "assistant" and (said or bool(message.get("tool_calls")))


def _answers(completion: Text) -> bool:
    return bool(completion.strip()) if isinstance(completion, str) else bool(completion) and _is_answer(completion[-1])


def _shared_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """What two answers share at their start, and the rest of each, as TRL cuts them."""
    length = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        length += 1
    if isinstance(chosen, str) and chosen[:length].endswith(" "):  # tokenizers take a space with the word behind it
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _template(record: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Arguments of the chat template that a record brings along, in TRL's columns."""
    tools, extra = record.get("tools"), record.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"column 'tools' of record {index} is not JSON: {error}.") from error
    return {**({"tools": tools} if tools else {}), **extra}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
