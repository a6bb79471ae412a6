"""Latent adapters of a language model: the same numbers as stacked members, the contracts of models, small fits."""

import dataclasses

import pytest
import torch

import vifamily as vf
from tests.llm.conftest import spread_members, tiny_base
from vifamily.diagnostics.routing import mixture_log_score
from vifamily.errors import ConfigError, DataError
from vifamily.numerics.soft_routing import power_value
from vifamily.rng import scoped
from vifamily.testing import check_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from vifamily.llm import PairRow, Row, StackedCausalLM  # noqa: E402
from vifamily.llm._passes import PaddedRows  # noqa: E402
from vifamily.llm._routed import pair_loss, supervised_loss  # noqa: E402
from vifamily.llm.rows import collate_pairs, collate_sft  # noqa: E402
from vifamily.models import CausalLM  # noqa: E402
from vifamily.objectives import RenyiPredictive  # noqa: E402
from vifamily.types import Draw  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

K, RANK = 3, 2
ROWS = [
    Row((3, 4), (5, 6, 2), (True, True, True), group="a"),
    Row((7,), (8, 2), (True, True), group="b"),
    Row((5, 6), (7, 8, 9), (True, False, True), group="a"),
]
PAIRS = [
    PairRow((3, 4), (5, 2), (6, 7, 2), group="a"),
    PairRow((8,), (9, 10, 2), (11, 2), group="b"),
    PairRow((3,), (9, 2), (8, 2), group="a"),
]
WEIGHTS = f"lora(rank={RANK}, scale=4.0, include='*q_proj, *v_proj')"


def members():
    config = peft.LoraConfig(r=RANK, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = StackedCausalLM(tiny_base(), config, K, seed=4)
    spread_members(model)
    return model.eval()


def flat(stacked, values=None):
    """Adapters of each member as one vector, ``(member, dim)``, layer by layer."""
    parts = []
    for _, layer in stacked.adapters():
        for p in (layer.lora_A, layer.lora_B):
            parts.append((p if values is None else values(p)).detach().flatten(1))
    return torch.cat(parts, 1)


class Points:
    """A family of given points."""

    capabilities = frozenset()

    def __init__(self, z):
        self.z = z

    def __call__(self, noise, context=None):
        weight = torch.full((len(self.z),), 1 / len(self.z), dtype=self.z.dtype)
        return Draw(z=self.z, log_q=None, log_weight=weight.log())


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["answers", "preferences"])
def test_likelihoods_and_gradients_are_those_of_stacked_members(rows):
    stacked, beta, alpha = members(), 0.5, 0.7
    model = CausalLM(tiny_base(), rows, weights=WEIGHTS, beta=beta)
    assert model.layer_names == stacked.target_names
    z = flat(stacked).requires_grad_()
    loss = power_value(model.log_likelihood(z), z.new_zeros(K), alpha).sum()
    (ours,) = torch.autograd.grad(loss, z)
    pairs = rows is PAIRS
    batch = PaddedRows(**(collate_pairs if pairs else collate_sft)(rows, 0))
    value = stacked(batch.input_ids, batch.attention_mask, batch.completion_mask)
    weight = torch.zeros(K, dtype=torch.float64)
    group = torch.arange(len(rows))
    if pairs:
        with torch.no_grad():
            reference = stacked.row_log_prob(
                batch.input_ids, batch.attention_mask, batch.completion_mask, adapters=False
            )[0]
        theirs, _ = pair_loss(value, batch.token_row, group, reference, "sequence", alpha, weight, beta)
    else:
        theirs, _ = supervised_loss(value, batch.token_row, group, "sequence", alpha, weight)
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-10)
    theirs.backward()
    assert torch.allclose(ours, flat(stacked, lambda p: p.grad), atol=1e-10)


def test_objective_of_the_registry_is_the_loss_of_training():
    stacked = members()
    model = CausalLM(tiny_base(), ROWS, weights=WEIGHTS)
    z = flat(stacked).requires_grad_()
    found = RenyiPredictive(alpha=0.7, unit="group", estimator="cross").loss(Points(z), model, torch.zeros(1, 0))
    batch = PaddedRows(**collate_sft(ROWS, 0))
    value = stacked(batch.input_ids, batch.attention_mask, batch.completion_mask)
    group = torch.tensor([0, 1, 0])
    theirs, _ = supervised_loss(value, batch.token_row, group, "group", 0.7, torch.zeros(K, dtype=torch.float64))
    prior = -model.log_prior(z).mean()
    assert float(found.surrogate.detach()) == pytest.approx(float((theirs + prior).detach()), abs=1e-9)


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["answers", "preferences"])
def test_it_keeps_the_contracts_of_models(rows):
    # a kind of base that computes in double precision throughout; Llama takes its norms in single
    config = transformers.GPTNeoXConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with scoped(0):
        base = transformers.AutoModelForCausalLM.from_config(config).double()
    weights = "lora(rank=2, include='*query_key_value, *dense')"
    assert CausalLM(base, rows, weights=weights, beta=0.5).num_groups == 2
    alone = [dataclasses.replace(row, group=None) for row in rows]
    model = CausalLM(base, alone, weights=weights, beta=0.5)
    assert {"draws_apart", "score", "minibatches", "gaussian_prior"} <= set(check_model(model).passed)


def test_zero_is_the_base_and_the_base_is_left_alone():
    base = tiny_base()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = CausalLM(base, ROWS, weights=WEIGHTS)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters()) and list(model.parameters()) == []
    zero = torch.zeros(1, model.dim, dtype=torch.float64)
    for i, row in enumerate(ROWS):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logits = base(input_ids=ids).logits[0].log_softmax(-1).detach()
        start = len(row.prompt_ids)
        by_hand = sum(
            float(logits[start + t - 1, token])
            for t, (token, counts) in enumerate(zip(row.completion_ids, row.scored, strict=True))
            if counts
        )
        assert float(model.log_likelihood(zero)[0, i]) == pytest.approx(by_hand, abs=1e-10)
    even = CausalLM(base, PAIRS, weights=WEIGHTS).log_likelihood(zero)
    assert torch.allclose(even, torch.full_like(even, 0.5).log(), atol=1e-10)
    mean, sd = model.initial_gaussian(generator=torch.Generator().manual_seed(0))
    start = model.log_likelihood(mean.unsqueeze(0))
    assert torch.allclose(start, model.log_likelihood(zero), atol=1e-10) and float(sd.min()) > 0


def test_fits_learn_and_members_differ():
    model = CausalLM(tiny_base(), ROWS[:2], weights=WEIGHTS)
    found = vf.fit(
        model, family="ensemble(size=2)", objective="renyi_predictive(alpha=0.5)", seed=0, steps=30, progress=False
    )
    z = found.family(torch.zeros(1, 0, dtype=torch.float64)).z.detach()
    base = model.log_likelihood(torch.zeros(1, model.dim, dtype=torch.float64)).sum()
    assert float(model.log_likelihood(z).sum(1).min()) > float(base) + 1
    assert float((z[0] - z[1]).norm()) > 0.1


def test_other_laws_of_adapters_fit_too():
    model = CausalLM(tiny_base(), ROWS[:2], weights=WEIGHTS)
    found = vf.fit(model, family="mean_field", objective="elbo", seed=0, steps=30, progress=False)
    draws = found.draws(20)
    base = model.log_likelihood(torch.zeros(1, model.dim, dtype=torch.float64)).sum()
    assert float(model.log_likelihood(draws).sum(1).mean()) > float(base)


def test_walsh_hadamard_adapters_begin_at_the_base_and_their_draws_are_scored_as_a_mixture():
    weights = "walsh_hadamard(residual=True, include='*q_proj, *v_proj')"
    model, low_rank = (CausalLM(tiny_base(), ROWS[:2], weights=w) for w in (weights, WEIGHTS))
    assert model.dim == 4 * 16  # the side of each of four layers, where a rank costs 32 or 24
    zero = [torch.zeros(1, m.dim, dtype=torch.float64) for m in (model, low_rank)]
    assert torch.allclose(model.log_likelihood(zero[0]), low_rank.log_likelihood(zero[1]), atol=1e-12)
    found = vf.fit(model, family="mean_field", objective="elbo", seed=0, steps=30, progress=False)
    ll = model.log_likelihood(found.draws(20))
    assert float(ll.sum(1).mean()) > float(model.log_likelihood(zero[0]).sum())
    score = mixture_log_score(ll, torch.zeros(20, dtype=torch.float64))
    assert score.mixture_mean >= score.member_mean


def test_bad_arguments_are_refused():
    base = tiny_base()
    with pytest.raises(ConfigError, match="chooses no layer of LlamaForCausalLM"):
        CausalLM(base, ROWS, weights="lora(rank=2, include='c_attn')")
    with pytest.raises(ConfigError, match="base must be a causal language model"):
        CausalLM(torch.nn.Identity(), ROWS)
    with pytest.raises(DataError, match="at least one and of one kind"):
        CausalLM(base, [])
    with pytest.raises(DataError, match="at least one and of one kind"):
        CausalLM(base, [ROWS[0], PAIRS[0]])
    with pytest.raises(ConfigError, match="beta must be a positive number, got 0"):
        CausalLM(base, PAIRS, beta=0)
