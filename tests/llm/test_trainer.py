"""Training of ensembles: TRL's losses with one member, equal steps by every route, resuming, and clear refusals."""

import json
import math
import shutil

import pytest
import torch

from tests.llm.conftest import LORA, arguments, quiet_trainer, spread_members, tiny_base
from vifamily.errors import CheckpointError, ConfigError, NonFiniteLossError, VifamilyWarning
from vifamily.llm.corpora import contradictory_pairs, contradictory_sft
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.tiny import tiny_tokenizer
from vifamily.rng import scoped

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm._stacked import StackedCausalLM  # noqa: E402
from vifamily.llm.trainer import SFTEnsembleTrainer, last_checkpoint  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def corpora():
    source = torch.Generator().manual_seed(0)
    rows, pairs = contradictory_sft(8, 4, source), contradictory_pairs(3, 4, source)
    return [{**row, "group": f"group {i % 3}"} for i, row in enumerate(rows)], list(pairs)


@pytest.fixture(scope="module")
def tokenizer(corpora):
    texts = [r[c] for part in corpora for r in part for c in ("prompt", "completion", "chosen") if c in r]
    return tiny_tokenizer(texts, kind="word", vocab_size=64)


def ensemble(tokenizer, members=3, seed=5, spread=True, kind="llama"):
    base = tiny_base(kind, dtype=torch.float32, vocab=len(tokenizer))
    model = StackedCausalLM(base, peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]), members, seed=seed)
    if spread:
        spread_members(model)
    return model


def trainer_for(kind, folder, tokenizer, corpora, options=None, members=3, model=None, **more):
    return quiet_trainer(
        model or ensemble(tokenizer, members), folder, corpora[0] if kind == "sft" else corpora[1], tokenizer,
        EnsembleOptions(**(options or {})), preferences=kind == "dpo",
        **{"per_device_train_batch_size": 4, "max_steps": 4, **more},
    )  # fmt: skip


def first_batch(trainer, rows=4):
    data = [trainer.train_dataset[i] for i in range(rows)]
    return trainer.data_collator(data)


def gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(batch), trainer._get_num_items_in_batch([batch], "cpu"))
    return loss, [p.grad.clone() for p in trainer._ensemble.adapter_parameters()]


def assert_close(found, expected, tolerance=2e-5):
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().max()) <= tolerance * max(1e-3, float(y.abs().max()))


# --- one member is TRL ---


def theirs(kind, folder, tokenizer, corpora, model):
    trl = pytest.importorskip("trl")
    base = tiny_base(dtype=torch.float32, vocab=len(tokenizer))
    maker, config = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[kind]
    columns = ("prompt", "completion") if kind == "sft" else ("prompt", "chosen", "rejected")
    datasets = pytest.importorskip("datasets")
    records = [{c: r[c] for c in columns} for r in (corpora[0] if kind == "sft" else corpora[1])]
    trainer = maker(
        base,
        args=config(
            output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    for name, layer in model.adapters():
        their = trainer.model.base_model.model.get_submodule(name)
        their.lora_A["default"].weight.data.copy_(layer.lora_A[0])
        their.lora_B["default"].weight.data.copy_(layer.lora_B[0])
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    return float(trainer.compute_loss(trainer.model, dict(batch)).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_one_member_has_the_loss_of_trl(kind, tmp_path, tokenizer, corpora):
    model = ensemble(tokenizer, 1)
    with scoped(0):
        expected = theirs(kind, tmp_path / "theirs", tokenizer, corpora, model)
    for alpha in (0.0, 0.3, 1.0):
        trainer = trainer_for(kind, tmp_path, tokenizer, corpora, {"renyi_alpha": alpha}, model=model)
        found = float(trainer.compute_loss(model, first_batch(trainer)).detach())
        assert found == pytest.approx(expected, abs=1e-6)


# --- every route, micro-batch and accumulation ---


GROUPS = {"unit": "group", "group_column": "group"}


@pytest.mark.parametrize("unit", ["token", "sequence", "normalised"])
def test_routes_agree_for_sft(unit, tmp_path, tokenizer, corpora):
    expected = None
    for more in ({"micro_batch_rows": 4}, {}, {"micro_batch_rows": 3}, {"route": "two_pass"}):
        trainer = trainer_for("sft", tmp_path, tokenizer, corpora, {"unit": unit, **more})
        loss, found = gradients(trainer, first_batch(trainer))
        whole = float(trainer.compute_loss(trainer.model, first_batch(trainer)).detach())
        assert float(loss) == pytest.approx(whole, rel=1e-5)
        expected = expected or found
        assert_close(found, expected)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_groups_stay_whole_by_every_route(kind, tmp_path, tokenizer, corpora):
    expected = None
    for more in ({"micro_batch_rows": 12}, {"route": "stacked"}, {}, {"route": "two_pass"}):
        trainer = trainer_for(kind, tmp_path, tokenizer, corpora, {**GROUPS, **more})
        assert len(trainer.train_dataset) == 3
        batch = first_batch(trainer, 3)
        loss, found = gradients(trainer, batch)
        assert float(loss) == pytest.approx(float(trainer.compute_loss(trainer.model, batch).detach()), rel=1e-5)
        expected = expected or found
        assert_close(found, expected)


def test_dpo_routes_agree_and_reference_columns_are_used(tmp_path, tokenizer, corpora):
    trainer = trainer_for("dpo", tmp_path, tokenizer, corpora)
    batch = first_batch(trainer)
    loss, expected = gradients(trainer, batch)
    model = trainer.model
    values = model.row_log_prob(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], adapters=False
    ).detach()[0]
    for more in ({"route": "two_pass"}, {"micro_batch_rows": 4}):
        other = trainer_for("dpo", tmp_path, tokenizer, corpora, more)
        assert_close(gradients(other, batch)[1], expected)
    records = [
        {**r, "ref_chosen_logps": float(c), "ref_rejected_logps": float(d)}
        for r, c, d in zip(list(corpora[1])[:4], values[:4], values[4:], strict=True)
    ]
    known = trainer_for("dpo", tmp_path, tokenizer, (corpora[0], records))
    again = first_batch(known)
    assert "reference_log_prob" in again
    found, same = gradients(known, again)
    assert float(found) == pytest.approx(float(loss), abs=1e-6)
    assert_close(same, expected)


def test_accumulated_steps_are_one_step(tmp_path, tokenizer, corpora):
    trained = []
    for rows, steps in ((12, 1), (4, 3)):
        trainer = trainer_for(
            "sft", tmp_path, tokenizer, corpora, {"prior_weight": 1e-3, "learn_weights": True}, max_steps=1,
            per_device_train_batch_size=rows, gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        trained.append([*trainer._ensemble.adapter_parameters(), trainer._ensemble.log_weight])
    assert_close([p.detach() for p in trained[1]], [p.detach() for p in trained[0]], 1e-5)


def test_gradient_checkpointing_of_the_trainer_changes_nothing(tmp_path, tokenizer, corpora):
    trained = []
    for more in ({}, {"activation_checkpointing": True}):
        trainer = trainer_for("dpo", tmp_path, tokenizer, corpora, max_steps=2, optim="sgd", **more)
        trainer.train()
        trained.append([p.detach() for p in trainer._ensemble.adapter_parameters()])
        assert trainer._ensemble.base.is_activation_checkpointing is bool(more)
    assert_close(*trained, 1e-6)


# --- behaviour ---


def test_members_are_clipped_one_by_one(tmp_path, tokenizer, corpora):
    trainer = trainer_for("sft", tmp_path, tokenizer, corpora, max_grad_norm=0.5)
    model = trainer._ensemble
    for p in model.adapter_parameters():
        p.grad = torch.ones_like(p)
        p.grad[1] *= 1e-6
    trainer._clip_grad_norm(model)
    norms = torch.stack([p.grad.flatten(1).square().sum(1) for p in model.adapter_parameters()]).sum(0).sqrt()
    assert norms[[0, 2]].tolist() == pytest.approx([0.5, 0.5], rel=1e-4)
    assert float(norms[1]) < 1e-3


def test_weights_follow_responsibilities_and_alpha_its_ramp(tmp_path, tokenizer, corpora):
    options = {
        "learn_weights": True, "weight_rate": 0.5, "renyi_alpha_start": 0.1, "renyi_alpha_warmup_steps": 2,
    }  # fmt: skip
    trainer = trainer_for("sft", tmp_path, tokenizer, corpora, options, eval_strategy="no")
    before = trainer._ensemble.log_weight.exp().clone()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [round(entry["renyi_alpha"], 4) for entry in logs][-1] == 0.8
    usage = [[entry[f"routing/usage_{k}"] for k in range(3)] for entry in logs]
    assert all(sum(u) == pytest.approx(1.0) for u in usage)
    weight = before
    for u in usage:
        weight = 0.5 * weight + 0.5 * torch.tensor(u, dtype=torch.float64)
    assert torch.allclose(trainer._ensemble.log_weight.exp(), weight, atol=1e-6)
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["routed_fit"] + entry["routing_cost"], abs=1e-4)
        assert entry["mixture_nll"] <= entry["member_nll"] + 1e-6


def test_dead_members_are_told_once(tmp_path, tokenizer, corpora):
    trainer = trainer_for("sft", tmp_path, tokenizer, corpora, {"renyi_alpha": 1.0}, learning_rate=0.0)
    with torch.no_grad():
        for _, layer in trainer._ensemble.adapters():
            layer.lora_B[2] *= 40.0
    with pytest.warns(VifamilyWarning, match=r"members \[2\]") as told:
        trainer.train()
    assert len([w for w in told if "dying" in str(w.message)]) == 1


def test_evaluation_reports_the_mixture(tmp_path, tokenizer, corpora):
    trainer = trainer_for("dpo", tmp_path, tokenizer, corpora)
    state = torch.get_rng_state()
    found = trainer.evaluate(list(corpora[1])[:6])
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("loss", "mixture_nll", "member_nll", "rewards/accuracies", "rewards/margins", "routing/entropy"):
        assert math.isfinite(found[f"eval_{key}"])
    assert found["eval_loss"] >= found["eval_mixture_nll"] - 1e-6  # the loss falls in alpha


# --- checkpoints ---


def trained_to(folder, tokenizer, corpora, steps, resume=None, **more):
    trainer = trainer_for(
        "sft", folder, tokenizer, corpora, {"learn_weights": True, "renyi_alpha_start": 0.1,
        "renyi_alpha_warmup_steps": 5}, max_steps=6, save_strategy="steps", save_steps=2, stop=steps, **more,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def values(trainer):
    model = trainer._ensemble
    return [*(p.detach() for p in model.adapter_parameters()), model.log_weight]


def test_resuming_is_exact_to_the_bit(tmp_path, tokenizer, corpora):
    whole = trained_to(tmp_path / "whole", tokenizer, corpora, 6)
    trained_to(tmp_path / "cut", tokenizer, corpora, 4)
    # a run that was killed while it wrote leaves a checkpoint that is passed over
    half = tmp_path / "cut" / "checkpoint-5"
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", half)
    (half / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-4"
    resumed = trained_to(tmp_path / "cut", tokenizer, corpora, 6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(values(resumed), values(whole), strict=True))
    assert resumed.state.global_step == 6
    saved = tmp_path / "whole" / "checkpoint-6"
    assert {"member_0", "member_1", "member_2", "ensemble.json"} <= {p.name for p in saved.iterdir()}
    training = json.loads((saved / "ensemble.json").read_text())["training"]
    assert (training["objective"], training["unit"], training["step"]) == ("sft", "sequence", 6)
    with pytest.raises(CheckpointError, match="half-written"):
        trained_to(tmp_path / "cut", tokenizer, corpora, 6, resume=str(half))
    other = trainer_for("sft", tmp_path / "whole", tokenizer, corpora, max_steps=8)
    other._ensemble.base.lm_head.weight.data.add_(1.0)
    with pytest.raises(CheckpointError, match="another base"):
        other.train(resume_from_checkpoint=True)


def test_checkpoints_hold_no_pickle(tmp_path, tokenizer, corpora):
    trained_to(tmp_path, tokenizer, corpora, 2)
    names = {p.name for p in (tmp_path / "checkpoint-2").iterdir() if p.is_file()}
    assert all(name.endswith((".json", ".safetensors", ".jinja")) for name in names), names
    assert {"optimizer.json", "random_0.json", "trainer_state.json"} <= names


DAMAGE = {
    "no optimiser": (lambda f: (f / "optimizer.json").unlink(), "save_only_model"),
    "no tensors of it": (lambda f: next(f.glob("optimizer-*")).unlink(), "is missing"),
    "tensors cut off": (lambda f: cut(next(f.glob("optimizer-*"))), "truncated or changed"),
    "random states cut off": (lambda f: cut(next(f.glob("random_0-*"))), "truncated or changed"),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), "half-written"),
    "an empty state": (lambda f: (f / "trainer_state.json").write_text("{}"), "'global_step' must be int"),
    "a list as state": (lambda f: (f / "trainer_state.json").write_text("[]"), "must hold an object"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused_and_passed_over(name, tmp_path, tokenizer, corpora):
    trained_to(tmp_path, tokenizer, corpora, 4)
    change, words = DAMAGE[name]
    change(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=words):
        trained_to(tmp_path, tokenizer, corpora, 6, resume=str(tmp_path / "checkpoint-4"))
    if "random" not in name:
        assert last_checkpoint(tmp_path).name == "checkpoint-2"


def test_other_settings_than_those_of_the_checkpoint(tmp_path, tokenizer, corpora):
    trained_to(tmp_path, tokenizer, corpora, 2)
    changed = trainer_for("sft", tmp_path, tokenizer, corpora, {"renyi_alpha": 0.4}, max_steps=3)
    with pytest.warns(VifamilyWarning, match=r"renyi_alpha=0.4 \(was 0.8\)"):
        changed.train(resume_from_checkpoint=True)
    other = trainer_for("sft", tmp_path, tokenizer, corpora, max_steps=3, optim="sgd")
    with pytest.warns(VifamilyWarning), pytest.raises(CheckpointError, match="of another form"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- refusals ---


def test_refusals(tmp_path, tokenizer, corpora):
    with pytest.raises(ConfigError, match="StackedCausalLM"):
        SFTEnsembleTrainer(torch.nn.Identity(), arguments(tmp_path))
    with pytest.raises(ConfigError, match="preferences are routed"):
        trainer_for("dpo", tmp_path, tokenizer, corpora, {"unit": "token"})
    with pytest.raises(ConfigError, match="go together"):
        EnsembleOptions(unit="group")
    with pytest.raises(ConfigError, match="unit must be"):
        EnsembleOptions(unit="word")
    with pytest.raises(ConfigError, match="beta"):
        EnsembleOptions(beta=0.0)
    with pytest.raises(ConfigError, match="alpha"):
        EnsembleOptions(renyi_alpha=-1.0)
    with pytest.raises(ConfigError, match="no checkpoint"):
        trainer_for("sft", tmp_path / "none", tokenizer, corpora).train(resume_from_checkpoint=True)
    args = arguments(tmp_path)
    args.packing = True
    with pytest.raises(ConfigError, match="packing"):
        SFTEnsembleTrainer(ensemble(tokenizer), args, list(corpora[0]), processing_class=tokenizer)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, tokenizer, corpora):
    trainer = trainer_for("sft", tmp_path, tokenizer, corpora)
    next(trainer._ensemble.adapter_parameters()).data[0].fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="step 0"):
        trainer.train()
