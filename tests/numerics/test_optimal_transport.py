"""Entropic optimal transport against limits and closed forms."""

import itertools
import math

import pytest
import torch

from vifamily.numerics.optimal_transport import sinkhorn, sinkhorn_divergence

DOUBLE = torch.float64


def points(n, dim, seed, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def divergence(x, y, epsilon, iterations=2000, **weights):
    return sinkhorn_divergence(x, y, epsilon=epsilon, iterations=iterations, **weights)[0]


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 20.0])
def test_zero_between_equal_sets_and_positive_elsewhere(epsilon, seed):
    x = points(20, 3, seed)
    same = divergence(x, x[torch.arange(19, -1, -1)], epsilon)
    assert abs(float(same)) < 1e-6
    assert float(divergence(x, points(20, 3, seed + 1), epsilon)) > 1e-3


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 50.0])
def test_a_shift_costs_its_square_whatever_the_penalty(epsilon, seed):
    x, shift = points(15, 2, seed), torch.tensor([3.0, -4.0], dtype=DOUBLE)
    assert float(divergence(x, x + shift, epsilon)) == pytest.approx(25.0, rel=1e-6)


def test_a_small_penalty_gives_the_wasserstein_distance_of_sorted_points(seed):
    x, y = points(12, 1, seed), points(12, 1, seed + 1, scale=2.0, shift=1.0)
    exact = float((x.sort(0).values - y.sort(0).values).square().mean())
    assert float(divergence(x, y, 0.004, 5_000)) == pytest.approx(exact, rel=0.02)


def test_a_small_penalty_gives_the_best_assignment_in_the_plane(seed):
    x, y = points(5, 2, seed), points(5, 2, seed + 1)
    cost = torch.cdist(x, y).square()
    best = min(sum(float(cost[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(5))) / 5
    assert float(divergence(x, y, 0.004, 5_000)) == pytest.approx(best, rel=0.02)


def test_a_large_penalty_gives_the_squared_distance_of_the_means(seed):
    x, y = points(30, 2, seed), points(40, 2, seed + 1, scale=2.0, shift=1.0)
    exact = float((x.mean(0) - y.mean(0)).square().sum())
    assert float(divergence(x, y, 1e5)) == pytest.approx(exact, rel=1e-3)


def test_two_points_have_a_closed_form():
    # by symmetry the plan has p/2 on the diagonal and (1 - p)/2 off it
    epsilon, half = 0.7, torch.full((2,), math.log(0.5), dtype=DOUBLE)
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE)
    p = 1 / (1 + math.exp(-1 / epsilon))
    found = sinkhorn(cost, half, half, epsilon=epsilon, iterations=200)
    wanted = (1 - p) + epsilon * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert float(found.value) == pytest.approx(wanted)
    assert found.plan.tolist() == [pytest.approx([p / 2, (1 - p) / 2]), pytest.approx([(1 - p) / 2, p / 2])]


def test_marginals_are_met_on_sets_far_apart_with_unequal_weights(seed):
    x, y = points(6, 2, seed, scale=6.0, shift=30.0), points(40, 2, seed + 1)
    a, b = points(6, 1, seed)[:, 0].log_softmax(0), points(40, 1, seed + 1)[:, 0].log_softmax(0)
    plan = sinkhorn(torch.cdist(x, y).square(), a, b, epsilon=0.5, iterations=3000).plan
    assert torch.allclose(plan.sum(1), a.exp(), atol=1e-9) and torch.allclose(plan.sum(0), b.exp(), atol=1e-9)


@pytest.mark.parametrize("what", ["points", "weights"])
def test_gradient_is_that_of_the_value_by_differences(what, seed):
    x, y = points(7, 2, seed), points(9, 2, seed + 1, shift=0.5)
    logits, other = points(7, 1, seed + 2)[:, 0], points(9, 1, seed + 3)[:, 0].log_softmax(0)

    def both(v):
        at, own = (v, logits) if what == "points" else (x, v)
        return sinkhorn_divergence(
            at, y, epsilon=0.4, iterations=2000, log_weight_x=own.log_softmax(0), log_weight_y=other
        )

    start = x if what == "points" else logits
    leaf = start.clone().requires_grad_()
    (got,) = torch.autograd.grad(both(leaf)[1], [leaf])
    step = 1e-5
    for k in range(start.numel()):
        nudge = torch.zeros(start.numel(), dtype=DOUBLE)
        nudge[k] = step
        nudge = nudge.reshape(start.shape)
        wanted = float(both(start + nudge)[0] - both(start - nudge)[0]) / (2 * step)
        assert float(got.reshape(-1)[k]) == pytest.approx(wanted, abs=1e-7)


def test_leading_axes_are_problems_of_their_own(seed):
    x, y = points(24, 2, seed).reshape(3, 8, 2), points(10, 2, seed + 1)
    x[1] *= 4.0
    together, surrogate = sinkhorn_divergence(x, y, epsilon=0.5, iterations=1000)
    alone = torch.stack([divergence(part, y, 0.5, 1000) for part in x])
    assert surrogate.shape == (3,) and torch.allclose(together, alone, rtol=1e-9)


def test_a_point_written_twice_with_half_its_weight_changes_nothing(seed):
    x, y = points(5, 2, seed), points(8, 2, seed + 1)
    log_weight = torch.tensor([0.2] * 4 + [0.1] * 2, dtype=DOUBLE).log()
    twice = divergence(torch.cat([x, x[4:]]), y, 0.5, log_weight_x=log_weight)
    assert float(twice) == pytest.approx(float(divergence(x, y, 0.5)), abs=1e-9)


def test_extreme_sets_stay_finite():
    x = 1e4 * points(6, 2, 0)
    for dtype, epsilon in ((DOUBLE, 1e-3), (torch.float32, 0.5)):
        value, surrogate = sinkhorn_divergence(x.to(dtype), points(5, 2, 1).to(dtype), epsilon=epsilon, iterations=200)
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(surrogate)) and value.dtype == dtype
