"""An ensemble in use: scores against PEFT and by hand, answers whose law is the mixture's, weights from a context."""

import itertools
import math
from collections import Counter

import pytest
import torch

from tests.llm.conftest import spread_members, tiny_base
from vifamily.errors import CheckpointError, ConfigError, DataError, ShapeError

peft = pytest.importorskip("peft")

from vifamily.llm import (  # noqa: E402
    Ensemble,
    PairRow,
    Row,
    StackedCausalLM,
    save_base,
    save_members,
    tiny_model,
    tiny_tokenizer,
)
from vifamily.llm._decode import picker  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

K = 3
WEIGHT = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def made(kind="llama", vocab=37, layers=None, weight=WEIGHT):
    settings = {"r": 3, "lora_alpha": 6} | ({"layers_to_transform": layers} if layers else {})
    if kind != "gpt2":
        settings["target_modules"] = ["q_proj", "v_proj", "up_proj"]
    model = StackedCausalLM(tiny_base(kind, vocab=vocab), peft.LoraConfig(**settings), K, seed=4)
    spread_members(model)
    with torch.no_grad():
        for _, layer in model.adapters():
            layer.lora_B.mul_(3)  # members that differ much
        model.log_weight.copy_(weight.log())
    return Ensemble(model)


@pytest.fixture(scope="module")
def ensemble():
    return made(layers=[1])


@pytest.fixture(scope="module")
def small():
    """Of five tokens, so that all answers can be written down; 2 ends an answer."""
    return made(vocab=5)


def answers_up_to(length, vocab=5, end=2):
    """Every answer of at most so many tokens, complete or cut off there."""
    out = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(vocab), repeat=size):
            inner = end not in tokens[:-1]
            if inner and (tokens[-1] == end or size == length):
                out.append(tokens)
    return out


def whole(prompt, answer):
    return Row(prompt, answer, (True,) * len(answer))


# --- scores ---


def test_scores_are_those_of_members_alone(ensemble):
    rows = [whole((3, 4, 5), (6, 7, 2)), whole((8,), (9, 10, 11, 2)), Row((5, 6), (7, 8, 9), (True, False, True))]
    found = ensemble.log_likelihood(rows, batch_size=2)
    for k, (i, row) in itertools.product(range(K), enumerate(rows)):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with ensemble.model.selection.using((k, k + 1), 1), torch.no_grad():
            logits = ensemble.model.base(input_ids=ids).logits[0].log_softmax(-1)
        start = len(row.prompt_ids)
        by_hand = sum(
            float(logits[start + t - 1, token])
            for t, (token, counts) in enumerate(zip(row.completion_ids, row.scored, strict=True))
            if counts
        )
        assert float(found[k, i]) == pytest.approx(by_hand, abs=1e-10)
    score = ensemble.score(rows)
    assert torch.allclose(score.mixture, (WEIGHT[:, None] * found.exp()).sum(0).log(), atol=1e-10)
    assert float(score.member_mean) == pytest.approx(float((WEIGHT @ found).mean()), abs=1e-10)
    routed = ensemble.responsibilities(rows, alpha=0.5)
    weight = WEIGHT[:, None] * (0.5 * found).exp()
    assert torch.allclose(routed.weight, weight / weight.sum(0), atol=1e-10)


def test_groups_are_routed_as_one(ensemble):
    rows = [
        Row((3,), (4, 5), (True, True), group="a"),
        Row((3,), (6, 5), (True, True), group="b"),
        Row((8,), (9, 2), (True, True), group="a"),
    ]
    found = ensemble.log_likelihood(rows)
    routed = ensemble.responsibilities(rows, group=True)
    assert routed.unit_names == ("a", "b")
    joint = WEIGHT * (found[:, 0] + found[:, 2]).exp()
    assert torch.allclose(routed.weight[:, 0], joint / joint.sum(), atol=1e-10)
    with pytest.raises(DataError, match="rows have no group"):
        ensemble.responsibilities([whole((3,), (4,))], group=True)


def test_preferences_have_the_base_as_reference(ensemble):
    pair = PairRow((3, 4), (5, 2), (6, 7, 2))
    found = ensemble.preference_log_likelihood([pair], beta=0.5)[:, 0]
    both = [whole(pair.prompt_ids, pair.chosen_ids), whole(pair.prompt_ids, pair.rejected_ids)]
    ll = ensemble.log_likelihood(both)
    reference = []
    for row in both:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with ensemble.model.selection.using(None, 1), torch.no_grad():
            logits = ensemble.model.base(input_ids=ids).logits[0].log_softmax(-1)
        reference.append(sum(float(logits[1 + t, token]) for t, token in enumerate(row.completion_ids)))
    margin = (ll[:, 0] - reference[0]) - (ll[:, 1] - reference[1])
    assert torch.allclose(found, torch.nn.functional.logsigmoid(0.5 * margin), atol=1e-10)
    assert float(margin.std()) > 0.1
    with pytest.raises(ConfigError, match="beta must be positive"):
        ensemble.preference_log_likelihood([pair], beta=0)


# --- answers ---


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [None, [1]])  # with and without layers that members share
def test_answers_have_the_probability_that_scoring_gives(kind, layers, generator):
    ensemble = made(kind, layers=layers)
    prompts = [(3, 4, 5), (6, 7), (3, 8, 5)]
    found = ensemble.generate(
        prompts, speaker="mixture", num_answers=2, generator=generator, max_new_tokens=6, batch_size=3
    )
    assert [a.prompt for a in found] == [0, 0, 1, 1, 2, 2]
    ll = ensemble.log_likelihood([whole(prompts[a.prompt], a.token_ids) for a in found])
    for i, answer in enumerate(found):
        joint = WEIGHT.log() + ll[:, i]
        assert answer.log_prob == pytest.approx(float(joint.logsumexp(0)), abs=1e-10)
        assert torch.allclose(answer.log_weight, joint.log_softmax(0), atol=1e-10) and answer.member is None
    alone = ensemble.generate(prompts, speaker="member", member=1, generator=generator, max_new_tokens=6)
    ll = ensemble.log_likelihood([whole(prompts[a.prompt], a.token_ids) for a in alone])
    assert [a.log_prob for a in alone] == pytest.approx(ll[1].tolist(), abs=1e-10)
    assert {a.member for a in alone} == {1}


def test_probabilities_of_all_answers_sum_to_one(small):
    every = answers_up_to(3)
    ll = small.log_likelihood([whole((3, 4), a) for a in every])
    assert torch.allclose(ll.exp().sum(1), torch.ones(K, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("speaker", ["draw", "mixture"])
def test_answers_are_drawn_from_the_mixture_of_whole_answers(small, speaker, seed):
    source = torch.Generator().manual_seed(seed)
    count = 2000
    found = small.generate(
        [(3, 4)], speaker=speaker, num_answers=count, generator=source, max_new_tokens=2, batch_size=500
    )
    every = answers_up_to(2)
    ll = small.log_likelihood([whole((3, 4), a) for a in every])
    p = dict(zip(every, (WEIGHT @ ll.exp()).tolist(), strict=True))
    times = Counter(a.token_ids for a in found)
    assert set(times) <= set(p)
    for answer, probability in p.items():
        error = math.sqrt(count * probability * (1 - probability)) + 1
        assert abs(times[answer] - count * probability) < 5 * error, answer
    if speaker == "draw":
        said = Counter(a.member for a in found)
        assert all(
            abs(said[k] - count * float(WEIGHT[k])) < 5 * math.sqrt(count * float(WEIGHT[k] * (1 - WEIGHT[k])))
            for k in range(K)
        )


def test_the_likeliest_tokens_need_no_generator(ensemble):
    (first,) = ensemble.generate([(3, 4)], speaker="mixture", temperature=0, max_new_tokens=3)
    best = (WEIGHT[:, None] * ensemble.next_log_prob([(3, 4)])[:, 0].exp()).sum(0).argmax()
    assert first.token_ids[0] == int(best)
    again = ensemble.generate([(3, 4), (3, 4)], speaker="mixture", temperature=0, max_new_tokens=3)
    assert {a.token_ids for a in again} == {first.token_ids}


def test_answers_stop_at_their_end(small, generator):
    found = small.generate([(3, 4)], speaker="mixture", num_answers=50, generator=generator, max_new_tokens=8)
    assert all(2 not in a.token_ids[:-1] for a in found)
    assert any(len(a.token_ids) < 8 for a in found) and all(len(a.token_ids) <= 8 for a in found)


def test_draws_are_cut_to_the_likeliest():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log().expand(4000, 4)
    source = torch.Generator().manual_seed(0)
    for options, kept in (({"top_k": 2}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.49}, {0}), ({}, {0, 1, 2, 3})):
        assert set(picker(source, **options)(p).tolist()) == kept, options
    share = float((picker(source, temperature=2.0)(p) == 0).double().mean())
    flat = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    wanted = float(flat[0] / flat.sum())
    assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 4000)


# --- uncertainty and context ---


def test_first_token_uncertainty_by_hand(ensemble):
    prompts = [(3, 4, 5), (6, 7), (8, 9, 10)]
    found = ensemble.first_token(prompts)
    for i, prompt in enumerate(prompts):
        p = ensemble.log_likelihood([whole(prompt, (token,)) for token in range(37)], batch_size=40).exp()
        mean = WEIGHT @ p
        total = float(torch.special.entr(mean).sum())
        inside = float(WEIGHT @ torch.special.entr(p).sum(1))
        assert float(found.total[i]) == pytest.approx(total, abs=1e-9)
        assert float(found.epistemic[i]) == pytest.approx(total - inside, abs=1e-9)


def test_information_of_answers_agrees_with_enumeration(small, seed):
    source = torch.Generator().manual_seed(seed)
    prompts = [(3, 4), (4, 1, 3)]
    found = small.information(prompts, generator=source, answers_per_member=150, max_new_tokens=2)
    assert found.value.shape == (2,)
    for i, prompt in enumerate(prompts):
        p = small.log_likelihood([whole(prompt, a) for a in answers_up_to(2)]).exp()
        mean = WEIGHT @ p
        exact = float((WEIGHT[:, None] * p * (p / mean).log()).sum())
        assert abs(float(found.value[i]) - exact) < 5 * float(found.error[i])


def test_contexts_give_posterior_weights(ensemble):
    rows = [whole((3, 4), (5, 2)), whole((6,), (7, 2))]
    ll = ensemble.log_likelihood(rows).sum(1)
    wanted = (WEIGHT.log() + ll).log_softmax(0)
    assert torch.allclose(ensemble.infer_log_weight(rows), wanted, atol=1e-10)
    pairs = [PairRow((3, 4), (5, 2), (6, 7, 2))]
    wanted = (WEIGHT.log() + ensemble.preference_log_likelihood(pairs, beta=0.5)[:, 0]).log_softmax(0)
    assert torch.allclose(ensemble.infer_log_weight(pairs, beta=0.5), wanted, atol=1e-10)
    one = torch.tensor([-math.inf, 0.0, -math.inf], dtype=torch.float64)
    (mixed,) = ensemble.generate([(3, 4)], speaker="mixture", log_weight=one, temperature=0, max_new_tokens=4)
    (alone,) = ensemble.generate([(3, 4)], speaker="member", member=1, temperature=0, max_new_tokens=4)
    assert mixed.token_ids == alone.token_ids and mixed.log_prob == pytest.approx(alone.log_prob, abs=1e-10)


# --- folders and texts ---


def test_folders_are_read_whole(tmp_path, generator):
    texts = ["copy : a b = a b", "blend : b a = b a"]
    tokenizer = tiny_tokenizer(texts, kind="word")
    save_base(tmp_path / "base", tiny_model(tokenizer, hidden_size=16, num_layers=2, num_heads=2), tokenizer)
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = StackedCausalLM(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), K)
    spread_members(model)
    with torch.no_grad():
        model.log_weight.copy_(WEIGHT.log())
    before = Ensemble(model, tokenizer)
    save_members(model, tmp_path / "ensemble", training={"alpha": 0.8})
    after = Ensemble.from_pretrained(tmp_path / "ensemble")
    records = [{"prompt": "copy : a b =", "completion": " a b"}]
    assert torch.equal(after.log_likelihood(records), before.log_likelihood(records))
    assert torch.equal(after.log_weight, before.log_weight) and after.manifest.training == {"alpha": 0.8}
    (answer,) = after.generate(["copy : a b ="], generator=generator, max_new_tokens=3)
    assert "<|end|>" not in answer.text and len(answer.token_ids) <= 3
    chat = [{"role": "user", "content": "copy : a b ="}]
    assert len(after.generate([chat, "copy : a"], speaker="member", member=2, temperature=0, max_new_tokens=2)) == 2
    prompt_weight = after.infer_log_weight("copy : a b =")
    assert prompt_weight.shape == (K,) and float(prompt_weight.exp().sum()) == pytest.approx(1)
    assert after.infer_log_weight(chat).shape == (K,)
    with pytest.raises(ConfigError, match="prompts must be a list of prompts"):
        after.generate("copy : a b =", generator=generator)
    with pytest.raises(CheckpointError, match="ensemble.json"):
        Ensemble.from_pretrained(tmp_path / "base")


def test_bad_arguments_are_refused(ensemble, generator):
    prompts = [(3, 4)]
    with pytest.raises(ConfigError, match="speaker must be one of draw, mixture, member, got 'all'"):
        ensemble.generate(prompts, speaker="all")
    with pytest.raises(ConfigError, match='member= goes with speaker="member"'):
        ensemble.generate(prompts, member=1)
    with pytest.raises(ConfigError, match='member= goes with speaker="member"'):
        ensemble.generate(prompts, speaker="member")
    with pytest.raises(ConfigError, match="member must be from 0 to 2, got 3"):
        ensemble.generate(prompts, speaker="member", member=3, temperature=0)
    with pytest.raises(ConfigError, match="needs a generator"):
        ensemble.generate(prompts)
    with pytest.raises(ConfigError, match="drawing members needs a generator"):
        ensemble.generate(prompts, temperature=0)
    with pytest.raises(ConfigError, match="temperature must be a finite number from 0"):
        ensemble.generate(prompts, temperature=-1, generator=generator)
    with pytest.raises(ConfigError, match="top_p must be above 0"):
        ensemble.generate(prompts, top_p=0, generator=generator)
    with pytest.raises(ConfigError, match="top_k must be a positive integer"):
        ensemble.generate(prompts, top_k=0, generator=generator)
    with pytest.raises(ConfigError, match="max_new_tokens must be a positive integer"):
        ensemble.generate(prompts, generator=generator, max_new_tokens=0)
    with pytest.raises(ConfigError, match="texts need a tokenizer"):
        ensemble.generate(["copy"], generator=generator)
    with pytest.raises(ConfigError, match="texts need a tokenizer"):
        ensemble.log_likelihood([{"text": "copy"}])
    with pytest.raises(DataError, match="there are no prompts"):
        ensemble.generate([], generator=generator)
    with pytest.raises(ShapeError, match=r"log_weight must have shape \(3,\)"):
        ensemble.first_token(prompts, log_weight=torch.zeros(2))
