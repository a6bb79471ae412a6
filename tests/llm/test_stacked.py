"""Stacked members give the log probabilities and gradients of as many PEFT models, by every route."""

import pytest
import torch

from tests.llm.conftest import LORA, spread_members, tiny_base, tiny_batch
from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.numerics.soft_routing import route
from vifamily.rng import scoped

peft = pytest.importorskip("peft")

from vifamily.llm._passes import PaddedRows, stacked_pass, two_pass  # noqa: E402
from vifamily.llm._selection import Selection  # noqa: E402
from vifamily.llm._stacked import StackedCausalLM, StackedLoRA, completion_rows  # noqa: E402

# PEFT asks transformers for a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

K = 3
ALPHA = 0.7
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "qwen2": "all-linear"}


def config(kind="llama", **more):
    return peft.LoraConfig(**{**LORA, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **more})


def stacked(kind="llama", dtype=torch.float64, layers=2, **more):
    model = StackedCausalLM(tiny_base(kind, dtype=dtype, layers=layers), config(kind, **more), K, seed=5)
    spread_members(model)
    return model


def loss_of(rows):
    """The sequence-routed loss, as a sum over blocks of rows."""

    def loss(log_prob, index):
        token_row = rows.take(index).token_row
        a = log_prob.new_zeros(K, len(index)).index_add(1, token_row, log_prob)
        return route(a, log_prob.new_zeros(K), ALPHA).value.sum()

    return loss


def gradients(model):
    out = {n: (x.lora_A.grad.clone(), x.lora_B.grad.clone()) for n, x in model.adapters()}
    model.zero_grad()
    return out


def blocks_of(rows, size):
    return list(torch.arange(len(rows)).split(size))


def score_with(model):
    return lambda part, members: model(part.input_ids, part.attention_mask, part.completion_mask, members)


def peft_member(model, k, kind, dtype, **more):
    """Member k as a PEFT model."""
    with scoped(0):
        base = tiny_base(kind, dtype=dtype, layers=len(layers_of(model.base)))
        single = peft.get_peft_model(base, config(kind, **more)).eval()
    for name, layer in model.adapters():
        their = single.base_model.model.get_submodule(name)
        their.lora_A["default"].weight.data = layer.lora_A[k].data.clone()
        their.lora_B["default"].weight.data = layer.lora_B[k].data.clone()
    return single


def token_values(single, rows):
    logits = single(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None]).squeeze(-1)
    return chosen[rows.completion_mask[:, 1:]]


def layers_of(base):
    return base.base_model.h if hasattr(base.base_model, "h") else base.base_model.layers


def peft_gradients(kind, dtype, rows, model):
    # a loop over adapters of one model switches off gradients of the others, so each member is a model of its own
    singles = [peft_member(model, k, kind, dtype) for k in range(K)]
    value = torch.stack([token_values(single, rows) for single in singles])
    loss = loss_of(rows)(value, torch.arange(len(rows)))
    loss.backward()
    out = {}
    for name, _ in model.adapters():
        theirs = [single.base_model.model.get_submodule(name) for single in singles]
        out[name] = (
            torch.stack([layer.lora_A["default"].weight.grad for layer in theirs]),
            torch.stack([layer.lora_B["default"].weight.grad for layer in theirs]),
        )
    return loss.detach(), out


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in found:
        for x, y in zip(found[name], expected[name], strict=True):
            assert float((x - y).abs().max()) <= tolerance * float(y.abs().max()), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_route_gives_the_gradients_of_peft(kind, dtype, tolerance):
    rows = tiny_batch()
    model = stacked(kind, dtype)
    value, expected = peft_gradients(kind, dtype, rows, model)
    score, loss = score_with(model), loss_of(rows)
    whole = stacked_pass(score, rows, blocks_of(rows, 6), loss, torch.Tensor.backward)
    assert float(whole) == pytest.approx(float(value), rel=tolerance)
    assert_same(gradients(model), expected, tolerance)
    stacked_pass(score, rows, blocks_of(rows, 2), loss, torch.Tensor.backward)
    assert_same(gradients(model), expected, tolerance)
    two_pass(score, rows, blocks_of(rows, 4), loss, torch.Tensor.backward, num_members=K)
    assert_same(gradients(model), expected, tolerance)
    # checkpointed, against the models without it
    model.gradient_checkpointing_enable()
    model.train()
    stacked_pass(score, rows, blocks_of(rows, 2), loss, torch.Tensor.backward)
    assert_same(gradients(model), expected, tolerance)
    two_pass(score, rows, blocks_of(rows, 4), loss, torch.Tensor.backward, num_members=K)
    assert_same(gradients(model), expected, tolerance)


def test_checkpointed_layers_are_computed_again_under_the_members_of_their_forward_pass():
    rows, model = tiny_batch(), stacked()
    score, loss = score_with(model), loss_of(rows)
    stacked_pass(score, rows, blocks_of(rows, 6), loss, torch.Tensor.backward)
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    model.train()
    stacked_pass(score, rows, blocks_of(rows, 3), loss, torch.Tensor.backward)
    assert_same(gradients(model), expected, 1e-12)
    two_pass(score, rows, blocks_of(rows, 6), loss, torch.Tensor.backward, num_members=K)
    assert_same(gradients(model), expected, 1e-12)
    # members one by one, joint backward when another is chosen: the case that goes wrong in a loop over adapters
    value = torch.cat([score(rows, (k, k + 1)) for k in range(K)])
    loss(value, torch.arange(6)).backward()
    assert_same(gradients(model), expected, 1e-12)
    with pytest.raises(ConfigError, match="reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_below_the_first_adapted_one_run_once(kind):
    rows = tiny_batch()
    upper = stacked(kind, layers=3, layers_to_transform=[1, 2])
    assert upper._repeats_inside
    singles = [peft_member(upper, k, kind, torch.float64, layers_to_transform=[1, 2]) for k in range(K)]
    value = torch.stack([token_values(single, rows) for single in singles])
    seen = []
    for layer in layers_of(upper.base):
        layer.register_forward_hook(lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).shape[0]))
    found = score_with(upper)(rows, None)
    assert seen == [6, 18, 18]
    assert torch.allclose(found, value, rtol=1e-12, atol=1e-12)
    assert torch.allclose(score_with(upper)(rows, (1, 2)), value[1:2], rtol=1e-12, atol=1e-12)
    one = rows.take(torch.tensor([4]))
    assert torch.allclose(score_with(upper)(one, None), value[:, rows.token_row == 4], rtol=1e-12, atol=1e-12)
    upper.gradient_checkpointing_enable()
    upper.train()
    stacked_pass(score_with(upper), rows, blocks_of(rows, 6), loss_of(rows), torch.Tensor.backward)
    again = gradients(upper)
    upper.gradient_checkpointing_disable()
    stacked_pass(score_with(upper), rows, blocks_of(rows, 2), loss_of(rows), torch.Tensor.backward)
    assert_same(gradients(upper), again, 1e-12)


def test_permuting_members_permutes_everything():
    rows, model, other = tiny_batch(), stacked(), stacked()
    order = torch.tensor([2, 0, 1])
    for (_, a), (_, b) in zip(model.adapters(), other.adapters(), strict=True):
        b.lora_A.data, b.lora_B.data = a.lora_A.data[order].clone(), a.lora_B.data[order].clone()
    assert torch.allclose(score_with(other)(rows, None), score_with(model)(rows, None)[order], rtol=1e-13, atol=0)
    for each in (model, other):
        stacked_pass(score_with(each), rows, blocks_of(rows, 3), loss_of(rows), torch.Tensor.backward)
    first = {name: (a[order], b[order]) for name, (a, b) in gradients(model).items()}
    assert_same(gradients(other), first, 1e-12)


def test_full_adapters_over_half_precision():
    rows, exact = tiny_batch(), stacked(dtype=torch.float64)
    half = stacked(dtype=torch.bfloat16)
    assert {p.dtype for p in half.adapter_parameters()} == {torch.float32}
    value = score_with(half)(rows, None)
    assert value.dtype == torch.float32
    assert float((value - score_with(exact)(rows, None)).detach().abs().mean()) < 0.1
    stacked_pass(score_with(half), rows, blocks_of(rows, 3), loss_of(rows), torch.Tensor.backward)
    assert all(bool(p.grad.isfinite().all()) and p.grad.dtype == torch.float32 for p in half.adapter_parameters())


def test_members_start_apart_at_the_base():
    model, rows = StackedCausalLM(tiny_base(), config(), K, seed=5), tiny_batch()
    again = StackedCausalLM(tiny_base(), config(), 2, seed=5)
    base = model(rows.input_ids, rows.attention_mask, rows.completion_mask, adapters=False)
    assert base.shape[0] == 1
    assert torch.equal(score_with(model)(rows, None), base.expand(K, -1))
    for (_, a), (_, b) in zip(model.adapters(), again.adapters(), strict=True):
        assert torch.equal(a.lora_A[:2], b.lora_A)  # a member is the same whatever their number
        assert not torch.equal(a.lora_A[0], a.lora_A[1])
        assert float(a.lora_A.detach().abs().max()) <= a.lora_A.shape[-1] ** -0.5
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert float(StackedCausalLM(tiny_base("gpt2"), config("gpt2"), 1).base.transformer.drop.p) == 0.0


WRONG = {
    "dora": ({"use_dora": True}, "use_dora"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout"),
    "bias": ({"bias": "all"}, "bias"),
    "initial values": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "output head"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "only linear layers"),
    "nothing": ({"target_modules": ["query"]}, "q_proj"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be_an_ensembles(name):
    more, words = WRONG[name]
    with pytest.raises(ConfigError, match=words):
        StackedCausalLM(tiny_base(layers=1), config(**more), 2)


def test_other_errors():
    base = tiny_base(layers=1)
    with pytest.raises(ConfigError, match="num_members"):
        StackedCausalLM(base, config(), 0)
    StackedCausalLM(base, config(), 2)
    with pytest.raises(ConfigError, match="already"):
        StackedCausalLM(base, config(), 2)
    with pytest.raises(DataError, match=r"rows \[1\]"):
        completion_rows(torch.tensor([[False, True], [True, False]]))
    with scoped(0), pytest.raises(ShapeError, match="4 members"):
        StackedLoRA(torch.nn.Linear(3, 2), 4, 1, 1.0, Selection(4), torch.float32)(torch.zeros(6, 3))


def test_rows_are_cut_to_the_longest():
    rows = tiny_batch()
    part = rows.take(torch.tensor([3, 1]))
    assert isinstance(part, PaddedRows)
    assert part.input_ids.shape == (2, 5)
    assert part.token_row.tolist() == [0, 1, 1]
