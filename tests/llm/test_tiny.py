"""Small bases are made, trained, saved and read without a network, and learn what they are trained on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vifamily.errors import ConfigError, DataError
from vifamily.llm import Corpus, Row, prepare_sft, symbol_tasks
from vifamily.llm.tiny import (
    ARCHITECTURES,
    answer_log_likelihood,
    greedy_answers,
    pretrain,
    save_base,
    tiny_model,
    tiny_tokenizer,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return symbol_tasks(600, torch.Generator().manual_seed(0), rules=("copy", "reverse"), num_symbols=4, length=2)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Any:
    return tiny_tokenizer(corpus.texts, kind="word")


def rows_of(corpus: Corpus, tokenizer: Any) -> list[Row]:
    return list(prepare_sft(corpus, tokenizer))


def test_base_learns_its_tasks(corpus: Corpus, tokenizer: Any) -> None:
    rows = rows_of(corpus, tokenizer)
    model = tiny_model(tokenizer, hidden_size=32)
    before = answer_log_likelihood(model, rows[:100])
    # three tokens, each one of a dozen words, about evenly
    assert abs(float(before.mean()) / (3 * -math.log(len(tokenizer))) - 1) < 0.1
    done = pretrain(
        model, rows, steps=120, generator=torch.Generator().manual_seed(0), batch_size=32, learning_rate=1e-2
    )
    assert float(answer_log_likelihood(model, rows[:100]).mean()) > -0.1  # of a floor of zero
    right = [answer == row.completion_ids for answer, row in zip(greedy_answers(model, rows), rows, strict=True)]
    assert sum(right) / len(right) > 0.97
    assert done.loss.shape == (120,) and "120 steps" in str(done) and not model.training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bases_are_saved_and_read(corpus: Corpus, tokenizer: Any, architecture: str, tmp_path: Path) -> None:
    rows = rows_of(corpus, tokenizer)[:5]
    state = torch.get_rng_state()
    model = tiny_model(tokenizer, architecture=architecture, hidden_size=16, num_layers=1, num_heads=2, seed=3)
    again = tiny_model(tokenizer, architecture=architecture, hidden_size=16, num_layers=1, num_heads=2, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    save_base(tmp_path / "base", model, tokenizer)
    assert {path.suffix for path in (tmp_path / "base").iterdir()} <= {".json", ".safetensors", ".jinja"}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", local_files_only=True)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "base", local_files_only=True)
    assert words.pad_token_id == tokenizer.pad_token_id and words.eos_token == tokenizer.eos_token
    assert rows_of(corpus, words)[:5] == rows
    assert torch.equal(answer_log_likelihood(read, rows), answer_log_likelihood(model, rows))


def test_log_likelihoods_are_those_of_rows_alone(corpus: Corpus, tokenizer: Any) -> None:
    model = tiny_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2).double()
    rows = rows_of(corpus, tokenizer)[:3]
    rows.append(Row(rows[0].prompt_ids, rows[0].completion_ids * 2, (False, True) * 3))  # longer, scored in part
    by_hand = []
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logits = model(input_ids=ids).logits[0].log_softmax(-1).detach()
        terms = [
            float(logits[len(row.prompt_ids) + k - 1, token])
            for k, (token, counts) in enumerate(zip(row.completion_ids, row.scored, strict=True))
            if counts
        ]
        by_hand.append(sum(terms))
    # the sums are taken in single precision
    assert answer_log_likelihood(model, rows, batch_size=2).tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("text", ["plain words", "tabs\tand\nlines", "é ü 漢字 🙂", "<|user|> is a role"])
def test_byte_pairs_spell_every_text(text: str) -> None:
    made = tiny_tokenizer(["plain words in plain words"], vocab_size=300)
    assert made.decode(made(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert len(made) <= 300


def test_words_that_are_unknown_have_a_token(tokenizer: Any) -> None:
    assert tokenizer("copy zebra")["input_ids"][1] == tokenizer.unk_token_id


def test_bad_arguments_are_refused(corpus: Corpus, tokenizer: Any, generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match='kind must be "bpe" or "word"'):
        tiny_tokenizer(["a"], kind="char")
    with pytest.raises(ConfigError, match="vocab_size must be at least 300 for bpe, got 100"):
        tiny_tokenizer(["a"], vocab_size=100)
    with pytest.raises(DataError, match="there is none that is not blank"):
        tiny_tokenizer([" "])
    with pytest.raises(ConfigError, match="architecture must be one of llama, gpt2, qwen3, got 'bert'"):
        tiny_model(tokenizer, architecture="bert")
    with pytest.raises(ConfigError, match="hidden_size must be a multiple of twice num_heads=4, got 20"):
        tiny_model(tokenizer, hidden_size=20)
    model = tiny_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    with pytest.raises(DataError, match="there are no rows"):
        pretrain(model, [], steps=1, generator=generator)
    with pytest.raises(ConfigError, match="must be positive"):
        pretrain(model, rows_of(corpus, tokenizer)[:2], steps=0, generator=generator)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(DataError, match="the loss of step 0 is nan: lower learning_rate"):
        pretrain(model, rows_of(corpus, tokenizer)[:2], steps=1, generator=generator)
