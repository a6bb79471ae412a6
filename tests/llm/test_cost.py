"""Costs against what is counted: weights of models, tensors that autograd keeps, operations that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vifamily.errors import ConfigError
from vifamily.llm import BaseSize, StackedCausalLM, base_size, step_cost
from vifamily.rng import scoped

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def product_flop(added, left, right, **_):
    """Operations of ``baddbmm_``, from shapes; the counter does not know the product that adds in place."""
    return 2 * left[0] * left[1] * left[2] * right[2]


IN_PLACE = {torch.ops.aten.baddbmm_: product_flop}
SHAPE = {"vocab_size": 50, "max_position_embeddings": 64}
WIDE = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, **SHAPE}


def config_of(kind, layers=2, **more):
    if kind == "gpt2":
        return transformers.GPT2Config(
            n_embd=32, n_layer=layers, n_head=4, n_positions=64, vocab_size=50, bos_token_id=1, eos_token_id=2, **more
        )
    maker = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "phi3": transformers.Phi3Config,
        "mistral": transformers.MistralConfig,
        "mixtral": transformers.MixtralConfig,
    }[kind]
    if kind == "phi3":
        more |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return maker(num_hidden_layers=layers, **WIDE, **more)


def model_of(config, dtype=torch.float32):
    with scoped(0):
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def ensemble_of(config, members=2, rank=2, dtype=torch.float32, **more):
    lora = peft.LoraConfig(**{"r": rank, "target_modules": "all-linear", **more})
    return StackedCausalLM(model_of(config, dtype), lora, members).train()


KINDS = {
    "llama": {"head_dim": 8},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {},
    "gpt2 wide": {"n_inner": 96},
}


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_the_model(name):
    config = config_of(name.split()[0], **KINDS[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    size = base_size(config)
    assert size.num_weights == sum(p.numel() for p in model.parameters())
    assert base_size(config.to_dict()) == size


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_adapters_are_those_of_the_ensemble(kind):
    config = config_of(kind, layers=3)
    size = base_size(config)
    for targets, first in ((None, 0), (None, 2), (tuple(size.matrices())[:2], 1)):
        more = {"layers_to_transform": list(range(first, 3))} if first else {}
        names = list(size.matrices()) if targets is None else list(targets)
        model = ensemble_of(config, members=3, rank=4, target_modules=names, **more)
        cost = step_cost(
            size, num_members=3, lora_r=4, batch_size=2, length=8, target_modules=targets, first_layer=first
        )
        assert 3 * cost.adapter_weights == sum(p.numel() for p in model.adapter_parameters())
        assert cost.adapter_bytes == 2 * 4 * 3 * cost.adapter_weights == cost.optimiser_bytes


ROWS, LENGTH, MEMBERS = 3, 24, 2


def batch():
    ids = torch.randint(50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(ids).bool()
    scored[:, : LENGTH // 2] = False
    return ids, torch.ones_like(ids), scored


def kept_bytes(model):
    """Bytes of what autograd keeps of the layers, leaving parameters out; the head keeps its gradient alone."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(value):
        store = value.untyped_storage()
        if store.data_ptr() not in own:
            kept[store.data_ptr()] = store.nbytes()
        return value

    ids, seen, _ = batch()
    with (
        model.selection.using((0, MEMBERS), ROWS),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
    ):
        # held, or storages would be used again
        out = model.base.base_model(
            input_ids=ids.repeat(MEMBERS, 1), attention_mask=seen.repeat(MEMBERS, 1), use_cache=False
        )
    del out
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "targets"), [("llama", None), ("llama", ("q_proj", "down_proj")), ("gpt2", None)])
def test_memory_is_what_autograd_keeps(kind, targets, precision):
    names = "all-linear" if targets is None else list(targets)
    found, counted = [], []
    for layers in (2, 3):
        config = config_of(kind, layers)
        model = ensemble_of(config, MEMBERS, dtype=getattr(torch, precision), target_modules=names)
        found.append(kept_bytes(model))
        cost = step_cost(
            base_size(config),
            num_members=MEMBERS,
            lora_r=2,
            batch_size=ROWS,
            micro_batch_size=ROWS,
            length=LENGTH,
            target_modules=targets,
            base_precision=precision,
        )
        counted.append(cost.activation_bytes)
    assert found[1] - found[0] == pytest.approx(counted[1] - counted[0], abs=1e-6)  # one more layer, to the byte
    head = MEMBERS * ROWS * LENGTH * 0.5 * 32 * (4 if precision == "float32" else 2)  # a gradient for each scored token
    assert counted[1] - head == pytest.approx(found[1], rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_operations_are_those_that_torch_counts(kind):
    found, counted = [], []
    for layers in (2, 3):
        config = config_of(kind, layers, attn_implementation="eager")
        model = ensemble_of(config, MEMBERS)
        ids, seen, _ = batch()
        with model.selection.using((0, MEMBERS), ROWS):  # the layers alone: the head has an autograd of its own
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                out = model.base.base_model(input_ids=ids.repeat(MEMBERS, 1), attention_mask=seen.repeat(MEMBERS, 1))
            forward = counter.get_total_flops()
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                out.last_hidden_state.sum().backward()
        found.append((forward, counter.get_total_flops()))
        cost = step_cost(
            base_size(config), num_members=MEMBERS, lora_r=2, batch_size=ROWS, length=LENGTH, scored_share=0.5
        )
        counted.append((cost.forward_flops, cost.backward_flops))
    head = MEMBERS * ROWS * LENGTH // 2 * 2 * 50 * 32  # of the scored half, to 50 tokens from a width of 32
    for part in (0, 1):
        assert found[1][part] - found[0][part] == pytest.approx(counted[1][part] - counted[0][part], rel=1e-12)
        # the first layer has no gradient to hand down
        assert counted[1][part] - head == pytest.approx(found[1][part], rel=0.1 if part else 1e-12)


def test_scaling_in_members_and_routes():
    size = base_size({**WIDE, "num_hidden_layers": 4})
    one, eight = (step_cost(size, num_members=k, lora_r=2, batch_size=8, length=16) for k in (1, 8))
    assert eight.activation_bytes == one.activation_bytes  # micro-batches of a K-th
    assert eight.optimiser_bytes == 8 * one.optimiser_bytes and eight.flops == pytest.approx(8 * one.flops)
    whole = step_cost(size, num_members=8, lora_r=2, batch_size=8, length=16, micro_batch_size=8)
    assert whole.activation_bytes == pytest.approx(8 * one.activation_bytes)
    twice = step_cost(size, num_members=8, lora_r=2, batch_size=8, length=16, micro_batch_size=8, route="two_pass")
    assert twice.activation_bytes == pytest.approx(one.activation_bytes)
    assert twice.forward_flops == 2 * eight.forward_flops and twice.backward_flops == eight.backward_flops
    again = step_cost(size, num_members=8, lora_r=2, batch_size=8, length=16, gradient_checkpointing=True)
    assert again.activation_bytes < eight.activation_bytes and again.backward_flops > eight.backward_flops
    top = step_cost(size, num_members=8, lora_r=2, batch_size=8, length=16, first_layer=2)
    assert 0.45 < top.flops / eight.flops < 0.65  # half of the layers run once for all
    pairs = step_cost(size, num_members=8, lora_r=2, batch_size=8, length=16, preferences=True)
    assert 1 < pairs.forward_flops / eight.forward_flops < 1.13
    spread = step_cost(size, num_members=8, lora_r=2, batch_size=8, length=16, devices=4, sharded=True)
    assert spread.flops == eight.flops and spread.seconds(1e12) == eight.seconds(1e12) / 4
    assert spread.total_bytes < eight.total_bytes


def test_known_bases():
    llama = BaseSize(4096, 11008, 32, 32, 4096, 4096, 32000, other=32 * 2 * 4096 + 4096)
    assert llama.num_weights == 6_738_415_616  # of Llama 2 7B
    cost = step_cost(llama, num_members=1, lora_r=16, batch_size=1, length=1)
    assert cost.adapter_weights == 39_976_960  # what PEFT says for it with r = 16 on all projections
    # 16 bytes a weight: itself, its gradient and two moments
    assert cost.adapter_bytes + cost.optimiser_bytes == 16 * 39_976_960
    text = str(cost)
    assert "6.74 G weights" in text and "40 M weights each" in text and "13.5 GB" in text and "Counted, not" in text
    assert cost.to_dict()["total_bytes"] == cost.total_bytes


def test_bad_arguments_are_refused():
    size = base_size({**WIDE, "num_hidden_layers": 2})
    fine = {"num_members": 2, "lora_r": 2, "batch_size": 2, "length": 8}
    with pytest.raises(ConfigError, match="has no hidden_size or n_embd"):
        base_size({"vocab_size": 3})
    with pytest.raises(ConfigError, match="lora_r must be a positive integer, got 0"):
        step_cost(size, **{**fine, "lora_r": 0})
    with pytest.raises(ConfigError, match="target_modules must be among q_proj"):
        step_cost(size, **fine, target_modules=("c_attn",))
    with pytest.raises(ConfigError, match="route must be one of stacked, two_pass and base_precision one of"):
        step_cost(size, **fine, base_precision="fp4")
    with pytest.raises(ConfigError, match="first_layer from 0 to 1"):
        step_cost(size, **fine, first_layer=2)
    with pytest.raises(ConfigError, match="flops_per_second must be positive"):
        step_cost(size, **fine).seconds(0)
