"""Members that died are put beside live ones: who and when, what of them and of the optimiser, and in a resumed run."""

import math

import pytest
import torch

from tests.llm.conftest import LORA, quiet_trainer, spread_members, tiny_base
from vifamily.errors import CheckpointError, ConfigError, VifamilyWarning
from vifamily.llm._after_step import AfterStep
from vifamily.llm._reseeding import DeadMembers, reseed
from vifamily.llm.corpora import contradictory_sft
from vifamily.llm.data import prepare_sft
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.rows import collate_sft
from vifamily.llm.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def stack(members=3, vocab=37, dtype=torch.float64):
    peft = pytest.importorskip("peft")
    from vifamily.llm._stacked import StackedCausalLM

    config = peft.LoraConfig(**LORA, target_modules="all-linear")
    model = StackedCausalLM(tiny_base(dtype=dtype, vocab=vocab), config, members, seed=5)
    spread_members(model)
    return model


# --- who and when ---


def test_a_member_must_stay_dead_for_all_of_the_steps():
    dead = DeadMembers(EnsembleOptions(reseed_below=0.3, reseed_patience=3), 3)
    low, high = [0.95, 0.04, 0.01], [0.60, 0.30, 0.10]  # the threshold is a tenth
    assert [dead.after_step(u) for u in (low, low, high, low)] == [[]] * 4
    again = DeadMembers(EnsembleOptions(reseed_below=0.3, reseed_patience=3), 3)
    again.restore(dead.plain())
    for counter in (dead, again):
        # member 2 was at a tenth, which is not below it, so both have died for one step
        assert counter.after_step(low) == []
        assert counter.after_step(low) == [(1, 0), (2, 0)]
        assert counter.after_step(low) == []


def test_two_dead_members_go_to_two_that_explain_as_much():
    dead = DeadMembers(EnsembleOptions(reseed_below=0.1, reseed_patience=1), 4)
    assert dead.after_step([0.001, 0.45, 0.549, 0.0]) == [(0, 2), (3, 1)]


def test_off_unless_asked_for():
    dead = DeadMembers(EnsembleOptions(), 2)
    assert all(dead.after_step([1.0, 0.0]) == [] for _ in range(200))
    with pytest.raises(ConfigError, match="reseed_below"):
        EnsembleOptions(reseed_below=1.5)
    with pytest.raises(ConfigError, match="reseed_patience"):
        EnsembleOptions(reseed_patience=0)


# --- what ---


def test_a_reseeded_member_is_near_its_source_with_momentum_zero_and_half_of_the_weight():
    model = stack()
    model.log_weight.copy_(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log())
    optimiser = torch.optim.AdamW(model.adapter_parameters(), lr=1e-2)
    for _ in range(3):
        sum(p.square().sum() for p in model.adapter_parameters()).backward()
        optimiser.step()
        optimiser.zero_grad()
    before = [p.detach().clone() for p in model.adapter_parameters()]
    second = [optimiser.state[p]["exp_avg_sq"].clone() for p in model.adapter_parameters()]
    reseed(model, optimiser, 2, 0, noise=0.1, seed=3, step=7)
    far = near = 0.0
    for p, old, v in zip(model.adapter_parameters(), before, second, strict=True):
        assert torch.equal(p[:2], old[:2])
        near += float((p[2] - p[0]).detach().square().sum())
        far += float(0.01 * old[0].square().sum())
        state = optimiser.state[p]
        assert not state["exp_avg"][2].any() and state["exp_avg"][:2].any()
        assert torch.equal(state["exp_avg_sq"][2], v[0]) and torch.equal(state["exp_avg_sq"][:2], v[:2])
    # the noise has a tenth of the root mean square: chi-square with so many coordinates, at five standard errors
    count = sum(p[0].numel() for p in before)
    assert near / far == pytest.approx(1.0, abs=5 * math.sqrt(2 / count) * 2)
    assert model.log_weight.exp().tolist() == pytest.approx([0.4, 0.2, 0.4])
    # the same step gives the same noise, another step another one
    kept = [p.detach()[2].clone() for p in model.adapter_parameters()]
    reseed(model, optimiser, 2, 0, noise=0.1, seed=3, step=7)
    assert all(torch.equal(p[2], k) for p, k in zip(model.adapter_parameters(), kept, strict=True))
    reseed(model, optimiser, 2, 0, noise=0.1, seed=3, step=8)
    assert not torch.equal(next(iter(model.adapter_parameters()))[2], kept[0])


def test_a_damaged_state_is_refused():
    after = AfterStep(EnsembleOptions(), 2, 0)
    after.restore(None)
    for state in ([1], {"alpha": None}, {"alpha": None, "dead": {"steps": ["x"], "told": []}, "reseeded": 0}):
        with pytest.raises(CheckpointError, match="state of routing"):
            after.restore(state)


# --- in a run ---


def worsen(model, batch):
    """Take a member up the slope of its loss, from where it cannot come back in a few small steps."""
    for _ in range(8):
        loss = -model.row_log_prob(**batch)[2].mean()
        gradients = torch.autograd.grad(loss, list(model.adapter_parameters()))
        with torch.no_grad():
            for p, g in zip(model.adapter_parameters(), gradients, strict=True):
                p[2] += 2 * g[2] / g[2].norm().clamp_min(1e-9)


def run(folder, steps, tokenizer, corpus, resume=None, **options):
    model = stack(3, len(tokenizer), torch.float32)
    worsen(model, collate_sft(prepare_sft(list(corpus), tokenizer).rows, 0))
    trainer = quiet_trainer(
        model, folder, corpus, tokenizer, EnsembleOptions(1.0, micro_batch_rows=100, **options), stop=steps,
        max_steps=8, per_device_train_batch_size=18, learning_rate=1e-3, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.filterwarnings("ignore:members .2. explain less")
def test_a_dead_member_lives_again_and_resuming_is_exact(tmp_path):
    corpus = contradictory_sft(12, 6, torch.Generator().manual_seed(0), length=3)
    tokenizer = tiny_tokenizer(corpus.texts, kind="word", vocab_size=64)
    options = {"reseed_below": 0.1, "reseed_patience": 5}
    with pytest.warns(VifamilyWarning, match="member 2 explained less .* at step 5 it was put beside"):
        whole = run(tmp_path / "whole", 8, tokenizer, corpus, **options)
    usage = [e["routing/usage_2"] for e in whole.state.log_history if "loss" in e]
    assert max(usage[:5]) < 0.1 / 3 and min(usage[5:]) > 0.1
    assert [e["routing/reseeded"] for e in whole.state.log_history if "loss" in e][3:6] == [0.0, 1.0, 1.0]
    # cut off at step 4, a step before patience ends: the count is in the checkpoint
    run(tmp_path / "cut", 4, tokenizer, corpus, **options)
    with pytest.warns(VifamilyWarning, match="at step 5 it was put beside"):
        again = run(tmp_path / "cut", 8, tokenizer, corpus, resume=True, **options)
    pairs = zip(again._ensemble.adapter_parameters(), whole._ensemble.adapter_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(again._ensemble.log_weight, whole._ensemble.log_weight)
