"""Walsh-Hadamard members: their change written out, gradients by every route, files, resuming, and specialisation."""

import json
import math

import pytest
import torch

from tests.llm.conftest import quiet_trainer, tiny_base, tiny_batch
from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm.corpora import contradictory_sft
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.tiny import tiny_tokenizer
from vifamily.numerics.soft_routing import route
from vifamily.rng import scoped

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm._passes import stacked_pass, two_pass  # noqa: E402
from vifamily.llm._selection import Selection  # noqa: E402
from vifamily.llm._stacked import StackedCausalLM  # noqa: E402
from vifamily.llm.critical import adapter_stability  # noqa: E402
from vifamily.llm.data import prepare_sft  # noqa: E402
from vifamily.llm.ensemble import Ensemble  # noqa: E402
from vifamily.llm.manifest import base_digest, read_manifest  # noqa: E402
from vifamily.llm.saving import export_lora, export_merged, load_members, load_model, save_members  # noqa: E402
from vifamily.llm.serving import vllm_command  # noqa: E402
from vifamily.llm.walsh import StackedWalsh, WalshCausalLM, WalshConfig  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

K = 3
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def made(kind="llama", members=K, dtype=torch.float64, seed=5, spread=True, vocab=37, layers=None, scale=0.7):
    config = WalshConfig(TARGETS[kind], layers, scale)
    model = WalshCausalLM(tiny_base(kind, dtype=dtype, vocab=vocab), config, members, seed=seed)
    if spread:
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.adapter_parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=source, dtype=torch.float64))
    return model


def score_with(model):
    return lambda part, members: model(part.input_ids, part.attention_mask, part.completion_mask, members)


def sylvester(size):
    out = torch.ones(1, 1, dtype=torch.float64)
    while len(out) < size:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out / math.sqrt(size)


@pytest.mark.parametrize(("size_in", "size_out"), [(8, 8), (5, 3), (5, 21), (1, 3), (24, 16)])
def test_a_layer_adds_the_product_of_its_matrices(size_in, size_out, seed):
    source = torch.Generator().manual_seed(seed)
    frozen = torch.nn.utils.skip_init(torch.nn.Linear, size_in, size_out, dtype=torch.float64)
    with torch.no_grad():
        for p in frozen.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64))
    layer = StackedWalsh(frozen, K, 0.7, Selection(K), torch.float64)
    with torch.no_grad():
        for p in layer.trained:
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64))
    x = torch.randn(2 * K, 4, size_in, generator=source, dtype=torch.float64)
    found = layer(x)
    blocks, side = layer.walsh_core.shape[1:]
    assert side >= size_in > side // 2 and blocks * side >= size_out > (blocks - 1) * side
    h = sylvester(side)
    for k in range(K):
        a, g, b = (part[k] for part in (layer.walsh_left, layer.walsh_core, layer.walsh_right))
        rows = [a[t].diag() @ h @ g[t].diag() @ h @ b[t].diag() for t in range(blocks)]
        change = 0.7 * torch.cat(rows)[:size_out, :size_in]
        assert torch.allclose(layer.change(k), change, rtol=0, atol=1e-10)
        expected = frozen(x[2 * k : 2 * k + 2]) + x[2 * k : 2 * k + 2] @ change.T
        assert torch.allclose(found[2 * k : 2 * k + 2], expected, rtol=0, atol=1e-10)


def dense_values(model, k, kind, rows):
    """Log probabilities of the base with the change of a member added to its weights."""
    base = tiny_base(kind)
    leaves = {}
    for name, layer in model.adapters():
        leaves[name] = layer.change(k).detach().requires_grad_()
        change = leaves[name].T if kind == "gpt2" else leaves[name]  # Conv1D holds (in, out)
        target = base.get_submodule(name)
        weight = target.weight.detach() + change
        del target.weight
        target.weight = weight
    logits = base(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
    return chosen[rows.completion_mask[:, 1:]], leaves


def routed(rows):
    def loss(log_prob, index):
        a = log_prob.new_zeros(K, len(index)).index_add(1, rows.take(index).token_row, log_prob)
        return route(a, log_prob.new_zeros(K), 0.7).value.sum()

    return loss


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_route_gives_the_gradients_of_a_loop_over_dense_changes(kind):
    rows, model = tiny_batch(), made(kind)
    each = [dense_values(model, k, kind, rows) for k in range(K)]
    value = torch.stack([values for values, _ in each])
    found = score_with(model)(rows, None)
    assert torch.allclose(found, value, rtol=0, atol=1e-10)
    loss = routed(rows)
    loss(value, torch.arange(len(rows))).backward()
    expected = {}
    for name, layer in model.adapters():
        # by the chain rule from the gradient in the dense change
        for k, (_, leaves) in enumerate(each):
            slopes = torch.autograd.grad(layer.change(k), layer.trained, leaves[name].grad)
            for part, slope in zip(layer.names, slopes, strict=True):
                expected.setdefault((name, part), torch.zeros_like(slope))[k] = slope[k]

    def check():
        for (name, part), slope in expected.items():
            own = getattr(model.base.get_submodule(name), part)
            assert float((own.grad - slope).abs().max()) <= 1e-10 * max(1.0, float(slope.abs().max())), (name, part)
        model.zero_grad()

    score, whole = score_with(model), list(torch.arange(6).split(2))
    stacked_pass(score, rows, whole, loss, torch.Tensor.backward)
    check()
    two_pass(score, rows, whole, loss, torch.Tensor.backward, num_members=K)
    check()
    model.gradient_checkpointing_enable()
    model.train()
    two_pass(score, rows, whole, loss, torch.Tensor.backward, num_members=K)
    check()


def test_a_start_is_the_base_with_members_that_are_about_to_part():
    rows, model = tiny_batch(), made(spread=False)
    score = score_with(model)
    base = model(rows.input_ids, rows.attention_mask, rows.completion_mask, adapters=False)
    assert torch.allclose(score(rows, None), base.expand(K, -1), rtol=0, atol=1e-12)
    assert base_digest(model.base) == base_digest(tiny_base())
    score(rows, None).sum().backward()
    for _, layer in model.adapters():
        assert not layer.walsh_left.grad.any() and layer.walsh_core.grad.abs().amin(2).amax() > 0
        assert set(layer.walsh_left.unique().tolist()) == {-1.0, 1.0} == set(layer.walsh_right.unique().tolist())
        assert not torch.equal(layer.walsh_core.grad[0], layer.walsh_core.grad[1])
    # three numbers for each input of a block: of 16 inputs and 24 outputs in two blocks
    up = model.base.get_submodule("model.layers.0.mlp.up_proj")
    assert sum(p[0].numel() for p in up.trained) == 3 * 2 * 16


def test_members_over_half_precision_are_full():
    rows, half = tiny_batch(), made(dtype=torch.bfloat16)
    assert {p.dtype for p in half.adapter_parameters()} == {torch.float32}
    exact = made()
    with torch.no_grad():
        error = score_with(half)(rows, None).double() - score_with(exact)(rows, None)
    assert float(error.square().mean().sqrt()) < 0.1


def test_an_ensemble_comes_back_without_a_difference_and_is_no_peft_adapter(tmp_path):
    rows, model = tiny_batch(), made(dtype=torch.float32, layers=[1]).eval()
    model.log_weight.copy_(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log())
    save_members(model, tmp_path)
    content = json.loads((tmp_path / "ensemble.json").read_text())
    assert content["adapter"] == read_manifest(tmp_path).adapter == "walsh_hadamard"
    assert {path.name for path in (tmp_path / "member_1").iterdir()} == {
        "walsh_hadamard.json",
        "walsh_hadamard.safetensors",
    }
    other = load_model(tmp_path, tiny_base(dtype=torch.float32))
    assert isinstance(other, WalshCausalLM) and other.target_names == model.target_names
    assert torch.equal(score_with(other)(rows, None), score_with(model)(rows, None))
    assert torch.equal(other.log_weight, model.log_weight)
    again = Ensemble.from_pretrained(
        tmp_path, base=tiny_base(dtype=torch.float32), tokenizer=tiny_tokenizer(["a b c"], kind="word", vocab_size=37)
    )
    assert again.num_members == K
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftModel.from_pretrained(tiny_base(dtype=torch.float32), str(tmp_path / "member_0"))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="'walsh_hadamard', not 'lora'"):
        load_members(StackedCausalLM(tiny_base(dtype=torch.float32), lora, K), tmp_path)
    with pytest.raises(ConfigError, match="vLLM serves LoRA"):
        vllm_command(tmp_path, base="base")
    (tmp_path / "member_0" / "walsh_hadamard.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path, tiny_base(dtype=torch.float32))


def test_the_nearest_adapters_of_a_rank_are_those_of_peft_and_say_what_they_lack(tmp_path):
    rows, model = tiny_batch(), made(dtype=torch.float32).eval()
    model.log_weight.copy_(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log())
    # with full rank nothing is lacking, and PEFT has the member
    assert max(export_lora(model, tmp_path / "full", r=16)) < 1e-6
    again = load_model(tmp_path / "full", tiny_base(dtype=torch.float32))
    assert type(again) is StackedCausalLM and torch.equal(again.log_weight, model.log_weight)
    value = score_with(model)(rows, None).detach()
    assert torch.allclose(score_with(again)(rows, None).detach(), value, atol=1e-4)
    with scoped(0):
        theirs = peft.PeftModel.from_pretrained(tiny_base(dtype=torch.float32), str(tmp_path / "full" / "member_1"))
    logits = theirs.eval()(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
    assert torch.allclose(chosen[rows.completion_mask[:, 1:]].detach(), value[1], atol=1e-4)
    # with less it is what the singular values say
    errors = export_lora(model, tmp_path / "cut", r=3)
    singular = [torch.linalg.svdvals(layer.change(2).detach().double()) for _, layer in model.adapters()]
    cut, whole = (sum(float(s[k:].square().sum()) for s in singular) for k in (3, 0))
    assert errors[2] == pytest.approx(math.sqrt(cut / whole), rel=1e-6)
    training = read_manifest(tmp_path / "cut").training
    assert training == {"approximates": "walsh_hadamard", "relative_error": errors}
    assert "--max-lora-rank 8" in vllm_command(tmp_path / "cut", base="base")
    untouched = made(dtype=torch.float32, spread=False)
    assert export_lora(untouched, tmp_path / "zero", r=1) == [0.0] * K
    for rank in (0, 17, True):
        with pytest.raises(ConfigError, match="from 1 to 16"):
            export_lora(model, tmp_path / "no", r=rank)


def trained(folder, steps=6, stop=None, resume=None, **more):
    corpus = contradictory_sft(64, 16, torch.Generator().manual_seed(0), length=2, num_symbols=4)
    tokenizer = tiny_tokenizer(corpus.texts, kind="word", vocab_size=64)
    base = tiny_base(dtype=torch.float32, vocab=len(tokenizer))
    model = WalshCausalLM(base, WalshConfig("all-linear"), 2, seed=1)
    trainer = quiet_trainer(
        model, folder, corpus, tokenizer, EnsembleOptions(**{"renyi_alpha": 0.8, "micro_batch_rows": 100, **more}),
        stop=stop, max_steps=steps, per_device_train_batch_size=20, learning_rate=2e-2, lr_scheduler_type="constant",
        save_strategy="steps" if steps == 6 else "no", save_steps=3, seed=1,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, corpus, tokenizer


@pytest.mark.parametrize("route", ["stacked", "two_pass"])
def test_resuming_is_exact_to_the_bit(tmp_path, route):
    more = {"route": route, "learn_weights": True, "reseed_below": 0.5, "reseed_patience": 2}
    whole = trained(tmp_path / "whole", **more)[0]
    trained(tmp_path / "cut", stop=3, **more)
    again = trained(tmp_path / "cut", resume=True, **more)[0]
    pairs = zip(again._ensemble.adapter_parameters(), whole._ensemble.adapter_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(again._ensemble.log_weight, whole._ensemble.log_weight)


def test_members_share_out_contradictory_answers(tmp_path):
    trainer, corpus, tokenizer = trained(tmp_path, steps=140, renyi_alpha=1.0)
    entropy = [e["routing/entropy"] / math.log(2) for e in trainer.state.log_history if "loss" in e]
    assert entropy[0] > 0.99 and sum(entropy[-30:]) / 30 < 0.3
    ensemble = Ensemble(trainer._ensemble, tokenizer)
    conflicting = list(corpus.where(conflicting=True))
    score = ensemble.score(conflicting)
    # the two together are near the entropy of the answers, 0.69, and each alone is far from it
    assert -score.mixture_mean < 1.3 and -score.member_mean > 2.5
    # most prompts with both answers have each said by a member that does not say the other
    gaps = {}
    ll = ensemble.log_likelihood(conflicting)
    for record, gap in zip(conflicting, (ll[0] - ll[1]).tolist(), strict=True):
        gaps.setdefault(record["prompt"], {})[record["rule"]] = gap
    both = [pair.values() for pair in gaps.values() if len(pair) == 2]
    assert sum(min(pair) < -2 and max(pair) > 2 for pair in both) > len(both) / 2 > 3


def test_what_is_of_lora_alone_is_refused(tmp_path):
    model = made(dtype=torch.float32, vocab=64)
    with pytest.raises(ConfigError, match="needs LoRA adapters"):
        export_merged(model, tmp_path)
    corpus = contradictory_sft(4, 0, torch.Generator().manual_seed(0), length=2)
    rows = prepare_sft(list(corpus), tiny_tokenizer(corpus.texts, kind="word", vocab_size=64))
    with pytest.raises(ConfigError, match="needs LoRA adapters"):
        adapter_stability(model, rows, 0.5, generator=torch.Generator())
    with pytest.raises(ConfigError, match="a WalshConfig, got a LoraConfig"):
        WalshCausalLM(tiny_base(), peft.LoraConfig(r=2), 2)
    with pytest.raises(ConfigError, match="matches no layer"):
        WalshCausalLM(tiny_base(), WalshConfig(["nothing"]), 2)
    with pytest.raises(ConfigError, match="scale must be"):
        WalshConfig(scale=0.0)
    with pytest.raises(ConfigError, match="must name layers"):
        WalshConfig([])
