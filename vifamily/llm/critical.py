r"""The alpha above which members specialise, predicted at one of them before an ensemble is trained.

The analysis is that of :func:`~vifamily.diagnostics.stability.unit_stability`, on the adapters of one member: with J
the mean outer product of the units' scores and F their Fisher matrix, members that are together there stay together up
to :math:`\alpha^* = 1 / \lambda_{\max}(F^{-1} J)`. A unit is what is routed in training.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vifamily.diagnostics.stability import Labelled, Stability, unit_stability
from vifamily.errors import ConfigError, DataError
from vifamily.llm._answers import batches, end_tokens, positive
from vifamily.llm._decode import decode, log_prob_at, picker
from vifamily.llm._stacked import StackedCausalLM, completion_rows
from vifamily.llm.adapter_files import swapped
from vifamily.llm.rows import PairRow, Row, collate_pairs, collate_sft

__all__ = ["adapter_stability"]

_UNITS = ("token", "sequence", "normalised", "group")
Function = Callable[[], Tensor]


def adapter_stability(
    model: StackedCausalLM,
    rows: Sequence[Row] | Sequence[PairRow],
    alpha: float | None = None,
    *,
    unit: str = "sequence",
    member: int = 0,
    beta: float = 0.1,
    generator: torch.Generator,
    num_label_draws: int | None = 16,
    damping: float = 1e-3,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Stability:
    r"""Predict the alpha above which members at one point move apart.

    The point should be where members would collapse to, such as the one member of an ensemble of one that is trained;
    where its scores do not average to nothing the result says so. Rows should be held out or many. Of each pair the
    Fisher matrix is exact. Of answers it comes from answers that the member gives to the same prompts, of which fewer
    than 16 to each are too noisy for an eigenvalue, and which miss what the member hardly ever says: where the observed
    answers are rare under it, the critical alpha comes out too small. With ``num_label_draws=None`` every token of the
    vocabulary is gone through at each place of the observed answers instead: exact, and for small vocabularies.

    Adapters can be turned into one another, :math:`(RA, BR^{-1})`, along which nothing changes and both matrices
    vanish, so something has to be added to F: see how the critical alpha depends on it in the result's ``sweep``.

    Args:
        model: The ensemble.
        rows: Rows of answers, or of preferences.
        alpha: An alpha to judge; None asks for the critical one alone.
        unit: ``"sequence"``, ``"normalised"``, ``"token"`` or ``"group"``, as in training; preferences have the first
            and the last.
        member: The member whose adapters are looked at.
        beta: For preferences, as in training.
        generator: Source of the answers.
        num_label_draws: Answers to each prompt; None goes through the vocabulary at each token.
        damping: Added to the diagonal of F, relative to its mean.
        max_new_tokens: Most tokens of an answer; None takes those of the longest row. One that is cut off counts as
            it stands.
        batch_size: Rows whose graph is held at once.
        options: ``route``, ``sweep``, ``prior_precision``, ``search``, ``tolerance``, ``max_steps`` and ``seed`` of
            :func:`~vifamily.diagnostics.stability.unit_stability`.

    Returns:
        The critical alpha with its direction and sweep; prints as a table.

    Raises:
        ConfigError: If an option is unknown or out of range.
        DataError: If there are no rows, or groups are asked for and rows have none.

    Example:
        >>> one = StackedCausalLM(base, config, 1)  # trained at any alpha  # doctest: +SKIP
        >>> source = torch.Generator().manual_seed(0)  # doctest: +SKIP
        >>> adapter_stability(one, held_out_rows, generator=source).alpha_star  # doctest: +SKIP
        0.04
    """
    some: list[Any] = list(rows)
    pairs = bool(some) and all(isinstance(row, PairRow) for row in some)
    if not some or not (pairs or all(isinstance(row, Row) for row in some)):
        raise DataError("rows must be those of prepare_sft or of prepare_pairs, at least one and of one kind.")
    known = ("sequence", "group") if pairs else _UNITS
    if unit not in known:
        raise ConfigError(f"unit must be one of {', '.join(known)}, got {unit!r}.")
    if isinstance(member, bool) or not isinstance(member, int) or not 0 <= member < model.num_members:
        raise ConfigError(f"member must be from 0 to {model.num_members - 1}, got {member!r}.")
    if not beta > 0:
        raise ConfigError(f"beta must be positive, got {beta!r}.")
    if num_label_draws is not None:
        positive("num_label_draws", num_label_draws)
    group = _groups(some) if unit == "group" else None
    with _only(model, member) as parameters:
        size = positive("batch_size", batch_size)
        if pairs:
            parts, labelled = _preferences(model, some, beta, size)
        else:
            longest = max(len(row.completion_ids) for row in some)
            length = longest if max_new_tokens is None else positive("max_new_tokens", max_new_tokens)
            size = max(1, min(size, sum(p.numel() for p in parameters) // longest))
            parts = [_answers(model, part, unit) for part in _parts(some, size)]
            if num_label_draws is None:
                labelled = _every_token(model, some, unit, size)
            else:
                labelled = [
                    Labelled(_drawn(model, some, unit, generator, length, size)) for _ in range(num_label_draws)
                ]
        return unit_stability(
            parts, parameters, alpha, units=group, curvature="fisher", labelled=labelled, damping=damping, **options
        )


@contextlib.contextmanager
def _only(model: StackedCausalLM, member: int) -> Iterator[list[Tensor]]:
    """Put one member's adapters in place of all, as leaves of their own; put back what was there."""
    pairs = {
        name: tuple(m.detach()[member : member + 1].clone() for m in (layer.lora_A, layer.lora_B))
        for name, layer in model.lora_adapters()
    }
    was_training = model.training
    try:
        model.eval()
        with swapped(model, pairs, trained=True) as parameters:  # type: ignore[arg-type]
            yield list(parameters)
    finally:
        model.train(was_training)


def _groups(rows: Sequence[Any]) -> Tensor:
    names = [row.group for row in rows]
    if None in names:
        raise DataError("rows have no group: prepare them with group_column=, the column that names it.")
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([order[name] for name in names])


def _parts(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# --- answers ---


def _answers(model: StackedCausalLM, rows: Sequence[Row], unit: str, token: Tensor | None = None) -> Function:
    """Log likelihoods of rows, or of their tokens; ``token`` stands in for what was observed at each of them."""
    batch = {name: value.to(model.device) for name, value in collate_sft(rows, 0).items()}
    row = completion_rows(batch["completion_mask"])

    def values() -> Tensor:
        log_prob = _next(model, batch)
        said = batch["input_ids"][:, 1:][batch["completion_mask"][:, 1:]] if token is None else token
        each = log_prob.gather(-1, said.unsqueeze(-1)).squeeze(-1)
        if unit == "token":
            return each
        total = each.new_zeros(len(rows)).index_add(0, row, each)
        return total / torch.bincount(row, minlength=len(rows)) if unit == "normalised" else total

    return values


def _next(model: StackedCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Log probabilities of what may follow at each token that is scored, ``(token, vocabulary)``."""
    return log_prob_at(model, batch, (0, 1))[0]


def _every_token(model: StackedCausalLM, rows: Sequence[Row], unit: str, size: int) -> list[Labelled]:
    """Log likelihoods of each token of the vocabulary at each place that is scored, with its probability there."""
    parts, p = [], []
    for part in _parts(rows, size):
        batch = {name: value.to(model.device) for name, value in collate_sft(part, 0).items()}
        row = completion_rows(batch["completion_mask"])
        over = torch.bincount(row)[row] if unit == "normalised" else torch.ones_like(row)
        parts.append((batch, over))
        with torch.no_grad():
            p.append(_next(model, batch).exp())
    probability = torch.cat(p)

    def value(batch: dict[str, Tensor], over: Tensor, token: int) -> Tensor:
        return _next(model, batch)[:, token] / over

    return [
        Labelled([functools.partial(value, batch, over, token) for batch, over in parts], probability[:, token])
        for token in range(probability.shape[1])
    ]


def _drawn(
    model: StackedCausalLM, rows: Sequence[Row], unit: str, generator: torch.Generator, length: int, size: int
) -> list[Function]:
    """The same with what the member says: whole answers, or each token given what was observed before it."""
    if unit == "token":
        out = []
        for part in _parts(rows, size):
            batch = {name: value.to(model.device) for name, value in collate_sft(part, 0).items()}
            with torch.no_grad():
                p = _next(model, batch).exp().to(generator.device)
            token = torch.multinomial(p, 1, generator=generator).squeeze(-1).to(model.device)
            out.append(_answers(model, part, unit, token))
        return out
    pick, end = picker(generator), end_tokens(model, None)
    said: dict[int, Row] = {}
    for _, some in batches([len(row.prompt_ids) for row in rows], size):
        prompt = torch.tensor([rows[i].prompt_ids for i in some])
        done = decode(
            model,
            prompt,
            torch.zeros(1, len(some), dtype=torch.float64),
            pick,
            members=(0, 1),
            max_new_tokens=length,
            end=end,
        )
        for i, tokens in zip(some, done.tokens, strict=True):
            said[i] = Row(rows[i].prompt_ids, tokens, (True,) * len(tokens))
    return [_answers(model, part, unit) for part in _parts([said[i] for i in range(len(rows))], size)]


# --- preferences ---


def _preferences(
    model: StackedCausalLM, rows: Sequence[PairRow], beta: float, size: int
) -> tuple[list[Function], list[Labelled]]:
    """Log likelihoods of pairs, and both ways in which each could have been decided."""

    def decided(margin: Function, sign: float) -> Tensor:
        return logsigmoid(sign * beta * margin())

    margins = [_margin(model, part) for part in _parts(rows, size)]
    with torch.no_grad():
        p = torch.cat([decided(margin, 1.0).exp() for margin in margins])
    either: list[list[Function]] = [[functools.partial(decided, m, sign) for m in margins] for sign in (1.0, -1.0)]
    return either[0], [Labelled(either[0], p), Labelled(either[1], 1 - p)]


def _margin(model: StackedCausalLM, rows: Sequence[PairRow]) -> Function:
    batch = {name: value.to(model.device) for name, value in collate_pairs(rows, 0).items()}
    with torch.no_grad():
        reference = model.row_log_prob(**batch, adapters=False)[0]

    def margin() -> Tensor:
        chosen, rejected = (model.row_log_prob(**batch, members=(0, 1))[0] - reference).chunk(2)
        return chosen - rejected

    return margin
