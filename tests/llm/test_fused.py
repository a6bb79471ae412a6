"""The layer and its adapters in one node: the value and gradients of the products written out, and when it is used."""

import pytest
import torch
from torch import nn

from vifamily.llm._fused import adapted_linear, plain_weight
from vifamily.rng import scoped

SHAPES = {"x": (6, 4, 5), "W": (3, 5), "b": (3,), "A": (2, 2, 5), "B": (2, 3, 2)}


def drawn(seed, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=source, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


def written_out(x, W, b, A, B, scale):
    low = torch.einsum("kni,kri->knr", x.reshape(2, -1, 5), A)
    return nn.functional.linear(x, W, b) + scale * torch.einsum("knr,kor->kno", low, B).reshape(6, 4, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(bias, seed):
    t = drawn(seed)
    b = t["b"] if bias else None
    leaves = [t[k].requires_grad_() for k in ("x", "A", "B")]
    ours = adapted_linear(t["x"], t["W"], b, t["A"], t["B"], 0.7)
    theirs = written_out(t["x"], t["W"], b, t["A"], t["B"], 0.7)
    assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-13)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    for x, y in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-13)


def test_gradients_are_those_of_finite_differences(seed):
    t = drawn(seed)
    for k in ("x", "A", "B"):
        t[k].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, A, B: adapted_linear(x, t["W"], t["b"], A, B, 0.7), (t["x"], t["A"], t["B"])
    )


def test_frozen_inputs_and_views_as_inputs(seed):
    t = drawn(seed)
    turned = t["x"].transpose(0, 1).contiguous().transpose(0, 1)  # rows that are not one block of memory
    t["B"].requires_grad_()
    found = adapted_linear(turned, t["W"], None, t["A"], t["B"], 0.7)
    assert torch.allclose(found, written_out(t["x"], t["W"], None, t["A"], t["B"], 0.7), rtol=1e-13, atol=1e-13)
    found.sum().backward()
    assert t["B"].grad.shape == t["B"].shape and t["A"].grad is None


class Own(nn.Linear):
    """A layer that is not only a product."""

    def forward(self, x):
        return super().forward(x) + 1.0


def test_only_plain_frozen_layers_are_looked_into():
    with scoped(0):
        layer, own = nn.Linear(3, 2), Own(3, 2).requires_grad_(False)
        conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(2, 3).requires_grad_(False)
    assert plain_weight(layer) is None  # it is trained
    layer.requires_grad_(False)
    assert plain_weight(layer) == (layer.weight, layer.bias)
    assert plain_weight(own) is None
    layer.register_forward_hook(lambda m, a, out: out)
    assert plain_weight(layer) is None
    weight, bias = plain_weight(conv)
    assert torch.equal(weight, conv.weight.T) and bias is conv.bias
