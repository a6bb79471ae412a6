"""Laplace's approximation at an adapter: its Fisher matrix by enumeration, the evidence, and the spread of draws."""

import math

import pytest
import torch

from tests.llm.conftest import LORA, spread_members, tiny_base
from vifamily.errors import ConfigError, DataError
from vifamily.llm.rows import PairRow, Row

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from vifamily.llm._stacked import StackedCausalLM  # noqa: E402
from vifamily.llm.adapter_files import put  # noqa: E402
from vifamily.llm.laplace import adapter_laplace, evidence_precision  # noqa: E402

VOCAB = 7


def trained(members=1):
    config = peft.LoraConfig(**{**LORA, "r": 1}, target_modules=["q_proj"])
    model = StackedCausalLM(tiny_base(vocab=VOCAB, layers=1), config, members)
    spread_members(model)
    return model


def logits_of(model, ids):
    with model.selection.using((0, 1), 1):
        return model.base(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def test_the_fisher_matrix_of_answers_is_the_expected_square_of_the_slope(seed):
    model, rows = trained(), [Row((3, 4), (5, 6), (True, True)), Row((4, 6, 3), (2,), (True,))]
    parameters = list(model.adapter_parameters())
    expected = [torch.zeros_like(p[0]) for p in parameters]
    second = [torch.zeros_like(p[0]) for p in parameters]
    for row in rows:
        # by hand: for each place, the sum over the vocabulary of p times the squared slope; crossed terms vanish
        own = [torch.zeros_like(p[0]) for p in parameters]
        for place in range(len(row.completion_ids)):
            log_prob = logits_of(model, [*row.prompt_ids, *row.completion_ids])[len(row.prompt_ids) + place - 1]
            for token in range(VOCAB):
                slope = torch.autograd.grad(log_prob[token], parameters, retain_graph=True)
                for o, s in zip(own, slope, strict=True):
                    o += log_prob[token].exp().detach() * s[0].square()
        for e, v, o in zip(expected, second, own, strict=True):
            e += o
            v += o.square()
    draws = 400
    source = torch.Generator().manual_seed(seed)
    found = adapter_laplace(model, rows, generator=source, num_label_draws=draws, prior_precision=1.0)
    for pair in found.fisher.values():
        for value, e in zip(pair, expected, strict=True):
            # over all numbers together, at about five standard errors for squares of such tails
            assert float(value.sum()) == pytest.approx(float(e.sum()), rel=5 * 2 / math.sqrt(draws))


def test_the_fisher_matrix_of_preferences_is_exact():
    model, row = trained(), PairRow((3, 4), (5, 6), (2,))
    parameters, beta = list(model.adapter_parameters()), 0.7
    start = len(row.prompt_ids)

    def answer(ids):
        values = logits_of(model, [*row.prompt_ids, *ids])
        return sum(values[start + t - 1, token] for t, token in enumerate(ids))

    with torch.no_grad():
        keep = [(layer, layer.lora_B.clone()) for _, layer in model.adapters()]
        for layer, _ in keep:
            layer.lora_B.zero_()
        reference = answer(row.chosen_ids) - answer(row.rejected_ids)
        for layer, b in keep:
            layer.lora_B.copy_(b)
    p = [torch.sigmoid(sign * beta * (answer(row.chosen_ids) - answer(row.rejected_ids) - reference))
         for sign in (1, -1)]  # fmt: skip
    slopes = [torch.autograd.grad(q.log(), parameters, retain_graph=True) for q in p]
    found = adapter_laplace(model, [row], generator=torch.Generator(), beta=beta, prior_precision=1.0)
    values = [v for pair in found.fisher.values() for v in pair]
    for i, value in enumerate(values):
        expected = sum(q.detach() * s[i][0].square() for q, s in zip(p, slopes, strict=True))
        assert float((value - expected).abs().max() / expected.abs().max()) < 1e-6  # norms and angles are in float32


def test_the_prior_precision_is_where_the_evidence_is_largest():
    source = torch.Generator().manual_seed(0)
    h = torch.rand(20, generator=source, dtype=torch.float64) * 30
    theta = torch.randn(20, generator=source, dtype=torch.float64)

    def evidence(log_precision):
        x = math.exp(log_precision)
        return 0.5 * float((math.log(x) - (h + x).log() - x * theta.square()).sum())

    best = math.log(evidence_precision(h, theta))
    step = 1e-4
    assert (evidence(best + step) - evidence(best - step)) / (2 * step) == pytest.approx(0.0, abs=1e-6)
    assert evidence(best) > max(evidence(best + 0.1), evidence(best - 0.1))


def test_draws_have_the_spread_of_the_gaussian(seed):
    model = trained()
    found = adapter_laplace(
        model, [Row((3,), (5, 6), (True, True))], generator=torch.Generator().manual_seed(0), prior_precision=4.0
    )
    assert "of 16 numbers determined" in str(found)
    found.draw_members(model, 4000, generator=torch.Generator().manual_seed(seed))
    assert model.num_members == 4000 == len(model.log_weight)
    for name, layer in model.adapters():
        for matrix, mean, fisher in zip((layer.lora_A, layer.lora_B), found.mean[name], found.fisher[name],
                                        strict=True):  # fmt: skip
            scaled = (matrix.detach() - mean) * (fisher + 4.0).sqrt()
            # mean and variance of standard normals, over all numbers
            assert float(scaled.mean().abs()) < 5 / math.sqrt(scaled.numel())
            assert float(scaled.square().mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / scaled.numel()))


def test_members_that_are_put_are_scored_and_refusals():
    two, one = trained(2), trained(1)
    put(one, {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in two.adapters()})
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long),
             "completion_mask": torch.tensor([[False, True, True]])}  # fmt: skip
    assert torch.equal(one.row_log_prob(**batch), two.row_log_prob(**batch))
    source = torch.Generator()
    with pytest.raises(DataError, match="no rows"):
        adapter_laplace(one, [], generator=source)
    with pytest.raises(ConfigError, match="member must be"):
        adapter_laplace(one, [Row((3,), (5,), (True,))], generator=source, member=2)
    with pytest.raises(ConfigError, match="prior_precision"):
        adapter_laplace(one, [Row((3,), (5,), (True,))], generator=source, prior_precision=0.0)
