"""Small language models from scratch: a tokenizer made from a corpus, and a base for it, without a download."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, DataError
from vifamily.llm._extra import require
from vifamily.llm.rows import Row, collate_sft
from vifamily.rng import scoped

__all__ = [
    "ARCHITECTURES",
    "CHAT_TEMPLATE",
    "Pretrained",
    "answer_log_likelihood",
    "greedy_answers",
    "pretrain",
    "save_base",
    "tiny_model",
    "tiny_tokenizer",
]

# not Qwen2: AutoTokenizer reads every tokenizer that stands beside one with Qwen2's own splitting of words
ARCHITECTURES = ("llama", "gpt2", "qwen3")
"""Kinds of language models that are made small here."""

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Chat template of the tokenizers made here, with the marks that tell the tokens of the assistant."""


def tiny_tokenizer(texts: Iterable[str], *, kind: str = "bpe", vocab_size: int = 512) -> Any:
    """Make a tokenizer from a corpus.

    Args:
        texts: The corpus.
        kind: ``"bpe"``, byte pairs learned from the corpus, which can spell every text; or ``"word"``, one token for
            each word between spaces, which suits corpora of symbols.
        vocab_size: Most tokens; at least 300 for byte pairs, whose alphabet alone has 256.

    Returns:
        A ``PreTrainedTokenizerFast`` with a pad token, an end token and a chat template.

    Raises:
        DataError: If there are no texts.
        ConfigError: If the kind or the size cannot be used.
        MissingExtraError: If tokenizers or transformers is not installed.
    """
    if kind not in ("bpe", "word"):
        raise ConfigError(f'kind must be "bpe" or "word", got {kind!r}.')
    if vocab_size < (300 if kind == "bpe" else 10):
        raise ConfigError(f"vocab_size must be at least {300 if kind == 'bpe' else 10} for {kind}, got {vocab_size}.")
    corpus = list(texts)
    if not any(text.strip() for text in corpus):
        raise DataError("a tokenizer is made from texts, and there is none that is not blank.")
    library = require("tokenizers", "making a tokenizer")
    special = [PAD, END, UNKNOWN, *ROLES]
    if kind == "bpe":
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    else:
        made = library.Tokenizer(library.models.WordLevel(unk_token=UNKNOWN))
        made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
        trainer = library.trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    made.train_from_iterator(corpus, trainer=trainer)
    fast = require("transformers", "making a tokenizer").PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(
    tokenizer: Any,
    *,
    architecture: str = "llama",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    max_positions: int = 128,
    seed: int = 0,
) -> Any:
    """Make a small language model with random weights.

    Args:
        tokenizer: The tokenizer; its size is that of the vocabulary.
        architecture: One of :data:`ARCHITECTURES`. Llama and Qwen3 have projections by the usual names; GPT-2 has one
            transposed projection for queries, keys and values.
        hidden_size: Width.
        num_layers: Number of layers.
        num_heads: Heads of attention; they divide the width into even parts.
        max_positions: Longest row.
        seed: Root seed of the weights.

    Returns:
        A model of transformers with tied embeddings, in evaluation mode.

    Raises:
        ConfigError: If the architecture is unknown or the sizes do not fit.
        MissingExtraError: If transformers is not installed.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}.")
    for name, value in (("num_layers", num_layers), ("num_heads", num_heads), ("max_positions", max_positions)):
        if value < 1:
            raise ConfigError(f"{name} must be positive, got {value}.")
    if hidden_size < 2 or hidden_size % (2 * num_heads):
        raise ConfigError(f"hidden_size must be a multiple of twice num_heads={num_heads}, got {hidden_size}.")
    library = require("transformers", "making a language model")
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
    }
    if architecture == "gpt2":
        config = library.GPT2Config(
            n_embd=hidden_size,
            n_layer=num_layers,
            n_head=num_heads,
            n_positions=max_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ends,
        )
    else:
        kind = library.LlamaConfig if architecture == "llama" else library.Qwen3Config
        config = kind(
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=hidden_size // num_heads,
            max_position_embeddings=max_positions,
            **ends,
        )
    with scoped(seed):
        return library.AutoModelForCausalLM.from_config(config).eval()


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """How training of a base went.

    Attributes:
        loss: Mean nats per scored token of each step's batch, ``(step,)``.
        seconds: Wall time.
        tokens: Tokens that were read.
    """

    loss: Tensor
    seconds: float
    tokens: int

    def __str__(self) -> str:
        """Say how far it came."""
        last = float(self.loss[-20:].mean())
        return (
            f"{len(self.loss)} steps, {self.tokens} tokens, {self.seconds:.1f} s, {last:.4f} nats per token at the end"
        )


def pretrain(
    model: Any,
    rows: Sequence[Row],
    *,
    steps: int,
    generator: torch.Generator,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    warmup: int = 30,
    progress: Callable[[int, float], None] | None = None,
) -> Pretrained:
    """Train all weights of a small model on the scored tokens of rows: AdamW, warm-up, then linear decay to zero.

    Args:
        model: A causal language model; changed in place, and left in evaluation mode.
        rows: Rows as :func:`~vifamily.llm.data.prepare_sft` makes them.
        steps: Number of steps.
        generator: Source of the order of rows.
        batch_size: Rows of a step.
        learning_rate: Largest step size.
        warmup: Steps until it is reached.
        progress: Called with the step and its loss.

    Returns:
        The losses and the time.

    Raises:
        ConfigError: If a number is not positive.
        DataError: If there are no rows, or the loss stops being finite.
    """
    if min(steps, batch_size) < 1 or learning_rate <= 0:
        raise ConfigError(
            f"steps, batch_size and learning_rate must be positive: {steps}, {batch_size}, {learning_rate}."
        )
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    losses, tokens, began = [], 0, time.perf_counter()
    order: list[int] = []
    model.train()
    for step in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(rows), generator=generator).tolist() if rows else _no_rows()
        chosen, order = order[:batch_size], order[batch_size:]
        batch = collate_sft([rows[i] for i in chosen], int(model.config.pad_token_id))
        rate = learning_rate * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))
        for group in optimiser.param_groups:
            group["lr"] = rate
        each, scored = _token_log_likelihood(model, batch)
        loss = -each.sum() / scored.sum()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(f"the loss of step {step} is {value}: lower learning_rate, which is {learning_rate}.")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(value)
        tokens += int(batch["attention_mask"].sum())
        if progress is not None:
            progress(step, losses[-1])
    model.eval()
    return Pretrained(torch.tensor(losses, dtype=torch.float64), time.perf_counter() - began, tokens)


def answer_log_likelihood(model: Any, rows: Sequence[Row], *, batch_size: int = 64) -> Tensor:
    """Log likelihood of the scored tokens of each row, summed.

    Args:
        model: A causal language model.
        rows: Rows; none of what is scored is first of all.
        batch_size: Rows that are scored at once.

    Returns:
        ``(row,)`` in float64.
    """
    out = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = collate_sft(list(rows[start : start + batch_size]), int(model.config.pad_token_id))
            out.append(_token_log_likelihood(model, batch)[0].double().sum(1))
    return torch.cat(out) if out else _no_rows()


def greedy_answers(model: Any, rows: Sequence[Row], *, batch_size: int = 64) -> list[tuple[int, ...]]:
    """The likeliest tokens behind each prompt one after the other, as many as the row's completion has.

    Args:
        model: A causal language model.
        rows: Rows; only the length of their completion is used.
        batch_size: Rows that are answered at once.

    Returns:
        Token ids for each row.
    """
    out: list[tuple[int, ...]] = [()] * len(rows)
    alike: dict[tuple[int, int], list[int]] = {}  # no padding inside a batch
    for i, row in enumerate(rows):
        alike.setdefault((len(row.prompt_ids), len(row.completion_ids)), []).append(i)
    device = next(model.parameters()).device
    with torch.no_grad():
        for (_, length), members in alike.items():
            for start in range(0, len(members), batch_size):
                some = members[start : start + batch_size]
                ids = torch.tensor([rows[i].prompt_ids for i in some], device=device)
                for _ in range(length):
                    following = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                    ids = torch.cat([ids, following], 1)
                for i, answer in zip(some, ids[:, -length:].tolist(), strict=True):
                    out[i] = tuple(answer)
    return out


def save_base(folder: str | os.PathLike[str], model: Any, tokenizer: Any) -> Path:
    """Save a model and its tokenizer to one folder, as ``from_pretrained`` reads them.

    Args:
        folder: The folder; made where it is missing.
        model: A model of transformers.
        tokenizer: Its tokenizer.

    Returns:
        The folder.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _token_log_likelihood(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log likelihood of each token that is scored, zero elsewhere, and which are, ``(row, token - 1)``."""
    device = next(model.parameters()).device
    ids, seen = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    scored = batch["completion_mask"].to(device)[:, 1:]
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()
    each = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return torch.where(scored, each, torch.zeros_like(each)), scored


def _no_rows() -> Any:
    raise DataError("there are no rows: give at least one.")
