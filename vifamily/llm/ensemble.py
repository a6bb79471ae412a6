"""A trained ensemble in use: scores, answers, and how unsure they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vifamily.diagnostics.routing import MixtureScore, Responsibilities, mixture_log_score, responsibilities
from vifamily.errors import ConfigError
from vifamily.llm._answers import (
    SPEAKERS,
    Answer,
    answer_prompts,
    as_prompts,
    batches,
    checked_weights,
    choose_speakers,
    context_row,
    group_sums,
    is_conversation,
    positive,
)
from vifamily.llm._decode import next_log_prob, picker
from vifamily.llm._extra import pretrained
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.adapter_files import SavedAdapter
from vifamily.llm.data import check_tokenizer, prepare_pairs, prepare_sft, prompt_ids
from vifamily.llm.manifest import Manifest, read_manifest
from vifamily.llm.rows import Ids, PairRow, Row, collate_pairs, collate_sft
from vifamily.llm.saving import load_model
from vifamily.llm.uncertainty import (
    SequenceInformation,
    Uncertainty,
    posterior_log_weight,
    sequence_information,
    split_uncertainty,
)

__all__ = ["Answer", "Ensemble", "SPEAKERS"]

Prompt = str | list[dict[str, Any]]
Examples = Sequence[Mapping[str, Any]] | Sequence[Row] | Sequence[PairRow]


class Ensemble:
    r"""Members of an ensemble with their weights and their tokenizer.

    Scores and answers are those of the mixture of whole answers, :math:`\sum_m \pi_m\, p_m(y \mid x)`, at power one
    whatever alpha trained.

    Args:
        model: The members over their base.
        tokenizer: The base's tokenizer; needed for texts, not for rows of token ids.
        manifest: What the folder says of it, if it comes from one.

    Attributes:
        model: The members over their base, in evaluation mode.
        tokenizer: The tokenizer, or None.
        manifest: What the folder says, or None.

    Example:
        >>> ensemble = Ensemble.from_pretrained("my-ensemble")  # doctest: +SKIP
        >>> source = torch.Generator().manual_seed(0)  # doctest: +SKIP
        >>> ensemble.generate(["blend : a b c ="], speaker="mixture", generator=source)[0].text  # doctest: +SKIP
        ' c b a'
    """

    def __init__(self, model: StackedCausalLM, tokenizer: Any = None, manifest: Manifest | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.manifest = manifest

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, base: Any = None, tokenizer: Any = None, **options: Any
    ) -> Ensemble:
        """Load an ensemble from the folder it was saved to.

        Args:
            folder: Where it was saved.
            base: The base model, its name or its path; None takes what the folder names.
            tokenizer: The tokenizer, its name or its path; None takes the one in the folder, or that of the base.
            options: For ``AutoModelForCausalLM.from_pretrained``, where the base has to be loaded.

        Returns:
            The ensemble.

        Raises:
            CheckpointError: If the folder is incomplete or damaged, or the base is another one.
            ConfigError: If no base or no tokenizer can be told.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        if tokenizer is None:
            named = base if isinstance(base, (str, os.PathLike)) else manifest.base
            tokenizer = path if (path / "tokenizer.json").is_file() else named
            if not tokenizer:
                raise ConfigError(f"{path} has no tokenizer and names no base: pass tokenizer=.")
        if isinstance(tokenizer, (str, os.PathLike)):
            passed = {key: options[key] for key in ("revision", "local_files_only", "token") if key in options}
            tokenizer = pretrained("AutoTokenizer", str(tokenizer), "the tokenizer", **passed)
        return cls(load_model(path, base, **options), tokenizer, manifest)

    @property
    def num_members(self) -> int:
        """Number of members."""
        return self.model.num_members

    @property
    def log_weight(self) -> Tensor:
        """Log weights of the members, ``(member,)``, in float64 and normalised."""
        return self.model.log_weight.detach().cpu().double().log_softmax(0)

    # --- scores ---

    def log_likelihood(self, examples: Examples, *, batch_size: int = 16) -> Tensor:
        """Log likelihood of each answer as a whole under each member.

        Args:
            examples: Records in TRL's formats, or rows.
            batch_size: Rows that all members score at once.

        Returns:
            ``(member, example)`` in float64.

        Raises:
            DataError: If records are not fit; see :func:`~vifamily.llm.data.prepare_sft`.
        """
        rows = self._rows(examples)
        parts = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
        return torch.cat([self._scored(collate_sft(part, self._pad)) for part in parts], 1)

    def preference_log_likelihood(
        self,
        pairs: Examples,
        *,
        beta: float = 0.1,
        reference_adapter: str | os.PathLike[str] | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        r"""Log probability under each member that the chosen answer is preferred.

        .. math:: \log \sigma\big(\beta\, [\log p_m(y^+) - \log p_0(y^+) - \log p_m(y^-) + \log p_0(y^-)]\big)

        with the base, adapters off, as reference :math:`p_0`, or a trained adapter over it.

        Args:
            pairs: Records with ``prompt``, ``chosen`` and ``rejected``, or rows of pairs.
            beta: As in training.
            reference_adapter: Folder of a PEFT adapter, as in training.
            batch_size: Pairs that all members score at once.

        Returns:
            ``(member, pair)`` in float64.

        Raises:
            DataError: If records are not fit.
            ConfigError: If beta is not positive.
        """
        if not beta > 0:
            raise ConfigError(f"beta must be positive, got {beta!r}.")
        rows = self._rows(pairs, PairRow)
        adapter = "base" if reference_adapter is None else SavedAdapter(Path(reference_adapter), self.model)
        out = []
        for start in range(0, len(rows), batch_size):
            batch = collate_pairs(rows[start : start + batch_size], self._pad)
            gain = self._scored(batch) - self._scored(batch, adapter)
            chosen, rejected = gain.chunk(2, 1)
            out.append(logsigmoid(beta * (chosen - rejected)))
        return torch.cat(out, 1)

    def score(self, examples: Examples, *, log_weight: Tensor | None = None, batch_size: int = 16) -> MixtureScore:
        """Log scores of held-out examples under the mixture and under its members.

        Args:
            examples: Records or rows.
            log_weight: Weights to use in place of the ensemble's, ``(member,)``.
            batch_size: Rows at once.

        Returns:
            Scores in nats per example; prints as a table.
        """
        weight = self.log_weight if log_weight is None else log_weight
        return mixture_log_score(self.log_likelihood(examples, batch_size=batch_size), weight)

    def responsibilities(
        self, examples: Examples, *, alpha: float = 1.0, group: bool = False, batch_size: int = 16
    ) -> Responsibilities:
        """Which member explains which example, or which group of them.

        Args:
            examples: Records or rows.
            alpha: The power at which they are routed.
            group: Sum rows of one group first; rows must come with one, as from ``prepare_sft(..., group_column=)``.
            batch_size: Rows at once.

        Returns:
            Responsibilities with usage and entropies; prints as a table, and ``plot()`` draws a heat map.

        Raises:
            DataError: If groups are asked for and rows have none.
        """
        rows = self._rows(examples)
        ll = self.log_likelihood(rows, batch_size=batch_size)
        if not group:
            return responsibilities(ll, self.log_weight, alpha, unit="sequence")
        summed, order = group_sums(ll, rows)
        return responsibilities(summed, self.log_weight, alpha, unit="group", unit_names=order)

    # --- weights from a context ---

    def infer_log_weight(
        self, context: Prompt | Examples, *, beta: float | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Weights of the members given a context: a prompt, examples with answers, or preference pairs.

        Args:
            context: A text or messages, whose own tokens are scored; or records or rows.
            beta: For preference pairs, as in training; None takes examples as answers.
            temperature: Above 1 the context says less; see :func:`~vifamily.llm.uncertainty.posterior_log_weight`.

        Returns:
            Log weights, ``(member,)``; pass them as ``log_weight=``.

        Raises:
            DataError: If the context is empty or not fit.
        """
        if isinstance(context, str) or is_conversation(context):
            context = [context_row(prompt_ids(context, self._words()))]  # type: ignore[arg-type]
        ll = self.log_likelihood(context) if beta is None else self.preference_log_likelihood(context, beta=beta)
        return posterior_log_weight(ll, self.log_weight, temperature=temperature)

    # --- answers ---

    def generate(
        self,
        prompts: Sequence[Prompt | Row | Ids],
        *,
        speaker: str = "draw",
        member: int | None = None,
        num_answers: int = 1,
        log_weight: Tensor | None = None,
        generator: torch.Generator | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int = 16,
    ) -> list[Answer]:
        """Answer prompts.

        ``"draw"`` draws a member for each answer and lets it speak to the end: at temperature one that is exactly the
        mixture of whole answers, at the cost of one member. ``"mixture"`` runs all members beside each other and weighs
        them at each token by how well they have said the answer so far: the same distribution, with the posterior of
        the member as a result. ``"member"`` is one that is named.

        Args:
            prompts: Texts, conversations, token ids, or rows (their prompts).
            speaker: One of :data:`SPEAKERS`.
            member: Who speaks, for ``"member"``.
            num_answers: Answers to each prompt.
            log_weight: Weights to use in place of the ensemble's, ``(member,)``.
            generator: Source of the draws; not needed at temperature 0 by the mixture or a named member.
            max_new_tokens: Most tokens of an answer.
            temperature: 1 draws as members predict, 0 takes the likeliest token each time.
            top_k: Draw among so many of the likeliest tokens only.
            top_p: Draw among the likeliest tokens that together have this probability only.
            batch_size: Answers at once.

        Returns:
            Answers prompt by prompt.

        Raises:
            ConfigError: If an option is out of range or does not go with the speaker.
            DataError: If a prompt is empty.
        """
        ids, weight = as_prompts(prompts, self.tokenizer), self._weights(log_weight)
        count = len(ids) * positive("num_answers", num_answers)
        return answer_prompts(
            self.model,
            self.tokenizer,
            ids,
            choose_speakers(speaker, member, weight, generator, count),
            weight,
            picker(generator, temperature=temperature, top_k=top_k, top_p=top_p),
            num_answers=num_answers,
            max_new_tokens=positive("max_new_tokens", max_new_tokens),
            batch_size=batch_size,
        )

    # --- uncertainty ---

    def next_log_prob(self, prompts: Sequence[Prompt | Row | Ids], *, batch_size: int = 16) -> Tensor:
        """Log probabilities of the first token of an answer under each member.

        Args:
            prompts: As in :meth:`generate`.
            batch_size: Prompts at once.

        Returns:
            ``(member, prompt, vocabulary)`` in float64; see :func:`~vifamily.llm.uncertainty.split_uncertainty`.
        """
        ids = as_prompts(prompts, self.tokenizer)
        found: dict[int, Tensor] = {}
        for _, some in batches([len(prompt) for prompt in ids], batch_size):
            each = next_log_prob(self.model, torch.tensor([ids[i] for i in some]))
            found.update(zip(some, each.unbind(1), strict=True))
        return torch.stack([found[i] for i in range(len(ids))], 1)

    def first_token(self, prompts: Sequence[Prompt | Row | Ids], *, log_weight: Tensor | None = None) -> Uncertainty:
        """Uncertainty of the first token of the answer to each prompt, split into its parts.

        Args:
            prompts: As in :meth:`generate`.
            log_weight: Weights to use in place of the ensemble's, ``(member,)``.

        Returns:
            Total, aleatoric and epistemic parts, ``(prompt,)``.
        """
        return split_uncertainty(self.next_log_prob(prompts), self._weights(log_weight))

    def information(
        self,
        prompts: Sequence[Prompt | Row | Ids],
        *,
        generator: torch.Generator,
        answers_per_member: int = 8,
        max_new_tokens: int = 64,
        log_weight: Tensor | None = None,
    ) -> SequenceInformation:
        """Mutual information of the member and the whole answer to each prompt, by Monte Carlo.

        Args:
            prompts: As in :meth:`generate`.
            generator: Source of the answers.
            answers_per_member: Answers that each member gives to each prompt.
            max_new_tokens: Most tokens of an answer; what is cut off there counts as it stands.
            log_weight: Weights to use in place of the ensemble's, ``(member,)``.

        Returns:
            The estimate with its standard error, ``(prompt,)``.
        """
        ids, weight = as_prompts(prompts, self.tokenizer), self._weights(log_weight)
        rows: list[Row] = []
        for member in range(self.num_members):
            answers = self.generate(
                ids,
                speaker="member",
                member=member,
                num_answers=answers_per_member,
                generator=generator,
                max_new_tokens=max_new_tokens,
            )
            rows += [Row(ids[a.prompt], a.token_ids, (True,) * len(a.token_ids)) for a in answers]
        ll = self.log_likelihood(rows).unflatten(1, (self.num_members, len(ids), answers_per_member))
        ordered = ll.transpose(1, 2).flatten(2)  # (member, prompt, speaker and answer)
        return sequence_information(
            ordered, torch.arange(self.num_members).repeat_interleave(answers_per_member), weight
        )

    # --- parts ---

    @property
    def _pad(self) -> int:
        given = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return int(given if given is not None else 0)  # padding is masked, so any id will do

    def _words(self) -> Any:
        if self.tokenizer is None:
            raise ConfigError("texts need a tokenizer and the ensemble has none: pass tokenizer= when it is made.")
        return check_tokenizer(self.tokenizer)

    def _rows(self, examples: Any, kind: type = Row) -> list[Any]:
        some = list(examples)
        if some and all(isinstance(row, kind) for row in some):
            return some
        prepare: Any = prepare_sft if kind is Row else prepare_pairs
        return list(prepare(some, self._words(), max_length=None))

    def _weights(self, log_weight: Tensor | None) -> Tensor:
        return self.log_weight if log_weight is None else checked_weights(log_weight, self.num_members)

    @torch.no_grad()
    def _scored(self, batch: dict[str, Tensor], reference: SavedAdapter | str | None = None) -> Tensor:
        """Scores of rows under members, or under a reference: "base", or an adapter."""
        where: dict[str, Any] = {name: value.to(self.model.device) for name, value in batch.items()}
        if isinstance(reference, SavedAdapter):
            with reference.on(self.model):
                return self.model.row_log_prob(**where, members=(0, 1)).double().cpu()
        return self.model.row_log_prob(**where, adapters=reference is None).double().cpu()
