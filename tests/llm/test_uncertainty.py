"""Uncertainties by hand, by enumeration of every answer, and by Monte Carlo."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.llm import (
    answer_clusters,
    behaviour,
    posterior_log_weight,
    sequence_information,
    split_uncertainty,
    split_uncertainty_along,
)


def binary_entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_parts_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64).log()
    found = split_uncertainty(p, torch.tensor([0.75, 0.25], dtype=torch.float64).log())
    mean = 0.75 * 0.9 + 0.25 * 0.2
    aleatoric = 0.75 * binary_entropy(0.1) + 0.25 * binary_entropy(0.2)
    assert float(found.total) == pytest.approx(binary_entropy(mean), abs=1e-12)
    assert float(found.aleatoric) == pytest.approx(aleatoric, abs=1e-12)
    assert float(found.epistemic) == pytest.approx(binary_entropy(mean) - aleatoric, abs=1e-12)
    assert float(found.vote_entropy) == pytest.approx(binary_entropy(0.25), abs=1e-12)
    assert float(found.bound) == pytest.approx(binary_entropy(0.25), abs=1e-12)
    assert float(found.normalised) == pytest.approx(float(found.epistemic) / binary_entropy(0.25), abs=1e-12)


def test_extremes() -> None:
    opposed = split_uncertainty(torch.eye(3, dtype=torch.float64).log())
    assert float(opposed.epistemic) == pytest.approx(math.log(3), abs=1e-12)
    assert float(opposed.aleatoric) == 0 and float(opposed.normalised) == pytest.approx(1, abs=1e-12)
    noise = split_uncertainty(torch.full((4, 5, 3), 1 / 3, dtype=torch.float64).log())
    assert noise.total.shape == (5,) and torch.allclose(noise.total, torch.full((5,), math.log(3)).double())
    assert bool((noise.epistemic < 1e-12).all())
    single = split_uncertainty(torch.tensor([[0.5, 0.5]]).log())
    assert float(single.epistemic) == 0 and float(single.normalised) == 0


def test_members_without_weight_and_their_order_do_not_matter(generator: torch.Generator) -> None:
    p = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    weight = torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64)
    found, fewer = split_uncertainty(p, weight.log()), split_uncertainty(p[:2], weight[:2].log())
    turned = split_uncertainty(p.flip(0), weight.flip(0).log())
    for name in ("total", "aleatoric", "epistemic", "vote_entropy", "bound"):
        assert torch.allclose(getattr(found, name), getattr(fewer, name), atol=1e-12)
        assert torch.allclose(getattr(found, name), getattr(turned, name), atol=1e-12)
    assert bool((found.epistemic <= found.bound + 1e-12).all())


class Languages:
    """Members that say words of two letters, three letters long, each by a table of its own."""

    length, letters = 3, 2

    def __init__(self, generator: torch.Generator) -> None:
        self.weight = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        self.next = {
            prefix: (2 * torch.randn(3, self.letters, generator=generator, dtype=torch.float64)).log_softmax(-1)
            for size in range(self.length)
            for prefix in itertools.product(range(self.letters), repeat=size)
        }
        self.answers = list(itertools.product(range(self.letters), repeat=self.length))

    def steps(self, answer: tuple[int, ...]) -> Tensor:
        return torch.stack([self.next[answer[:t]] for t in range(len(answer))], 1)  # (member, token, letter)

    def log_likelihood(self) -> Tensor:
        rows = [sum(self.next[a[:t]][:, a[t]] for t in range(self.length)) for a in self.answers]
        return torch.stack(rows, 1)  # (member, answer)

    def information(self) -> float:
        joint = self.weight[:, None] * self.log_likelihood().exp()
        alone = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
        return float((joint * (joint / alone).log()).sum())


def test_token_parts_add_up_to_that_of_the_answer(generator: torch.Generator) -> None:
    languages = Languages(generator)
    p = languages.log_likelihood().exp()
    mixture = languages.weight @ p
    total = sum(
        float(mixture[i])
        * float(split_uncertainty_along(languages.steps(a), torch.tensor(a), languages.weight.log()).epistemic.sum())
        for i, a in enumerate(languages.answers)
    )
    assert total == pytest.approx(languages.information(), abs=1e-10)


def test_first_token_has_the_weights_as_given_and_later_ones_are_updated() -> None:
    p = torch.tensor([[[0.9, 0.1]] * 2, [[0.1, 0.9]] * 2], dtype=torch.float64).log()
    found = split_uncertainty_along(p, torch.tensor([0, 1]))
    assert float(found.total[0]) == pytest.approx(math.log(2), abs=1e-12)
    assert float(found.total[1]) == pytest.approx(binary_entropy(0.9 * 0.9 + 0.1 * 0.1), abs=1e-12)
    both = split_uncertainty_along(torch.stack([p, p], 1), torch.tensor([[0, 1], [0, 1]]))
    assert torch.equal(both.total[0], found.total) and torch.equal(both.total[1], found.total)


def test_sequence_information_by_monte_carlo(generator: torch.Generator) -> None:
    languages = Languages(generator)
    ll = languages.log_likelihood()
    each = 400
    drawn = torch.multinomial(ll.exp(), each, replacement=True, generator=generator)  # (member, draw)
    who = torch.arange(3).repeat_interleave(each)
    found = sequence_information(ll[:, drawn.flatten()], who, languages.weight.log())
    assert abs(float(found.value) - languages.information()) < 5 * float(found.error)
    assert 0 < float(found.error) < 0.05
    assert found.bound == pytest.approx(float(torch.special.entr(languages.weight).sum()), abs=1e-12)


def test_sequence_information_is_exact_where_each_member_has_one_answer() -> None:
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64)
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert float(sequence_information(apart, torch.tensor([0, 1]), weight.log()).value) == pytest.approx(
        binary_entropy(0.25), abs=1e-12
    )
    same = torch.zeros(2, 2)
    assert float(sequence_information(same, torch.tensor([0, 1]), weight.log()).value) == pytest.approx(0, abs=1e-12)


def test_behaviour_by_hand() -> None:
    p = torch.tensor([[1.0, 0.2], [1.0, 0.9], [0.0, 0.4], [0.0, 0.1]], dtype=torch.float64)
    found = behaviour(p)
    assert found.probability.tolist() == pytest.approx([0.5, 0.4])
    assert found.variance.tolist() == pytest.approx([0.25, (0.04 + 0.25 + 0.0 + 0.09) / 4])
    assert found.vote_entropy.tolist() == pytest.approx([math.log(2), binary_entropy(0.25)])
    weighted = behaviour(p, torch.tensor([1.0, 1.0, 0.0, 0.0]).log())
    assert weighted.variance.tolist() == pytest.approx([0.0, 0.35**2])


def test_clusters_by_hand() -> None:
    found = answer_clusters(["a", "a", "b", "a", "b", "b"], [0, 0, 0, 1, 1, 1])
    assert float(found.total) == pytest.approx(math.log(2), abs=1e-12)
    assert float(found.aleatoric) == pytest.approx(binary_entropy(1 / 3), abs=1e-12)
    only = answer_clusters(["a", "b"], torch.tensor([2, 2]))  # members 0 and 1 said nothing and count for nothing
    assert float(only.total) == pytest.approx(math.log(2), abs=1e-12) and float(only.epistemic) == 0


def test_contexts_move_weights_by_their_likelihood() -> None:
    ll = torch.tensor([[-1.0, -2.0], [-2.0, -3.0]], dtype=torch.float64)
    prior = torch.tensor([0.2, 0.8], dtype=torch.float64)
    odds = 0.2 / 0.8 * math.exp(2.0)
    assert float(posterior_log_weight(ll, prior.log()).exp()[0]) == pytest.approx(odds / (1 + odds), abs=1e-12)
    odds = 0.2 / 0.8 * math.exp(1.0)
    cooled = posterior_log_weight(ll, prior.log(), temperature=2)
    assert float(cooled.exp()[0]) == pytest.approx(odds / (1 + odds), abs=1e-12)
    assert torch.allclose(posterior_log_weight(ll, prior.log(), temperature=math.inf).exp(), prior)
    many = posterior_log_weight(torch.stack([ll, ll], 1), prior.log())
    assert many.shape == (2, 2) and torch.equal(many[:, 0], posterior_log_weight(ll, prior.log()))


def test_bad_arguments_are_refused() -> None:
    half = torch.full((2, 2), 0.5).log()
    with pytest.raises(DataError, match="sum to one over the last axis, got sums of 1.5.* Pass log_prob.log_softmax"):
        split_uncertainty(torch.full((2, 3), 0.5).log())
    with pytest.raises(DataError, match="a log probability is NaN"):
        split_uncertainty(torch.tensor([[math.nan, 0.0]]))
    with pytest.raises(ShapeError, match=r"log_prob must have shape \(member, ..., class\), got \(2,\)"):
        split_uncertainty(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"log_weight must have shape \(2,\)"):
        split_uncertainty(half, torch.zeros(3))
    with pytest.raises(DataError, match="log weights must be finite"):
        split_uncertainty(half, torch.tensor([-math.inf, -math.inf]))
    with pytest.raises(ShapeError, match=r"answer \(..., token\)"):
        split_uncertainty_along(half.unsqueeze(1), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="tokens from 0 to 1"):
        split_uncertainty_along(half.unsqueeze(1), torch.tensor([2]))
    sure = torch.tensor([[[1.0, 0.0]] * 2] * 2).log()
    with pytest.raises(DataError, match="no member could have said the answer"):
        split_uncertainty_along(sure, torch.tensor([1, 0]))
    with pytest.raises(DataError, match=r"must lie in \[0, 1\], got 0.5 to 2"):
        behaviour(torch.tensor([0.5, 2.0]))
    with pytest.raises(DataError, match="member 1 has weight 0.5 and gave no answer"):
        sequence_information(torch.zeros(2, 2), torch.tensor([0, 0]))
    with pytest.raises(DataError, match="member 1 has weight and gave no answer"):
        answer_clusters(["a"], [0], torch.zeros(2))
    with pytest.raises(ShapeError, match="an answer is of member 2, and there are weights for 2"):
        answer_clusters(["a"], [2], torch.zeros(2))
    with pytest.raises(ConfigError, match="temperature must be positive, got 0"):
        posterior_log_weight(torch.zeros(2), temperature=0)
    with pytest.raises(DataError, match="probability zero under every member"):
        posterior_log_weight(torch.full((2,), -math.inf))
