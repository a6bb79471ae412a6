"""Small language models from scratch: a tokenizer made from a corpus, and a base for it, without a download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vifamily.errors import ConfigError, DataError
from vifamily.llm._extra import require

__all__ = ["CHAT_TEMPLATE", "tiny_tokenizer"]

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
