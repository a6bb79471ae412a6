"""The predicted transition of adapters: thresholds known in closed form, and matrices formed by hand."""

import itertools

import pytest
import torch

from tests.llm.conftest import spread_members, tiny_base
from vifamily.errors import ConfigError, DataError

peft = pytest.importorskip("peft")

from vifamily.diagnostics._stability_units import Units  # noqa: E402
from vifamily.llm import PairRow, Row, StackedCausalLM, adapter_stability  # noqa: E402
from vifamily.llm.critical import _drawn, _only  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

DAMPING = 1e-3


def made(vocab=37, members=1, seed=4):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    model = StackedCausalLM(tiny_base(vocab=vocab), config, members, seed=seed)
    spread_members(model)
    return model.eval()


def whole(prompt, answer, group=None):
    return Row(prompt, answer, (True,) * len(answer), group=group)


def gradient(model, value):
    parts = torch.autograd.grad(value, list(model.adapter_parameters()))
    return torch.cat([p.reshape(-1) for p in parts])


def critical(fisher, scores):
    """By the matrices themselves, with relative damping."""
    raised = fisher + DAMPING * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype)
    second = scores.T @ scores / len(scores)
    return 1 / float(torch.linalg.eigvals(torch.linalg.solve(raised, second)).real.max())


def row_scores(model, rows):
    out = []
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        scored = torch.tensor([[False] * len(row.prompt_ids) + list(row.scored)])
        out.append(gradient(model, model.row_log_prob(ids, torch.ones_like(ids), scored)[0, 0]))
    return torch.stack(out)


PAIRS = [PairRow((3, 4), (5, 2), (6, 7, 2)), PairRow((8,), (9, 10, 2), (11, 2)), PairRow((3, 9), (4, 2), (7, 2))]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_groups_of_one_pair_split_at_one_over_their_size(size, generator):
    # a group that decides the same pair m times the same way: scores add up m-fold, information as m independent pairs
    signs = [1, 1, -1, -1, 1, -1]
    pair = PAIRS[0]
    rows = []
    for number, sign in enumerate(signs):
        chosen, rejected = (pair.chosen_ids, pair.rejected_ids)[::sign]
        rows += [PairRow(pair.prompt_ids, chosen, rejected, group=str(number)) for _ in range(size)]
    model = made()
    with torch.no_grad():  # at the base each pair is even, which these groups are on average
        for _, layer in model.adapters():
            layer.lora_B.zero_()
    found = adapter_stability(
        model, rows, unit="group", beta=0.5, generator=generator, damping=1e-9, sweep=(), search=False
    )
    assert found.alpha_star == pytest.approx(1 / size, rel=1e-4)
    assert found.num_units == len(signs) and found.drift < 1e-12


def test_preferences_against_matrices_by_hand(generator):
    model, beta = made(), 0.5
    found = adapter_stability(model, PAIRS, 0.5, beta=beta, generator=generator, batch_size=2)
    scores, fisher = [], 0.0
    for pair in PAIRS:
        both = [whole(pair.prompt_ids, pair.chosen_ids), whole(pair.prompt_ids, pair.rejected_ids)]
        slopes = row_scores(model, both)
        ours, reference = [], []
        for row in both:
            ids = torch.tensor([row.prompt_ids + row.completion_ids])
            scored = torch.tensor([[False] * len(row.prompt_ids) + list(row.scored)])
            asked = (ids, torch.ones_like(ids), scored)
            ours.append(model.row_log_prob(*asked)[0, 0].detach())
            reference.append(model.row_log_prob(*asked, adapters=False)[0, 0])
        p = torch.sigmoid(beta * ((ours[0] - reference[0]) - (ours[1] - reference[1])))
        slope = beta * (slopes[0] - slopes[1])
        scores.append((1 - p) * slope)
        fisher = fisher + p * (1 - p) * torch.outer(slope, slope) / len(PAIRS)
    assert found.alpha_star == pytest.approx(critical(fisher, torch.stack(scores)), rel=1e-6)
    assert found.alpha == 0.5 and found.curvature == "fisher" and "alpha" in str(found)


ROWS = [whole((3, 4), (1, 3)), whole((4, 1, 3), (2,)), Row((1, 3), (4, 0, 2), (True, False, True)), whole((1,), (0, 1))]


@pytest.mark.parametrize("unit", ["sequence", "normalised", "token"])
def test_answers_against_matrices_by_hand(unit, generator):
    model = made(vocab=5)
    found = adapter_stability(
        model, ROWS, unit=unit, generator=generator, num_label_draws=None, search=False, batch_size=2
    )
    scores, fisher = [], 0.0
    for row in ROWS:
        over = sum(row.scored) if unit == "normalised" else 1
        each = []
        for place, (token, counts) in enumerate(zip(row.completion_ids, row.scored, strict=True)):
            if counts:
                before = row.prompt_ids + row.completion_ids[:place]
                slopes = row_scores(model, [whole(before, (v,)) for v in range(5)]) / over
                ids = [torch.tensor([[*before, v]]) for v in range(5)]
                mask = torch.tensor([[False] * len(before) + [True]])
                p = torch.stack([model.row_log_prob(i, torch.ones_like(i), mask)[0, 0].detach().exp() for i in ids])
                fisher = fisher + (p[:, None] * slopes).T @ slopes
                each.append(slopes[token])
        scores += each if unit == "token" else [sum(each)]
    assert found.num_units == len(scores)
    assert found.alpha_star == pytest.approx(critical(fisher / len(scores), torch.stack(scores)), rel=1e-6)


def test_drawn_answers_have_the_exact_information_on_average(generator):
    model, draws = made(vocab=5), 40
    rows = [whole((3, 4), (1, 3)), whole((1, 3), (4, 2))]
    with _only(model, 0) as parameters:
        squares = torch.stack(
            [
                Units(_drawn(model, rows, "sequence", generator, 2, 2), parameters, None).scores().square().sum(1)
                for _ in range(draws)
            ]
        )  # (draw, row)
    for i, row in enumerate(rows):
        answers = [whole(row.prompt_ids, a) for a in itertools.product(range(5), repeat=2) if a[0] != 2]
        answers.append(whole(row.prompt_ids, (2,)))
        ids = [torch.tensor([a.prompt_ids + a.completion_ids]) for a in answers]
        masks = [torch.tensor([[False] * len(a.prompt_ids) + list(a.scored)]) for a in answers]
        with torch.no_grad():
            p = torch.stack(
                [model.row_log_prob(d, torch.ones_like(d), m)[0, 0].exp() for d, m in zip(ids, masks, strict=True)]
            )
        assert float(p.sum()) == pytest.approx(1, abs=1e-10)
        norms = row_scores(model, answers).square().sum(1)
        mean = float(p @ norms)
        error = float((p @ norms.square() - mean**2) / draws) ** 0.5
        assert abs(float(squares[:, i].mean()) - mean) < 5 * error


@pytest.mark.parametrize("unit", ["token", "normalised"])
def test_other_units_of_answers(unit, generator):
    model = made()
    rows = [whole((3, 4), (5, 6, 2)), whole((7,), (8, 2)), Row((5, 6), (7, 8, 9), (True, False, True))]
    found = adapter_stability(model, rows, unit=unit, generator=generator, num_label_draws=4, search=False)
    if unit == "token":
        assert found.num_units == 3 + 2 + 2
    else:
        # scores of rows over their length, whatever labels were drawn
        counts = torch.tensor([3.0, 2.0, 2.0], dtype=torch.float64)
        scores = row_scores(model, rows) / counts[:, None]
        assert torch.allclose(found.pull, scores @ found.direction, atol=1e-10)


def test_one_member_is_looked_at_and_all_are_left_as_they_were(generator):
    model = made(members=3)
    model.train()
    before = {name: p for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in before.items()}
    found = adapter_stability(model, PAIRS, 0.9, member=1, beta=0.5, generator=generator)
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in before.items())
    assert model.training and all(p.grad is None for p in model.parameters())
    single = made()
    with torch.no_grad():
        for (_, one), (_, many) in zip(single.adapters(), model.adapters(), strict=True):
            one.lora_A.copy_(many.lora_A[1:2])
            one.lora_B.copy_(many.lora_B[1:2])
    alone = adapter_stability(single, PAIRS, 0.9, beta=0.5, generator=generator)
    assert found.alpha_star == pytest.approx(alone.alpha_star, rel=1e-9)


def test_bad_arguments_are_refused(generator):
    model = made()
    with pytest.raises(DataError, match="at least one and of one kind"):
        adapter_stability(model, [], generator=generator)
    with pytest.raises(DataError, match="at least one and of one kind"):
        adapter_stability(model, [PAIRS[0], whole((3,), (4,))], generator=generator)
    with pytest.raises(ConfigError, match="unit must be one of sequence, group, got 'token'"):
        adapter_stability(model, PAIRS, unit="token", generator=generator)
    with pytest.raises(DataError, match="rows have no group"):
        adapter_stability(model, PAIRS, unit="group", generator=generator)
    with pytest.raises(ConfigError, match="member must be from 0 to 0, got 1"):
        adapter_stability(model, PAIRS, member=1, generator=generator)
    with pytest.raises(ConfigError, match="beta must be positive"):
        adapter_stability(model, PAIRS, beta=-1, generator=generator)
    with pytest.raises(ConfigError, match="num_label_draws must be a positive integer"):
        adapter_stability(model, PAIRS, num_label_draws=0, generator=generator)
