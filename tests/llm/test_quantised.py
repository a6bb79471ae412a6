"""A base of quantised layers, which are no ``nn.Linear`` and have no parameters: every route, saving, and refusals.

The layer stands in for those of quantisers, which are no dependency: eight bits a weight with a scale for each row,
taken back to full precision in ``forward``.
"""

import types

import pytest
import torch
from torch import nn

from tests.llm.conftest import LORA, spread_members, tiny_base, tiny_batch
from vifamily.errors import ConfigError, IncompatibleError

peft = pytest.importorskip("peft")

from vifamily.llm import _bases, load_members, save_members, saving  # noqa: E402
from vifamily.llm._fused import plain_weight  # noqa: E402
from vifamily.llm._passes import stacked_pass, two_pass  # noqa: E402
from vifamily.llm._routed import supervised_loss  # noqa: E402
from vifamily.llm._stacked import StackedCausalLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

K = 3
TARGETS = ["q_proj", "v_proj", "down_proj"]


class EightBits(nn.Module):
    """A quantised linear layer: buffers alone."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantised(self):
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised())


def bases():
    """A base of quantised layers, and the base of ordinary layers with the same weights."""
    quantised, plain = tiny_base(), tiny_base()
    for name, layer in list(quantised.named_modules()):
        if name.rpartition(".")[2] in (*TARGETS, "k_proj", "up_proj"):
            parent, _, last = name.rpartition(".")
            made = EightBits(layer)
            setattr(quantised.get_submodule(parent), last, made)
            plain.get_submodule(name).weight.data = made.dequantised()
    return quantised, plain


def ensemble(base):
    model = StackedCausalLM(base, peft.LoraConfig(**LORA, target_modules=TARGETS), K, seed=5)
    spread_members(model)
    return model


def gradients(model, route):
    rows = tiny_batch()

    def score(part, chosen):
        return model(part.input_ids, part.attention_mask, part.completion_mask, chosen)

    def loss_of(value, index):
        part = rows.take(index)
        return supervised_loss(value, part.token_row, torch.arange(len(index)), "sequence", 0.7, model.log_weight)[0]

    blocks, call = list(torch.arange(len(rows)).split(2)), torch.Tensor.backward
    model.zero_grad()
    if route == "two_pass":
        loss = two_pass(score, rows, [torch.arange(len(rows))], loss_of, call, num_members=K)
    else:
        loss = stacked_pass(score, rows, blocks, loss_of, call)
    return float(loss), [p.grad.clone() for p in model.adapter_parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("route", ["two_pass", "stacked"])
def test_gradients_are_those_over_the_dequantised_base(route, checkpointing):
    quantised, plain = (ensemble(base) for base in bases())
    assert all(plain_weight(layer.base_layer) is None for _, layer in quantised.adapters())
    if checkpointing:
        quantised.gradient_checkpointing_enable()
        quantised.train()
    loss, found = gradients(quantised, route)
    same, expected = gradients(plain, route)
    # the norms of this base round to single precision, where the last bit of a double decides now and then
    assert loss == pytest.approx(same, rel=1e-7)
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().max()) <= 1e-6 * float(y.abs().max())


def test_members_are_saved_and_come_back(tmp_path):
    quantised, _ = bases()
    model = ensemble(quantised)
    save_members(model, tmp_path)
    again = StackedCausalLM(bases()[0], model.lora_config, K, seed=9)
    load_members(again, tmp_path)
    for x, y in zip(model.adapter_parameters(), again.adapter_parameters(), strict=True):
        assert torch.equal(x.float(), y.float())


class Sizeless(nn.Module):
    """A layer that says nothing of its sizes."""

    def forward(self, x):
        return x


def test_layers_that_are_not_linear_are_refused():
    base = tiny_base(layers=1)
    base.base_model.layers[0].self_attn.q_proj = Sizeless()
    with pytest.raises(ConfigError, match="only linear layers"):
        ensemble(base)


def packed(layer):
    """Make a layer look like one that bitsandbytes has packed for evaluation on the CPU."""
    layer.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)


def test_layers_that_were_packed_for_evaluation_are_not_trained_over():
    model, rows = (
        StackedCausalLM(tiny_base(dtype=torch.float32), peft.LoraConfig(r=2, target_modules=TARGETS), 2),
        tiny_batch(),
    )
    packed(model.base.get_submodule(model.target_names[0]).base_layer)
    given = (rows.input_ids, rows.attention_mask, rows.completion_mask)
    with torch.no_grad():
        assert torch.isfinite(model(*given)).all()
    with pytest.raises(IncompatibleError, match="gradients through it would be wrong"):
        model(*given)


def test_a_base_is_looked_at_in_training_mode_and_left_as_it_was():
    base, seen = tiny_base(dtype=torch.float32).eval(), []
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    StackedCausalLM(base, peft.LoraConfig(r=2, target_modules=["v_proj"]), 2)
    assert seen and all(seen) and not layer.training and not base.training


def test_how_a_base_was_quantised_is_kept_and_used_again(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    base = tiny_base(dtype=torch.float32)
    model = StackedCausalLM(base, peft.LoraConfig(r=2, target_modules=TARGETS), 2)
    base.config.quantization_config = types.SimpleNamespace(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    manifest = save_members(model, tmp_path)
    assert manifest.training["quantisation"]["bnb_4bit_compute_dtype"] == "float32"
    monkeypatch.setattr(_bases, "require", lambda name, _: transformers)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **given: given)
    asked = []

    def loaded(kind, name, what, **options):
        asked.append(options)
        return tiny_base(dtype=torch.float32)

    monkeypatch.setattr(saving, "pretrained", loaded)
    saving.load_model(tmp_path, "somewhere")
    told = asked[0]["quantization_config"]
    assert told["load_in_4bit"] and told["bnb_4bit_quant_type"] == "nf4"
    saving.load_model(tmp_path, "somewhere", quantization_config=None)
    assert asked[1] == {"quantization_config": None}
