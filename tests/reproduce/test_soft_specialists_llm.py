"""The reproduction of Soft Specialists on language models: its rules on known figures, and a short run."""

import dataclasses

import pytest
import torch

from vifamily.diagnostics.routing import responsibilities
from vifamily.reproduce import Options

pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm import specialists as lab  # noqa: E402
from vifamily.reproduce import soft_specialists_llm as paper  # noqa: E402
from vifamily.reproduce._soft_specialists_baselines import (  # noqa: E402
    INDEPENDENT,
    SOFT,
    Baseline,
    baseline_claims,
    compare,
)

ROUTED = responsibilities(torch.zeros(2, 3), torch.zeros(2), 1.0)


def figures(alpha, route, mixture=0.7, torn=0.6, clean=0.001):
    return 0, lab.Specialisation(alpha, mixture, 20.0, 0.01, route, torn, clean, 0.693, ((1.0, 0.0),), ROUTED)


def test_the_transition_lies_between_shared_and_apart():
    found = [figures(0.0, 0.0), figures(0.02, 0.0), figures(0.04, 0.95), figures(0.8, 1.0)]
    assert paper.transition(found) == pytest.approx(0.0008**0.5)
    assert paper.transition([found[1], found[3]]) is None
    assert paper.transition(found[:2]) is None
    star = dataclasses.make_dataclass("S", ["alpha_star", "sweep"])
    assert paper._threshold_claim(found, star(0.03, ((1e-3, 0.03),))).holds is True
    assert paper._threshold_claim(found, star(0.06, ((1e-3, 0.06),))).holds is False
    assert paper._threshold_claim(found[:2], star(0.05, ())).holds is None


def test_claims_on_answers_follow_their_rules():
    good = [figures(0.03, 0.01), figures(0.8, 1.0)]
    assert [c.holds for c in paper._answer_claims(good)] == [True] * 4
    bad = [figures(0.03, 0.5), figures(0.8, 1.0, mixture=0.9, torn=0.1, clean=0.2)]
    assert [c.holds for c in paper._answer_claims(bad)] == [False] * 4


def test_claims_on_preferences_follow_the_table():
    def pair(size, alpha, route, accuracy=1.0):
        return lab.PairFigures(alpha, size, 0.1, route, (1.0, -1.0), accuracy)

    claims = paper._pair_claims([pair(1, 0.8, 0.0), pair(8, 0.05, 0.0), pair(8, 0.8, 0.99)])
    assert [c.holds for c in claims] == [True] * 4
    claims = paper._pair_claims([pair(1, 0.8, 0.5), pair(8, 0.8, 0.2, accuracy=0.5)])
    assert [c.holds for c in claims] == [False] * 3


def test_claims_on_baselines_follow_their_rules():
    def one(name, mixture, torn):
        return Baseline(name, mixture, 0.1, torn, 0.0, 0.9, 0.9, 0.05)

    soft, near = one(SOFT, 0.7, 0.6), one("single adapter", 1.6, 0.31)
    assert [c.holds for c in baseline_claims([one(INDEPENDENT, 5.0, 0.1), soft])] == [True, True]
    assert [c.holds for c in baseline_claims([near, one(INDEPENDENT, 5.0, 0.1), soft])] == [False, False]


def test_the_comparison_agrees_with_the_measures_of_specialists():
    base = lab.symbol_base(steps=40, hidden_size=16, length=2, say=lambda line: None)
    held = lab.conflict(12, 8, length=2)
    model = base.ensemble(3, 2, 0)
    fresh = compare("fresh", model, base, held)
    assert fresh.conflicting_information == pytest.approx(0.0, abs=1e-9)  # members that are one
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in model.adapters():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=source))
    found, expected = compare("spread", model, base, held), lab.measure(model, base, held, 0.8)
    for name in ("mixture_nll", "clean_nll", "conflicting_information", "clean_information"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6)
    assert 0 <= found.auroc_epistemic <= 1 and 0 < found.ece < 1


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_short_run_has_every_claim_and_figure(monkeypatch):
    made = lab.symbol_base(steps=40, hidden_size=16, length=2, say=lambda line: None)
    monkeypatch.setattr(lab, "symbol_base", lambda **_: made)
    answers, pairs, train = lab.conflict, lab.preferences, lab.train
    monkeypatch.setattr(lab, "conflict", lambda *_, **more: answers(24, 12, length=2, **more))
    monkeypatch.setattr(lab, "preferences", lambda groups, size, **more: pairs(4, size, length=2, **more))
    monkeypatch.setattr(
        lab, "train", lambda base, corpus, s: train(base, corpus, dataclasses.replace(s, steps=2, batch_size=4))
    )
    critical = lab.critical_alpha
    monkeypatch.setattr(lab, "critical_alpha", lambda base, corpus, settings: critical(base, corpus, settings, units=6))
    found = paper.run(Options(quick=True, say=lambda line: None))
    assert len(found.claims) == 11
    assert set(found.figures) == {"transition", "routing"}
    assert set(found.tables) == {"answers", "preferences", "baselines", "damping"}
    names = [row["name"] for row in found.tables["baselines"]]
    assert len(names) == 6 and names[-2:] == [INDEPENDENT, SOFT]
    assert found.plain_rows() and paper.PAPER.source.startswith("arXiv")
