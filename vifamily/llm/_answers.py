"""Who answers which prompt, in batches without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.llm._decode import Pick, decode
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.data import prompt_ids
from vifamily.llm.rows import Ids, Row

__all__ = [
    "SPEAKERS",
    "Answer",
    "answer_prompts",
    "as_prompts",
    "batches",
    "checked_weights",
    "choose_speakers",
    "context_row",
    "end_tokens",
    "group_sums",
    "is_conversation",
    "positive",
]

SPEAKERS = ("draw", "mixture", "member")
"""Who answers: a member drawn by weight for each answer, all of them as a mixture, or one that is named."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a prompt.

    Attributes:
        prompt: Position of the prompt.
        text: The answer, without its end token; empty where there is no tokenizer.
        token_ids: Its tokens, with the end token where it was said.
        member: Who said it; None for the mixture.
        log_weight: Log weights of the members after the answer, for the mixture; None otherwise. ``(member,)``
        log_prob: Log probability of the answer under who said it, at temperature one.
    """

    prompt: int
    text: str
    token_ids: Ids
    member: int | None
    log_weight: Tensor | None
    log_prob: float


def as_prompts(prompts: Any, tokenizer: Any) -> list[Ids]:
    """Token ids of prompts that are texts, conversations, token ids or rows.

    Raises:
        ConfigError: If it is one prompt and no list of them, or texts come without a tokenizer.
        DataError: If there are none, or one is empty.
    """
    if isinstance(prompts, str) or is_conversation(prompts):
        raise ConfigError("prompts must be a list of prompts, got one of them: put it in brackets.")
    out = []
    for prompt in prompts:
        if isinstance(prompt, Row):
            out.append(prompt.prompt_ids)
        elif isinstance(prompt, tuple) and prompt and all(isinstance(token, int) for token in prompt):
            out.append(prompt)
        elif tokenizer is None:
            raise ConfigError("texts need a tokenizer and the ensemble has none: pass tokenizer= when it is made.")
        else:
            out.append(prompt_ids(prompt, tokenizer))
    if not out:
        raise DataError("there are no prompts: give at least one.")
    return out


def choose_speakers(
    speaker: str, member: int | None, log_weight: Tensor, generator: torch.Generator | None, count: int
) -> list[int | None]:
    """Who says each of so many answers; None is the mixture.

    Raises:
        ConfigError: If the options do not go together.
    """
    size = len(log_weight)
    if speaker not in SPEAKERS:
        raise ConfigError(f"speaker must be one of {', '.join(SPEAKERS)}, got {speaker!r}.")
    if (member is not None) is not (speaker == "member"):
        raise ConfigError(f'member= goes with speaker="member" and with no other, got {speaker!r} and {member!r}.')
    if speaker == "mixture":
        return [None] * count
    if member is not None:
        if isinstance(member, bool) or not isinstance(member, int) or not 0 <= member < size:
            raise ConfigError(f"member must be from 0 to {size - 1}, got {member!r}.")
        return [member] * count
    if generator is None:
        raise ConfigError("drawing members needs a generator: pass generator=torch.Generator().manual_seed(0).")
    p = log_weight.exp().to(generator.device)
    return [int(k) for k in torch.multinomial(p, count, replacement=True, generator=generator)]


def batches(keys: Sequence[Any], batch_size: int) -> Iterator[tuple[Any, list[int]]]:
    """Positions with one key, so many at a time."""
    alike: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        alike.setdefault(key, []).append(position)
    for key, positions in alike.items():
        for start in range(0, len(positions), positive("batch_size", batch_size)):
            yield key, positions[start : start + batch_size]


def answer_prompts(
    model: StackedCausalLM,
    tokenizer: Any,
    prompts: Sequence[Ids],
    speakers: Sequence[int | None],
    log_weight: Tensor,
    pick: Pick,
    *,
    num_answers: int,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Let speakers answer, ``num_answers`` of them to each prompt in turn; see :meth:`Ensemble.generate`."""
    ids = [prompt for prompt in prompts for _ in range(num_answers)]
    end = end_tokens(model, tokenizer)
    found: dict[int, Answer] = {}
    keys = [(len(prompt), one) for prompt, one in zip(ids, speakers, strict=True)]
    for (_, one), some in batches(keys, batch_size):  # one length and one speaker to a batch: no padding
        before = log_weight if one is None else torch.zeros(1, dtype=torch.float64)
        done = decode(
            model,
            torch.tensor([ids[i] for i in some]),
            before.unsqueeze(1).expand(-1, len(some)),
            pick,
            members=(0, model.num_members) if one is None else (one, one + 1),
            max_new_tokens=max_new_tokens,
            end=end,
        )
        for k, i in enumerate(some):
            said = done.tokens[k]
            text = "" if tokenizer is None else str(tokenizer.decode([t for t in said if t not in end]))
            after = done.log_weight[:, k] if one is None else None
            found[i] = Answer(i // num_answers, text, said, one, after, float(done.mixture_log_prob[k]))
    return [found[i] for i in range(len(ids))]


def group_sums(log_likelihood: Tensor, rows: Sequence[Row]) -> tuple[Tensor, list[str]]:
    """Sums over the rows of each group, ``(member, group)``, with the names of the groups in the order of the rows.

    Raises:
        DataError: If a row has no group.
    """
    names = [row.group for row in rows]
    if None in names:
        raise DataError("rows have no group: prepare them with group_column=, the column that names it.")
    order = list(dict.fromkeys(str(name) for name in names))
    index = torch.tensor([order.index(str(name)) for name in names])
    summed = torch.zeros(len(log_likelihood), len(order), dtype=log_likelihood.dtype)
    return summed.index_add_(1, index, log_likelihood), order


def context_row(ids: Ids) -> Row:
    """A prompt as a row whose own tokens are scored, from the second on.

    Raises:
        DataError: If there is none.
    """
    if len(ids) < 2:
        raise DataError("a prompt of one token says nothing of the members: give a longer one.")
    return Row(ids[:1], ids[1:], (True,) * (len(ids) - 1))


def checked_weights(log_weight: Tensor, num_members: int) -> Tensor:
    """Log weights that were given, normalised.

    Raises:
        ShapeError: If there is not one for each member.
    """
    if log_weight.shape != (num_members,):
        raise ShapeError(f"log_weight must have shape ({num_members},), got {tuple(log_weight.shape)}.")
    return log_weight.detach().cpu().double().log_softmax(0)


def end_tokens(model: StackedCausalLM, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, of the model's settings and of the tokenizer."""
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def positive(name: str, value: int) -> int:
    """Return a positive integer.

    Raises:
        ConfigError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    return value
