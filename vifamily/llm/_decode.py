"""Answers said token by token by members of a stack, each with its own keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.llm._stacked import StackedCausalLM

__all__ = ["Decoded", "Pick", "decode", "log_prob_at", "next_log_prob", "picker"]

Pick = Callable[[Tensor], Tensor]
"""From log probabilities ``(row, vocabulary)`` to the tokens that are taken, ``(row,)``."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Answers of one batch.

    Attributes:
        tokens: Of each row, with the end token where it was said.
        log_likelihood: Of each answer under each member that spoke, ``(member, row)``, at temperature one.
        mixture_log_prob: Of each answer under their mixture, ``(row,)``; the product of its next-token probabilities.
        log_weight: Of the members after the answer, ``(member, row)``.
    """

    tokens: list[tuple[int, ...]]
    log_likelihood: Tensor
    mixture_log_prob: Tensor
    log_weight: Tensor


@torch.no_grad()
def decode(
    model: StackedCausalLM,
    prompt: Tensor,
    log_weight: Tensor,
    pick: Pick,
    *,
    members: tuple[int, int],
    max_new_tokens: int,
    end: frozenset[int],
) -> Decoded:
    r"""Say answers to prompts of one length, from the mixture of whole answers.

    The next token is drawn from :math:`\sum_m v_m\, p_m(\cdot \mid x, y_{<t})` with
    :math:`v_m \propto \pi_m\, p_m(y_{<t} \mid x)`, whose product over tokens is :math:`\sum_m \pi_m\, p_m(y \mid x)`.
    With one member it is that member's own distribution.

    Args:
        model: The ensemble.
        prompt: ``(row, token)``.
        log_weight: Log weights of the chosen members before the answer, ``(member, row)``.
        pick: Which token is taken.
        members: The first member and the one after the last.
        max_new_tokens: Most tokens of an answer.
        end: Tokens that end one.

    Returns:
        The answers.
    """
    count, rows = members[1] - members[0], len(prompt)
    weight = log_weight.double().log_softmax(0)
    likelihood = torch.zeros(count, rows, dtype=torch.float64)
    mixture = torch.zeros(rows, dtype=torch.float64)
    alive = torch.ones(rows, dtype=torch.bool)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    given, past = prompt.to(model.device), None
    # layers below the first adapted one are run once for all members, and then they keep keys of as many rows
    repeats = 1 if model._repeats_inside else count
    for _ in range(max_new_tokens):
        with model.selection.using(members, rows):
            out = model.base.base_model(  # type: ignore[operator]
                input_ids=given.repeat(repeats, 1), past_key_values=past, use_cache=True
            )
        past = out.past_key_values
        each = model.logits(out.last_hidden_state[:, -1]).double().log_softmax(-1).cpu().unflatten(0, (count, rows))
        mixed = torch.logsumexp(weight.unsqueeze(-1) + each, 0)
        token = pick(mixed)
        said = each.gather(-1, token.expand(count, rows).unsqueeze(-1)).squeeze(-1)
        likelihood += said * alive
        mixture += mixed.gather(-1, token.unsqueeze(-1)).squeeze(-1) * alive
        weight = torch.where(alive, (weight + said).log_softmax(0), weight)
        for row in torch.nonzero(alive).flatten().tolist():
            tokens[row].append(int(token[row]))
            alive[row] = int(token[row]) not in end
        if not bool(alive.any()):
            break
        given = token.unsqueeze(1).to(model.device)
    return Decoded([tuple(t) for t in tokens], likelihood, mixture, weight)


def log_prob_at(model: StackedCausalLM, batch: Mapping[str, Tensor], members: tuple[int, int]) -> Tensor:
    """Log probabilities of what may follow at each place that is scored, differentiable: for small vocabularies.

    Args:
        model: The ensemble.
        batch: Rows as :func:`~vifamily.llm.rows.collate_sft` makes them, on the ensemble's device.
        members: The first member and the one after the last.

    Returns:
        ``(member, token, vocabulary)``, tokens in the order of rows and positions.
    """
    ids, count = batch["input_ids"], members[1] - members[0]
    hidden = _hidden(model, ids, batch["attention_mask"], members)
    scored = hidden.unflatten(0, (count, -1))[:, :, :-1][:, batch["completion_mask"][:, 1:]]
    out: Tensor = model.logits(scored.flatten(0, 1)).log_softmax(-1).unflatten(0, (count, -1))
    return out


@torch.no_grad()
def next_log_prob(model: StackedCausalLM, prompt: Tensor) -> Tensor:
    """Log probabilities of the token after prompts of one length, ``(member, row, vocabulary)``."""
    count, rows = model.num_members, len(prompt)
    hidden = _hidden(model, prompt.to(model.device), None, (0, count))[:, -1]
    out: Tensor = model.logits(hidden).double().log_softmax(-1).cpu().unflatten(0, (count, rows))
    return out


def _hidden(model: StackedCausalLM, ids: Tensor, mask: Tensor | None, members: tuple[int, int]) -> Tensor:
    """Hidden states of rows under members, ``(member and row, position, width)``."""
    # layers below the first adapted one are run once for all members
    repeats = 1 if model._repeats_inside else members[1] - members[0]
    with model.selection.using(members, len(ids)):
        out: Tensor = model.base.base_model(  # type: ignore[operator]
            input_ids=ids.repeat(repeats, 1),
            attention_mask=None if mask is None else mask.repeat(repeats, 1),
            use_cache=False,
        ).last_hidden_state
    return out


def picker(
    generator: torch.Generator | None, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Pick:
    """How tokens are taken from their log probabilities.

    Args:
        generator: Source of the draws; not needed at temperature 0.
        temperature: 1 draws from the probabilities as they are, 0 takes the likeliest.
        top_k: Draw among so many of the likeliest only.
        top_p: Draw among the likeliest that together have this probability only.

    Returns:
        The rule.

    Raises:
        ConfigError: If a number is out of range, or draws are asked for without a generator.

    Example:
        >>> picker(None, temperature=0)(torch.tensor([[0.1, 0.9], [0.6, 0.4]]).log()).tolist()
        [1, 0]
    """
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < 1e6:
        raise ConfigError(f"temperature must be a finite number from 0, got {temperature!r}.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ConfigError(f"top_k must be a positive integer or None, got {top_k!r}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, or None, got {top_p!r}.")
    if temperature == 0:
        return lambda log_prob: log_prob.argmax(-1)
    if generator is None:
        raise ConfigError("drawing answers needs a generator: pass generator=torch.Generator().manual_seed(0).")

    def pick(log_prob: Tensor) -> Tensor:
        p = (log_prob / temperature).softmax(-1)
        if top_k is not None or top_p is not None:
            order = p.argsort(dim=-1, descending=True, stable=True)
            ranked = p.gather(-1, order)
            keep = torch.ones_like(ranked, dtype=torch.bool)
            if top_k is not None:
                keep[..., top_k:] = False
            if top_p is not None:  # what stands before a token is not enough yet
                keep &= ranked.cumsum(-1) - ranked < top_p
            p = torch.zeros_like(p).scatter(-1, order, ranked * keep)
        return torch.multinomial(p.to(generator.device), 1, generator=generator).squeeze(-1).to(log_prob.device)

    return pick
