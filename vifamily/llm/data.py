"""Rows of token ids for training: a prompt, what follows it, and which of that is scored.

Records are read by :func:`~vifamily.llm.reading.read_records` and tokenised here as TRL does it: conversations through
the tokenizer's chat template, plain texts with its end-of-sequence token behind the answer, and the completion from
where the ids of the prompt alone and of prompt and completion diverge. An answer is never cut: rows that are too long
are counted and left out, refused, or lose the start of their prompt.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vifamily.errors import ConfigError, DataError, VifamilyWarning
from vifamily.llm._formats import Conversation, Text, as_pairs, as_supervised, groups_of
from vifamily.llm.rows import AnyRow, PairRow, Row, Rows

__all__ = ["OVERLONG", "check_tokenizer", "prepare_pairs", "prepare_sft", "prompt_ids"]

OVERLONG = ("drop", "error", "trim_prompt")
"""What may be done with rows longer than ``max_length``."""


def check_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer that has what training needs.

    Raises:
        ConfigError: If it has no pad token.
    """
    if getattr(tokenizer, "pad_token_id", None) is None:
        hint = "tokenizer.pad_token = tokenizer.eos_token" if getattr(tokenizer, "eos_token", None) else (
            "tokenizer.pad_token to a token of its vocabulary"
        )  # fmt: skip
        raise ConfigError(f"the tokenizer has no pad token, which batches of unequal rows need: set {hint}.")
    return tokenizer


def prepare_sft(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    overlong: str = "drop",
    completion_only_loss: bool = True,
    group_column: str | None = None,
) -> Rows[Row]:
    """Tokenise records for supervised fine-tuning, in TRL's formats.

    ``prompt`` with ``completion`` (texts, or lists of messages): the completion is scored. ``messages`` (or the older
    ``conversations``): the turns of the assistant are scored, by the generation marks of the chat template, or without
    them as what each turn adds to the conversation before it. ``text``: all of it is scored.

    Args:
        records: Records; see :func:`~vifamily.llm.reading.read_records`.
        tokenizer: A tokenizer of transformers.
        max_length: Most tokens of a row; None for no limit.
        overlong: What is done with longer rows: ``"drop"`` leaves them out and warns with their number, ``"error"``
            refuses, ``"trim_prompt"`` takes tokens from the start of the prompt, and leaves out rows whose completion
            alone is too long.
        completion_only_loss: False scores prompts and turns of the user too, all but the first token.
        group_column: Column that says which rows belong together, such as the annotator.

    Returns:
        The rows.

    Raises:
        DataError: If columns are missing, an answer is missing, or no row is left.
        ConfigError: If the tokenizer lacks a pad token, an end token or a chat template, or an option is unknown.
    """
    build = _Builder(check_tokenizer(tokenizer), max_length, overlong)
    examples, groups = as_supervised(records), groups_of(records, group_column)
    rows = []
    for i, (example, group) in enumerate(zip(examples, groups, strict=True)):
        prompt, completion, scored = build.split(example, i)
        if not completion_only_loss:
            prompt, completion = prompt[:1], prompt[1:] + completion
            scored = [True] * len(completion)
        last = max((k + 1 for k, s in enumerate(scored) if s), default=0)  # what follows would only cost time
        if not last:
            raise DataError(f"record {i} has no token that is scored: its answer is empty once it is tokenised.")
        rows.append(Row(tuple(prompt), tuple(completion[:last]), tuple(scored[:last]), i, group))
    return build.finish(rows)


def prepare_pairs(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    overlong: str = "drop",
    group_column: str | None = None,
) -> Rows[PairRow]:
    """Tokenise preference pairs, in TRL's format of ``prompt``, ``chosen`` and ``rejected``, texts or messages.

    Args:
        records: Records; without a prompt, what both answers share at their start is it.
        tokenizer: A tokenizer of transformers.
        max_length: Most tokens of a prompt with the longer answer; None for no limit.
        overlong: As in :func:`prepare_sft`.
        group_column: Column that says which pairs belong together, such as the annotator.

    Returns:
        The rows.

    Raises:
        DataError: If columns are missing, an answer is missing or the same twice, or no row is left.
        ConfigError: If the tokenizer lacks a pad token, an end token or a chat template, or an option is unknown.
    """
    build = _Builder(check_tokenizer(tokenizer), max_length, overlong)
    groups = groups_of(records, group_column)
    rows = []
    for i, (pair, group) in enumerate(zip(as_pairs(records), groups, strict=True)):
        prompt = build.prompt_ids(pair.prompt, pair.template)
        both = [build.whole_ids(pair.prompt, answer, pair.template) for answer in (pair.chosen, pair.rejected)]
        start = build.boundary(prompt, both, i)
        rows.append(PairRow(tuple(both[0][:start]), tuple(both[0][start:]), tuple(both[1][start:]), i, group))
    return build.finish(rows)


def prompt_ids(prompt: Text, tokenizer: Any, **template: Any) -> tuple[int, ...]:
    """Tokenise a prompt as training does, up to where an answer begins.

    Args:
        prompt: A text, or messages for the chat template.
        tokenizer: A tokenizer of transformers.
        template: Further arguments of the chat template.

    Returns:
        Token ids, at least one.

    Raises:
        DataError: If the prompt is empty.
        ConfigError: If it is a conversation and there is no chat template.
    """
    ids = tuple(_Builder(tokenizer, None, "error").prompt_ids(prompt, template)) if prompt else ()
    if not ids:
        raise DataError("a prompt is empty: an answer needs at least one token before it.")
    return ids


class _Builder:
    """Tokenises texts and conversations with one tokenizer, and keeps count of rows that do not fit."""

    def __init__(self, tokenizer: Any, max_length: int | None, overlong: str) -> None:
        if overlong not in OVERLONG:
            raise ConfigError(f"overlong must be one of {', '.join(OVERLONG)}, got {overlong!r}.")
        if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
            raise ConfigError(f"max_length must be an integer from 2, or None, got {max_length!r}.")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length must be from 2, a token that is given and one that is scored: {max_length}.")
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        self.unaligned = 0
        self._marked = "{% generation" in str(getattr(tokenizer, "chat_template", None) or "").replace("{%-", "{%")

    # --- ids ---

    def split(self, example: Conversation, index: int) -> tuple[list[int], list[int], list[bool]]:
        """Ids of the prompt and of the completion, and which of the latter are scored."""
        if example.prompt is not None:
            prompt = self.prompt_ids(example.prompt, example.template)
            whole = self.whole_ids(example.prompt, example.completion, example.template)
            start = self.boundary(prompt, [whole], index)
            return whole[:start], whole[start:], [True] * (len(whole) - start)
        if isinstance(example.completion, str):
            whole = self._plain(self._ended(example.completion))
            return whole[:1], whole[1:], [True] * (len(whole) - 1)
        whole, mask = self._assistant_turns(example.completion, example.template, index)
        # the first token of all is predicted by nothing, so it is never scored
        start = max(1, next((k for k, scored in enumerate(mask) if scored), len(mask)))
        return whole[:start], whole[start:], mask[start:]

    def prompt_ids(self, prompt: Text, template: Mapping[str, Any]) -> list[int]:
        """Ids of a prompt alone, up to where an answer would begin."""
        if isinstance(prompt, str):
            return self._plain(prompt)
        return self._chat(prompt, template, add_generation_prompt=True)

    def whole_ids(self, prompt: Text, completion: Text, template: Mapping[str, Any]) -> list[int]:
        """Ids of a prompt with its completion, with the end of it."""
        if isinstance(prompt, str):
            return self._plain(prompt + self._ended(str(completion)))
        return self._chat([*prompt, *(m for m in completion if not isinstance(m, str))], template)

    def boundary(self, prompt: list[int], whole: list[list[int]], index: int) -> int:
        """Where the completion starts: where ids of the prompt alone and with its completion diverge."""
        start = min(_common_prefix(prompt, ids) for ids in whole)
        self.unaligned += start < len(prompt)
        start = max(start, 1)  # an empty prompt: the first token of all is predicted by nothing
        if any(len(ids) <= start for ids in whole):
            raise DataError(f"record {index} has an answer without a token that could be scored; leave it out.")
        return start

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = list(self.tokenizer(text)["input_ids"])
        return ids

    def _ended(self, text: str) -> str:
        end = getattr(self.tokenizer, "eos_token", None)
        if not end:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so an answer could not learn where to stop: set "
                "tokenizer.eos_token."
            )
        return text if text.endswith(end) else text + end

    def _chat(self, messages: Sequence[Any], template: Mapping[str, Any], **options: Any) -> list[int]:
        ids: list[int] = list(self._render(messages, template, **options)["input_ids"])
        return ids

    def _render(self, messages: Sequence[Any], template: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "records are conversations and the tokenizer has no chat template: set tokenizer.chat_template, use "
                "the tokenizer of the instruction-tuned model, or give prompt and completion as texts."
            )
        out: Mapping[str, Any] = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, **{**template, **options}
        )
        return out

    def _assistant_turns(
        self, messages: Sequence[Any], template: Mapping[str, Any], index: int
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them the assistant said."""
        if self._marked:
            done = self._render(messages, template, return_assistant_tokens_mask=True)
            return list(done["input_ids"]), [bool(m) for m in done["assistant_masks"]]
        whole = self._chat(messages, template)
        mask = [False] * len(whole)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or not turn:
                continue
            before = self._chat(messages[:turn], template, add_generation_prompt=True)
            after = self._chat(messages[: turn + 1], template)
            if whole[: len(after)] != after or after[: len(before)] != before:
                raise ConfigError(
                    f"the chat template renders turn {turn} of record {index} otherwise alone than inside its "
                    "conversation, so the assistant's tokens cannot be told: use a template with {% generation %} "
                    "marks, or give records with prompt and completion."
                )
            mask[len(before) : len(after)] = [True] * (len(after) - len(before))
        return whole, mask

    # --- lengths ---

    def finish(self, rows: Iterable[AnyRow]) -> Rows[AnyRow]:
        """Deal with rows that are too long, and report."""
        kept: list[AnyRow] = []
        dropped, trimmed, count, longest = [], [], 0, 0
        for row in rows:
            count, longest = count + 1, max(longest, row.length)
            excess = 0 if self.max_length is None else row.length - self.max_length
            if excess <= 0:
                kept.append(row)
            elif self.overlong == "trim_prompt" and excess < len(row.prompt_ids):
                kept.append(dataclasses.replace(row, prompt_ids=row.prompt_ids[excess:]))
                trimmed.append(row.index)
            else:
                dropped.append(row.index)
        out = Rows(tuple(kept), count, tuple(dropped), tuple(trimmed), longest, self.max_length, self.unaligned)
        self._complain(out)
        return out

    def _complain(self, rows: Rows[Any]) -> None:
        too_long = (
            f"{len(rows.dropped)} of {rows.num_records} records are longer than max_length={rows.max_length} tokens; "
            f"the longest has {rows.longest}"
        )
        if rows.dropped and self.overlong == "error":
            raise DataError(f"{too_long}. The first is record {rows.dropped[0]}. Raise max_length or shorten them.")
        if not rows.rows:
            raise DataError(f"{too_long}. No row is left: raise max_length.")
        if rows.dropped:
            warnings.warn(
                f"{too_long}. They are left out; answers are never cut. Raise max_length to keep them.",
                VifamilyWarning,
                stacklevel=4,
            )
        if rows.unaligned:
            warnings.warn(
                f"in {rows.unaligned} of {rows.num_records} records the prompt alone ends in other tokens than before "
                "its completion: the completion starts where they diverge, so training sees another context than "
                "generation does. End prompts at a word, and leave the space to the completion.",
                VifamilyWarning,
                stacklevel=4,
            )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for length, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return length
    return min(len(a), len(b))
