r"""Made-up facts told in three styles, and annotators who disagree on style: corpora of known entropy.

Questions are drawn evenly and so are styles, so a document has :math:`\ln N + \ln 3` nats for N questions, and an
answer given its question has :math:`\ln 3`.
"""

from __future__ import annotations

import math

import torch

from vifamily.errors import ConfigError
from vifamily.llm.corpora import Corpus, Record

__all__ = ["STYLES", "annotators", "num_questions", "styled_facts"]

STYLES = ("brief", "full", "warm")
"""How an answer is worded."""

_KINDS = ("old", "new", "big", "small", "fast", "slow", "dry", "wet", "warm", "cold", "soft", "loud")
_THINGS = ("boat", "lamp", "door", "cup", "hat", "coat", "bell", "drum", "kite", "sled", "tent", "cart")
_COLOURS = ("red", "blue", "green", "black", "white", "grey", "pink", "brown", "gold", "teal", "plum", "lime")
_PLACES = ("barn", "shed", "yard", "hall", "port", "mill", "tower", "cave", "park", "loft", "dock", "inn")


def _facts() -> list[tuple[str, str]]:
    out = []
    for i, kind in enumerate(_KINDS):
        for j, thing in enumerate(_THINGS):
            # a table that neither word alone tells, and that is the same everywhere
            out.append((f"what colour is the {kind} {thing} ?", _COLOURS[(5 * i + 7 * j) % 12]))
            out.append((f"where is the {kind} {thing} ?", _PLACES[(7 * i + 5 * j + 3) % 12]))
    return out


def num_questions() -> int:
    """Number N of questions.

    Example:
        >>> num_questions()
        288
    """
    return len(_facts())


def _styled(style: str, answer: str) -> str:
    return {"brief": f" {answer}", "full": f" it is {answer} .", "warm": f" of course , {answer} !"}[style]


def styled_facts(num_records: int, generator: torch.Generator) -> Corpus:
    """Questions with their answer in a style drawn evenly: ``ln 3`` nats an answer.

    Args:
        num_records: Number of records.
        generator: Source of the questions and of the styles.

    Returns:
        Records with ``prompt``, ``completion``, ``style`` and ``answer``.

    Raises:
        ConfigError: If the number is not positive.

    Example:
        >>> styled_facts(1, torch.Generator().manual_seed(1))[0]["prompt"]
        'where is the cold bell ?'
    """
    _check("num_records", num_records)
    facts = _facts()
    which = torch.randint(len(facts), (num_records,), generator=generator, device=generator.device).tolist()
    how = torch.randint(len(STYLES), (num_records,), generator=generator, device=generator.device).tolist()
    records = []
    for fact, style in zip(which, how, strict=True):
        question, answer = facts[fact]
        records.append(
            {"prompt": question, "completion": _styled(STYLES[style], answer), "style": STYLES[style], "answer": answer}
        )
    return Corpus(tuple(records), (math.log(len(STYLES)),) * num_records)


def annotators(
    num_annotators: int,
    generator: torch.Generator,
    *,
    num_train: int = 8,
    num_test: int = 4,
    styles: tuple[str, str] = ("brief", "full"),
) -> tuple[Corpus, Corpus]:
    r"""Two populations of annotators with opposite preferences of style, half of the annotators each.

    One model for all predicts a preference with probability one half at best, 0.693 nats a pair. Told apart by their
    training pairs, annotators are predicted without error: the test pairs then hold no entropy, and the training pairs
    :math:`\ln 2` for each annotator.

    Args:
        num_annotators: An even number.
        generator: Source of the questions, and of who belongs where.
        num_train: Training pairs of each annotator.
        num_test: Held-out pairs of each, on other questions.
        styles: The style that the first population prefers, and the other.

    Returns:
        Training and held-out pairs: ``prompt``, ``chosen``, ``rejected``, ``annotator`` and ``population`` (0 or 1).
        The entropy of held-out pairs is that given the annotator's population.

    Raises:
        ConfigError: If a number or a style cannot be used.

    Example:
        >>> train, test = annotators(24, torch.Generator().manual_seed(0))
        >>> len(train), len(test), round(train.mean_entropy, 4), test.mean_entropy
        (192, 96, 0.0866, 0.0)
    """
    for name, value in (("num_annotators", num_annotators), ("num_train", num_train), ("num_test", num_test)):
        _check(name, value)
    facts = _facts()
    if num_annotators % 2 or num_train + num_test > len(facts):
        raise ConfigError(
            f"num_annotators must be even and num_train + num_test at most {len(facts)}, got {num_annotators} and "
            f"{num_train + num_test}."
        )
    if styles[0] == styles[1] or not set(styles) <= set(STYLES):
        raise ConfigError(f"styles must be two of {', '.join(STYLES)}, got {', '.join(styles)}.")
    sides = torch.randperm(num_annotators, generator=generator, device=generator.device).tolist()
    train: list[Record] = []
    test: list[Record] = []
    for who, rank in enumerate(sides):
        liked, other = (styles[0], styles[1]) if rank < num_annotators // 2 else (styles[1], styles[0])
        asked = torch.randperm(len(facts), generator=generator, device=generator.device).tolist()
        for number, fact in enumerate(asked[: num_train + num_test]):
            question, answer = facts[fact]
            record = {
                "prompt": question,
                "chosen": _styled(liked, answer),
                "rejected": _styled(other, answer),
                "annotator": f"annotator {who}",
                "population": int(liked != styles[0]),
            }
            (train if number < num_train else test).append(record)
    nats = math.log(2) / num_train
    return Corpus(tuple(train), (nats,) * len(train)), Corpus(tuple(test), (0.0,) * len(test))


def _check(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
