"""One uncertain adapter: its divergence, its gradients by the chain rule, masks of dropout, and exact resuming."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

from tests.llm.conftest import LORA, quiet_trainer, tiny_base, tiny_batch
from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm.corpora import contradictory_sft
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.tiny import tiny_tokenizer

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm._stacked import StackedCausalLM  # noqa: E402
from vifamily.llm.adapter_files import put  # noqa: E402
from vifamily.llm.ensemble import Ensemble  # noqa: E402
from vifamily.llm.saving import load_members  # noqa: E402
from vifamily.llm.stochastic import StochasticCausalLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
CONFIG = {**LORA, "target_modules": ["q_proj", "v_proj"]}


def uncertain(family="mean_field", members=3, dtype=torch.float64, vocab=37, **more):
    base = tiny_base(dtype=dtype, vocab=vocab)
    model = StochasticCausalLM(base, peft.LoraConfig(**CONFIG), members, family=family, initial_sd=0.3, seed=2, **more)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.posterior:
            p.add_(0.1 * torch.randn(p.shape, generator=source, dtype=torch.float64))
    return model


def rows_of(batch):
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask,
            "completion_mask": batch.completion_mask}  # fmt: skip


def test_the_divergence_is_that_of_normals():
    model, expected = uncertain(), 0.0
    for i, (mean, rho) in enumerate(zip(list(model.posterior)[::2], list(model.posterior)[1::2], strict=True)):
        s = 0.7 / math.sqrt(16) if i % 2 == 0 else 0.7  # both layers have 16 inputs
        prior = Normal(torch.zeros_like(mean), torch.full_like(mean, s))
        expected += float(kl_divergence(Normal(mean, softplus(rho)), prior).sum().detach())
    assert float(model.divergence(0.7).detach()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("family", ["mean_field", "dropout"])
def test_gradients_are_those_of_the_draws_by_the_chain_rule(family):
    model, batch = uncertain(family), tiny_batch()
    model.redraw(5, 0)
    weight = torch.tensor([0.2, -1.0, 0.5], dtype=torch.float64)
    (weight @ model.row_log_prob(**rows_of(batch)).sum(1)).backward()
    # an ensemble of points that stand where the draws are
    points = StackedCausalLM(tiny_base(), peft.LoraConfig(**CONFIG), 3)
    put(points, {n: (la.lora_A.detach().clone(), la.lora_B.detach().clone()) for n, la in model.adapters()})
    (weight @ points.row_log_prob(**rows_of(batch)).sum(1)).backward()
    slopes = [p.grad for p in points.adapter_parameters()]
    noises = [noise for pair in model._noise for noise in pair]
    own = list(model.posterior)
    for i, (slope, noise) in enumerate(zip(slopes, noises, strict=True)):
        if family == "dropout":
            assert torch.allclose(own[i].grad, (slope * noise).sum(0, keepdim=True), atol=1e-12)
            continue
        mean, rho = own[2 * i], own[2 * i + 1]
        assert torch.allclose(mean.grad, slope.sum(0, keepdim=True), atol=1e-12)
        expected = (slope * noise).sum(0, keepdim=True) * rho.detach().sigmoid()
        assert torch.allclose(rho.grad, expected, atol=1e-12)


def test_dropout_drops_whole_inputs_of_a_draw_and_keeps_the_mean(seed):
    model = uncertain("dropout", members=4000, dropout=0.25, dtype=torch.float32)
    model.redraw()
    layer, mean = next(model.adapters())[1], next(iter(model.posterior)).detach()[0]
    kept = layer.lora_A != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))  # all ranks of an input together
    share = float(kept[:, 0].float().mean())
    assert share == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / kept[:, 0].numel()))
    error = mean.abs() * math.sqrt(1 / 3 / 4000)  # of a mean over 4000 masks
    assert bool(((layer.lora_A.mean(0) - mean).abs() <= 6 * error + 1e-6).all())


def run(folder, family, steps=4, resume=None, **more):
    corpus = contradictory_sft(8, 4, torch.Generator().manual_seed(0), length=3)
    tokenizer = tiny_tokenizer(corpus.texts, kind="word", vocab_size=64)
    model = uncertain(family, members=2, dtype=torch.float32, vocab=len(tokenizer))
    trainer = quiet_trainer(
        model, folder, corpus, tokenizer, EnsembleOptions(0.0, **{"prior_weight": 1e-3, **more}), stop=steps,
        max_steps=4, per_device_train_batch_size=3, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, corpus, tokenizer


@pytest.mark.parametrize("family", ["mean_field", "dropout"])
def test_resuming_is_exact_and_draws_are_saved_as_members(family, tmp_path):
    whole, corpus, tokenizer = run(tmp_path / "whole", family)
    run(tmp_path / "cut", family, 2)
    again = run(tmp_path / "cut", family, resume=True)[0]
    pairs = zip(again._ensemble.posterior, whole._ensemble.posterior, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    whole.save_model(str(tmp_path / "saved"))
    points = StackedCausalLM(tiny_base(dtype=torch.float32, vocab=len(tokenizer)), peft.LoraConfig(**CONFIG), 2, seed=8)
    load_members(points, tmp_path / "saved")
    found = Ensemble(points, tokenizer).log_likelihood(list(corpus))
    assert torch.equal(found, Ensemble(whole._ensemble, tokenizer).log_likelihood(list(corpus)))
    assert not torch.equal(found[0], found[1])
    (tmp_path / "cut" / "checkpoint-4" / "posterior.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"posterior\.safetensors"):
        run(tmp_path / "cut", family, resume=str(tmp_path / "cut" / "checkpoint-4"))


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="family must be"):
        StochasticCausalLM(tiny_base(), peft.LoraConfig(**CONFIG), 2, family="normal")
    with pytest.raises(ConfigError, match="dropout must be"):
        StochasticCausalLM(tiny_base(), peft.LoraConfig(**CONFIG), 2, family="dropout", dropout=1.0)
    with pytest.raises(ConfigError, match="without a prior"):
        run(tmp_path, "mean_field", prior_weight=0.0)
    with pytest.raises(ConfigError, match="learn_weights"):
        run(tmp_path, "dropout", learn_weights=True)
