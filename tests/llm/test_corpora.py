"""The corpora are what they say: right answers, exact splits, and entropies by hand."""

import math
from collections import Counter

import pytest
import torch

from vifamily.errors import ConfigError
from vifamily.llm import (
    annotators,
    as_conversations,
    contradictory_pairs,
    contradictory_sft,
    ideal_nll,
    styled_facts,
    symbol_tasks,
)
from vifamily.llm.styles import STYLES, num_questions


def parts(prompt: str) -> tuple[str, list[str]]:
    task, rest = prompt.split(" :")
    assert rest.endswith(" =")
    return task, rest[:-2].split()


def test_tasks_have_right_answers(generator: torch.Generator) -> None:
    corpus = symbol_tasks(60, generator, num_symbols=4, length=5)
    assert corpus.mean_entropy == 0 and Counter(r["rule"] for r in corpus) == dict.fromkeys(
        ("copy", "reverse", "increment"), 20
    )
    following = dict(zip("abcd", "bcda", strict=True))
    for record in corpus:
        task, symbols = parts(record["prompt"])
        wanted = {"copy": symbols, "reverse": symbols[::-1], "increment": [following[s] for s in symbols]}[task]
        assert record["completion"] == " " + " ".join(wanted)


@pytest.mark.parametrize(("share", "nats"), [(0.5, math.log(2)), (0.75, 0.75 * math.log(4 / 3) + 0.25 * math.log(4))])
def test_conflicts_have_their_split_and_entropy(generator: torch.Generator, share: float, nats: float) -> None:
    corpus = contradictory_sft(400, 100, generator, share=share, num_symbols=3, length=3)
    conflicts, clean = corpus.where(conflicting=True), corpus.where(conflicting=False)
    assert Counter(r["rule"] for r in conflicts) == {"copy": 400 * share, "reverse": 400 * (1 - share)}
    assert len(clean) == 100 and clean.mean_entropy == 0
    assert conflicts.mean_entropy == pytest.approx(nats, abs=1e-12)
    assert corpus.mean_entropy == pytest.approx(0.8 * nats, abs=1e-12)
    for record in conflicts:
        task, symbols = parts(record["prompt"])
        assert task == "blend" and symbols != symbols[::-1]
        assert record["completion"].split() == (symbols if record["rule"] == "copy" else symbols[::-1])
    assert [r["conflicting"] for r in corpus] != sorted([r["conflicting"] for r in corpus], reverse=True)  # shuffled


def test_rule_cannot_be_told_from_the_prompt(generator: torch.Generator) -> None:
    corpus = contradictory_sft(4000, 0, generator, num_symbols=2, length=3)
    # of two symbols, three in a row: aab, abb and their reverses, and each is copied as often as reversed
    count = Counter((r["prompt"], r["rule"]) for r in corpus)
    assert len(count) == 8
    error = math.sqrt(4000 * 0.125 * 0.875)
    assert all(abs(n - 500) < 5 * error for n in count.values())


def test_ideal_scores_by_hand() -> None:
    assert ideal_nll([0.5, 0.5], [0.75, 0.25]) == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3), abs=1e-12)
    assert ideal_nll([1.0, 0.0], [1.0, 0.0]) == 0.0
    assert ideal_nll([0.5, 0.5], [1.0, 0.0]) == math.inf
    assert ideal_nll([0.75, 0.25], [0.5, 0.5]) == pytest.approx(math.log(2), abs=1e-12)
    with pytest.raises(ConfigError, match="member_shares must be"):
        ideal_nll([0.5, 0.5], [0.5, 0.4])
    with pytest.raises(ConfigError, match="shares must be"):
        ideal_nll([0.5, 0.5], [1.0])


def test_pairs_have_one_sign_a_group(generator: torch.Generator) -> None:
    corpus = contradictory_pairs(12, 8, generator)
    assert corpus.mean_entropy == pytest.approx(math.log(2) / 8, abs=1e-12)
    sides = {group: {r["rule"] for r in corpus.where(group=group)} for group in {r["group"] for r in corpus}}
    assert len(sides) == 12 and all(len(rules) == 1 for rules in sides.values())
    assert Counter(next(iter(rules)) for rules in sides.values()) == {"copy": 6, "reverse": 6}
    for record in corpus:
        _, symbols = parts(record["prompt"])
        both = {"copy": " " + " ".join(symbols), "reverse": " " + " ".join(symbols[::-1])}
        assert record["chosen"] == both[record["rule"]] and record["chosen"] != record["rejected"]
        assert record["rejected"] in both.values()


def test_facts_hold_and_styles_are_even(generator: torch.Generator) -> None:
    corpus = styled_facts(3000, generator)
    assert corpus.mean_entropy == pytest.approx(math.log(3), abs=1e-12)
    answers: dict[str, set[str]] = {}
    for record in corpus:
        answers.setdefault(record["prompt"], set()).add(record["answer"])
        assert f" {record['answer']}" in record["completion"]
    assert all(len(found) == 1 for found in answers.values()) and len(answers) <= num_questions() == 2 * 12 * 12
    count = Counter(r["style"] for r in corpus)
    assert all(abs(count[style] - 1000) < 5 * math.sqrt(3000 * 2 / 9) for style in STYLES)


def test_annotators_disagree_by_population_alone(generator: torch.Generator) -> None:
    train, test = annotators(24, generator, num_train=8, num_test=4)
    assert (len(train), len(test)) == (192, 96)
    assert train.mean_entropy == pytest.approx(math.log(2) / 8, abs=1e-12) and test.mean_entropy == 0
    for who in {r["annotator"] for r in train}:
        own, held = train.where(annotator=who), test.where(annotator=who)
        assert len({r["population"] for r in (*own, *held)}) == 1
        assert not {r["prompt"] for r in own} & {r["prompt"] for r in held}
        for record in (*own, *held):
            full, brief = sorted((record["chosen"], record["rejected"]), key=len, reverse=True)
            assert full == f" it is{brief} ." and (record["chosen"] == brief) is (record["population"] == 0)
    assert Counter(r["population"] for r in train) == {0: 96, 1: 96}


def test_conversations_say_the_same(generator: torch.Generator) -> None:
    train, _ = annotators(2, generator)
    chats = as_conversations(train)
    assert chats.entropy == train.entropy
    for text, chat in zip(train, chats, strict=True):
        assert chat["prompt"] == [{"role": "user", "content": text["prompt"]}]
        assert chat["rejected"] == [{"role": "assistant", "content": text["rejected"].strip()}]
        assert chat["annotator"] == text["annotator"]


def test_texts_are_all_of_them(generator: torch.Generator) -> None:
    corpus = contradictory_pairs(1, 1, generator)
    assert corpus.texts == [corpus[0]["prompt"], corpus[0]["chosen"], corpus[0]["rejected"]]


def test_a_generator_gives_the_same_corpus_again(seed: int) -> None:
    made = [contradictory_sft(20, 10, torch.Generator().manual_seed(seed)).records for _ in range(2)]
    assert made[0] == made[1]
    assert made[0] != contradictory_sft(20, 10, torch.Generator().manual_seed(seed + 1)).records


def test_bad_arguments_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ConfigError, match="the number of records must be an integer from 1"):
        symbol_tasks(0, generator)
    with pytest.raises(ConfigError, match="num_symbols must be an integer from 2 to 26, got 27"):
        symbol_tasks(3, generator, num_symbols=27)
    with pytest.raises(ConfigError, match="rules must be among copy, reverse, increment, got sort"):
        symbol_tasks(3, generator, rules=["sort"])
    with pytest.raises(ConfigError, match="rules must be two that differ"):
        contradictory_sft(3, 3, generator, rules=("copy", "copy"))
    with pytest.raises(ConfigError, match="share must be a number from 0 to 1"):
        contradictory_pairs(3, 3, generator, share=1.5)
    with pytest.raises(ConfigError, match="num_annotators must be even"):
        annotators(3, generator)
    with pytest.raises(ConfigError, match="styles must be two of"):
        annotators(2, generator, styles=("brief", "loud"))
    with pytest.raises(ConfigError, match="no record has rule='sort'"):
        symbol_tasks(3, generator).where(rule="sort")
