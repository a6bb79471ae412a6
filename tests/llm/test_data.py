"""Rows hold what TRL would make of the same records, score the answers alone, and never lose part of an answer."""

import copy
import warnings
from typing import Any

import pytest
import torch

from vifamily.errors import ConfigError, DataError, VifamilyWarning
from vifamily.llm import PairRow, Row, collate_pairs, collate_sft, prepare_pairs, prepare_sft
from vifamily.llm.tiny import CHAT_TEMPLATE, tiny_tokenizer

CORPUS = ["the sky is blue", "grass is green", "what colour is the sky", "say it"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    pytest.importorskip("transformers")
    return tiny_tokenizer(CORPUS, kind="word", vocab_size=40)


def unmarked(tokenizer: Any) -> Any:
    """The same tokenizer with a chat template that does not mark what the assistant says."""
    out = copy.deepcopy(tokenizer)
    out.chat_template = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return out


def scored(tokenizer: Any, row: Row) -> str:
    return tokenizer.decode([t for t, s in zip(row.completion_ids, row.scored, strict=True) if s])


def test_answers_are_what_is_scored(tokenizer: Any) -> None:
    records = [{"prompt": "the sky is", "completion": " blue"}]
    (row,) = prepare_sft(records, tokenizer)
    assert tokenizer.decode(row.prompt_ids) == "the sky is"
    assert tokenizer.decode(row.completion_ids) == "blue <|end|>" and row.scored == (True, True)
    (row,) = prepare_sft([{"prompt": [user("say it")], "completion": [assistant("the sky is blue")]}], tokenizer)
    assert tokenizer.decode(row.prompt_ids) == "<|user|> say it <|assistant|>"
    assert scored(tokenizer, row) == "the sky is blue <|end|>"
    (row,) = prepare_sft([{"text": "the sky is blue"}], tokenizer)
    assert len(row.prompt_ids) == 1 and scored(tokenizer, row) == "sky is blue <|end|>"


@pytest.mark.parametrize("marks", [True, False])
def test_every_turn_of_the_assistant_is_scored_and_no_other(tokenizer: Any, marks: bool) -> None:
    used = tokenizer if marks else unmarked(tokenizer)
    messages = [user("say it"), assistant("the sky is blue"), user("what is green"), assistant("grass"), user("say")]
    (row,) = prepare_sft([{"messages": messages}], used)
    assert scored(tokenizer, row) == "the sky is blue <|end|> grass <|end|>"
    assert tokenizer.decode(row.prompt_ids + row.completion_ids).endswith("<|assistant|> grass <|end|>")
    (everything,) = prepare_sft([{"messages": messages}], used, completion_only_loss=False)
    assert all(everything.scored) and len(everything.prompt_ids) == 1
    assert tokenizer.decode(everything.completion_ids).endswith("grass <|end|> <|user|> say")


def test_older_form_of_conversations(tokenizer: Any) -> None:
    old = {"conversations": [{"from": "human", "value": "say it"}, {"from": "gpt", "value": "blue"}]}
    new = {"messages": [user("say it"), assistant("blue")]}
    assert prepare_sft([old], tokenizer).rows == prepare_sft([new], tokenizer).rows


def test_rows_are_those_of_trl(tokenizer: Any) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl.trainer.dpo_trainer import DPOTrainer

    pairs = [
        {"prompt": "the sky is", "chosen": " blue", "rejected": " green grass"},
        {"prompt": [user("say it")], "chosen": [assistant("blue")], "rejected": [assistant("green")]},
        {"chosen": "the sky is blue", "rejected": "the sky is green"},
        {"chosen": [user("say"), assistant("blue")], "rejected": [user("say"), assistant("green")]},
    ]
    frame = type("Frame", (), {"_tokenizer": tokenizer})()
    args = type("Args", (), {"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start"})()
    for pair in pairs:
        made = DPOTrainer._prepare_dataset(frame, datasets.Dataset.from_list([pair]), tokenizer, args, "train")
        (row,) = prepare_pairs([pair], tokenizer)
        assert [list(row.prompt_ids), list(row.chosen_ids), list(row.rejected_ids)] == [
            made[0]["prompt_ids"], made[0]["chosen_ids"], made[0]["rejected_ids"]
        ], (pair, trl.__version__)  # fmt: skip


def test_long_rows_are_counted_and_answers_stay_whole(tokenizer: Any) -> None:
    records = [
        {"prompt": "the sky is", "completion": " blue"},  # 5 tokens
        {"prompt": "what colour is the sky say it the sky is", "completion": " blue"},  # 12 tokens
        {"prompt": "say", "completion": " the sky is blue grass is green it"},  # 10 tokens, 9 of them scored
    ]
    with pytest.warns(VifamilyWarning, match="2 of 3 records are longer than max_length=6 tokens; the longest has 12"):
        rows = prepare_sft(records, tokenizer, max_length=6)
    assert [row.index for row in rows] == [0] and rows.dropped == (1, 2) and rows.longest == 12
    assert "1 rows of 3 records" in str(rows) and "2 left out as too long" in str(rows)
    with pytest.raises(DataError, match="2 of 3 records .* The first is record 1"):
        prepare_sft(records, tokenizer, max_length=6, overlong="error")
    with pytest.warns(VifamilyWarning, match="1 of 3"):
        rows = prepare_sft(records, tokenizer, max_length=6, overlong="trim_prompt")
    assert rows.trimmed == (1,) and rows.dropped == (2,)
    assert tokenizer.decode(rows[1].prompt_ids + rows[1].completion_ids) == "it the sky is blue <|end|>"
    with pytest.raises(DataError, match="No row is left"):
        prepare_sft(records, tokenizer, max_length=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(prepare_sft(records, tokenizer, max_length=12)) == 3
        assert len(prepare_sft(records, tokenizer, max_length=None)) == 3


def test_pairs_count_the_longer_answer(tokenizer: Any) -> None:
    pair = {"prompt": "the sky is", "chosen": " blue", "rejected": " green grass is it"}
    (row,) = prepare_pairs([pair], tokenizer, max_length=8)
    assert row.length == 8 and row.num_scored == 2 + 5
    with pytest.raises(DataError, match="No row is left"):
        prepare_pairs([pair], tokenizer, max_length=7)


def test_groups_are_kept(tokenizer: Any) -> None:
    records = [{"text": "the sky", "who": who} for who in (7, "b", 7)]
    rows = prepare_sft(records, tokenizer, group_column="who")
    assert rows.groups == {"7": [0, 2], "b": [1]}
    with pytest.raises(ConfigError, match="group_column='annotator' is not among the columns text, who"):
        prepare_sft(records, tokenizer, group_column="annotator")
    with pytest.raises(DataError, match="1 record has no value in group_column='who': 1"):
        prepare_sft([{"text": "a", "who": 1}, {"text": "a"}], tokenizer, group_column="who")


def test_prompts_that_merge_with_their_answer_are_reported() -> None:
    pytest.importorskip("transformers")
    pairs = tiny_tokenizer(["blueberry blueberry blueberry"], vocab_size=300)
    with pytest.warns(VifamilyWarning, match="in 1 of 1 records the prompt alone ends in other tokens"):
        rows = prepare_sft([{"prompt": "a blue", "completion": "berry"}], pairs)
    assert rows.unaligned == 1
    assert pairs.decode(rows[0].prompt_ids + rows[0].completion_ids) == "a blueberry<|end|>"


BAD_SFT = {
    "preferences": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "train on them with DPO"),
    "no columns": ([{"question": "a", "answer": "b"}], "got answer, question"),
    "no completion": ([{"prompt": "a"}], "1 record has no column 'completion': 0"),
    "some incomplete": ([{"prompt": "a", "completion": "b"}] + 7 * [{"prompt": "a", "completion": None}],
                        r"7 records, each of which has no column 'completion': 1, 2, 3, 4, 5 and 2 more"),
    "blank": ([{"prompt": "a", "completion": "  "}], "has an empty completion: 0"),
    "no answer": ([{"messages": [user("hello")]}], "has no message of the assistant with text: 0"),
    "silent": ([{"messages": [user("hello"), assistant(" ")]}], "has no message of the assistant"),
    "user answers": ([{"prompt": [user("a")], "completion": [user("b")]}], "has an empty completion"),
    "no messages": ([{"messages": []}], "column 'messages' of record 0 must be a list of messages"),
    "text as messages": ([{"messages": "hello"}], "must be a list of messages"),
    "no role": ([{"messages": [{"content": "a"}]}], "must hold messages with role and content"),
    "no content": ([{"messages": [user("a"), {"role": "assistant"}]}], "a message of assistant without content"),
    "mixed": ([{"prompt": "a", "completion": [assistant("b")]}], "record 0 mixes texts with lists of messages"),
    "number": ([{"text": 3}], "has no text in column 'text'"),
    "bad tools": ([{"messages": [user("a"), assistant("b")], "tools": "{"}], "column 'tools' of record 0 is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SFT)
def test_bad_records_are_refused(tokenizer: Any, name: str) -> None:
    records, words = BAD_SFT[name]
    with pytest.raises(DataError, match=words):
        prepare_sft(records, tokenizer)


BAD_PAIRS = {
    "one answer": ([{"prompt": "a", "completion": "b"}], "are for supervised fine-tuning"),
    "the same twice": ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "the same answer as chosen and as rejected"),
    "empty": ([{"prompt": "a", "chosen": "b", "rejected": " "}], "has an empty answer"),
    "one holds the other": ([{"chosen": "a b", "rejected": "a b c"}], "has an empty answer"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_refused(tokenizer: Any, name: str) -> None:
    records, words = BAD_PAIRS[name]
    with pytest.raises(DataError, match=words):
        prepare_pairs(records, tokenizer)


def test_tokenizers_that_lack_something_are_refused(tokenizer: Any) -> None:
    texts, chats = [{"prompt": "say", "completion": " it"}], [{"messages": [user("say"), assistant("it")]}]
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ConfigError, match="no pad token.*tokenizer.pad_token = tokenizer.eos_token"):
        prepare_sft(texts, bare)
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        prepare_sft(texts, bare)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        prepare_sft(chats, bare)
    with pytest.raises(ConfigError, match="overlong must be one of drop, error, trim_prompt, got 'cut'"):
        prepare_sft(texts, tokenizer, overlong="cut")
    with pytest.raises(ConfigError, match="max_length must be"):
        prepare_sft(texts, tokenizer, max_length=1)


def test_template_that_rewrites_its_turns_is_refused(tokenizer: Any) -> None:
    forgetful = copy.deepcopy(tokenizer)  # shows the last message alone
    forgetful.chat_template = "{{ '<|' + messages[-1]['role'] + '|>' + messages[-1]['content'] + eos_token }}"
    chat = [user("say"), assistant("it"), user("say"), assistant("grass")]
    with pytest.raises(ConfigError, match="renders turn 1 of record 0 otherwise alone"):
        prepare_sft([{"messages": chat}], forgetful)


def test_batches_are_padded_on_the_right() -> None:
    batch = collate_pairs([PairRow((5,), (7, 2), (8, 9, 2)), PairRow((5, 6), (7,), (8,))], pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 7, 2, 1], [5, 6, 7, 1], [5, 8, 9, 2], [5, 6, 8, 1]]
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 1)
    assert batch["completion_mask"].sum(1).tolist() == [2, 1, 3, 1]
    with pytest.raises(DataError, match="at least one row"):
        collate_sft([], 0)
