"""The small experiments: their measures on ensembles whose answers are known, and their outcome in a slow test."""

import math

import pytest
import torch

from vifamily.llm.corpora import Corpus

pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm import specialists as lab  # noqa: E402
from vifamily.llm.data import prepare_sft  # noqa: E402
from vifamily.llm.tiny import greedy_answers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def base():
    return lab.symbol_base(steps=60, hidden_size=16, length=2, say=lambda line: None)


def test_the_base_is_scored_as_it_answers(base):
    records = list(lab.conflict(4, 20, length=2))
    rows = prepare_sft(records, base.tokenizer)
    answered = [a == r.completion_ids for a, r in zip(greedy_answers(base.model, rows), rows, strict=True)]
    exact = lab._exact(base.ensemble(2, 1, 0), rows, int(base.tokenizer.pad_token_id))
    assert exact.tolist() == [answered, answered]


def test_measures_of_a_fresh_ensemble_are_those_of_the_base(base):
    held = lab.conflict(20, 10, length=2)
    found = lab.measure(base.ensemble(3, 2, 0), base, held, 0.8)
    assert found.mixture_nll == pytest.approx(found.member_nll, rel=1e-6)
    assert found.route_information == pytest.approx(0.0, abs=1e-9)
    assert found.conflicting_information == pytest.approx(0.0, abs=1e-9)
    assert len(found.exact) == 3 and found.plain()["alpha"] == 0.8
    pairs = lab.preferences(4, 3, length=2)
    even = lab.measure_pairs(base.ensemble(3, 2, 0), base, pairs, lab.Settings(0.8))
    assert even.mixture_nll == pytest.approx(math.log(2), rel=1e-6)
    assert even.margins == pytest.approx((0.0, 0.0, 0.0), abs=1e-5)


def test_short_training_moves_members_and_leaves_the_base(base):
    before = base.model.model.layers[0].self_attn.q_proj.weight.clone()
    for corpus, unit in ((lab.conflict(16, 8, length=2), "sequence"), (lab.preferences(8, 2, length=2), "group")):
        model = lab.train(base, corpus, lab.Settings(0.8, steps=2, batch_size=4, unit=unit, ramp=1, warmup=1))
        assert all(float(layer.lora_B.detach().abs().max()) > 0 for _, layer in model.adapters())
    assert torch.equal(base.model.model.layers[0].self_attn.q_proj.weight, before)


def test_the_critical_alpha_is_found_in_a_short_run(base):
    found = lab.critical_alpha(base, lab.conflict(24, 8, length=2), lab.Settings(0.8, steps=3), units=12)
    assert 0 < found.alpha_star < math.inf
    assert len(found.sweep) == 4


@pytest.mark.slow
def test_members_specialise_on_what_contradicts_and_agree_on_the_rest():
    base = lab.symbol_base(say=lambda line: None)
    held = lab.conflict(200, 100, seed=1)
    assert isinstance(held, Corpus)
    found = lab.measure(lab.train(base, lab.conflict(), lab.Settings(0.8, ramp=200)), base, held, 0.8)
    assert found.mixture_nll < found.ideal + 0.1
    assert found.conflicting_information > 0.4
    assert found.clean_information < 0.01
    assert found.route_information > 0.9
