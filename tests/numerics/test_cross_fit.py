"""Cross-fitting: every point judged by a fit without it, DeLong's error by hand, and bounds at separation."""

import math

import numpy as np
import pytest

from vifamily.numerics.arctangent_ratio import largest_variance
from vifamily.numerics.cross_fit import FittedAngle, OutOfFold, _score_ends, cross_fit, permuted_values


def by_hand(a, b):
    """Wins of each point against the other class, ties a half."""
    wins = (a[:, None] > b).astype(float) + 0.5 * (a[:, None] == b)
    return wins.mean(1), wins.mean(0)


def test_no_point_has_a_part_in_its_own_fit(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(23, 2)), rng.normal(size=(17, 2))

    def fit(pos, neg):
        seen = {tuple(row) for row in np.concatenate([pos, neg])}
        return lambda x: np.array([1.0 if tuple(row) in seen else 0.5 for row in x])

    found = cross_fit(a, b, fit, 5, rng)
    assert (found.angle_pos == 0.5).all()
    assert (found.angle_neg == 0.5).all()
    assert found.train_value == pytest.approx(math.sin(1) + math.cos(1), rel=1e-12)
    assert np.bincount(found.fold_pos).tolist() == [5, 5, 5, 4, 4]


def test_area_and_its_error_by_hand(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 8, 40) / 8, rng.integers(0, 6, 30) / 8  # with ties
    one = OutOfFold(a, b, np.zeros(40, int), np.zeros(30, int))
    wins_pos, wins_neg = by_hand(a, b)
    error = math.sqrt(wins_pos.var(ddof=1) / 40 + wins_neg.var(ddof=1) / 30)
    assert one.auc() == pytest.approx((wins_pos.mean(), error), abs=1e-12)
    two = OutOfFold(a, b, np.arange(40) % 2, np.arange(30) % 2)
    halves = [by_hand(a[k::2], b[k::2])[0].mean() for k in range(2)]
    assert two.auc()[0] == pytest.approx(np.mean(halves), abs=1e-12)


def test_standard_error_of_the_length_by_hand():
    one = OutOfFold(np.array([0.2, 0.9, 1.4]), np.array([0.1, 0.5]), np.zeros(3, int), np.zeros(2, int))
    sine, cosine = np.sin(one.angle_pos), np.cos(one.angle_neg)
    error = math.sqrt(np.var(sine, ddof=1) / 3 + np.var(cosine, ddof=1) / 2)
    assert one.length() == pytest.approx((sine.mean() + cosine.mean(), error), abs=1e-12)


def test_bounds_stay_below_one_where_samples_are_told_apart():
    apart = OutOfFold(np.full(30, np.pi / 2), np.zeros(50), np.zeros(30, int), np.zeros(50, int))
    assert apart.length()[1] == 0
    # thirty trials without a failure: the exact bound of Clopper and Pearson
    assert apart.auc_bound(0.95) == pytest.approx(0.05 ** (1 / 30), rel=1e-12)
    assert apart.length_bound(0.95) == pytest.approx(2 * 0.05 ** (1 / 30), rel=1e-12)


def test_permuted_labels_forget_the_classes(seed):
    rng = np.random.default_rng(seed)
    a, b = np.ones((30, 1)), np.zeros((30, 1))

    def fit(pos, neg):
        return lambda x: np.where(x[:, 0] > 0.5, np.pi / 2, 0.0)

    values = permuted_values(a, b, fit, 2, 200, rng)
    # each class then holds half of each value: sine and cosine are 1/2 on average
    assert abs(values.mean() - 1) < 5 * values.std() / math.sqrt(200)


def test_shortfall_is_added_to_the_value_and_not_to_the_bound(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, (40, 1)), rng.normal(size=(40, 1))

    def angle(x):
        return np.arctan(np.exp(x[:, 0] - 0.5))

    plain = cross_fit(a, b, lambda p, q: angle, 2, np.random.default_rng(0))
    told = cross_fit(a, b, lambda p, q: FittedAngle(angle, len(p) / 2000), 2, np.random.default_rng(0))
    assert told.length()[0] - plain.length()[0] == pytest.approx(0.01, abs=1e-12)
    assert told.length_bound(0.9) == plain.length_bound(0.9)


@pytest.mark.parametrize(("value", "error"), [(1.40, 0.0), (1.42, 0.006), (1.55, 0.02), (1.9, 0.015), (2.0, 0.0)])
def test_ends_of_the_score_interval_against_a_grid(value, error):
    square, size = 1.96**2, 200.0
    grid = np.linspace(math.sqrt(2), 2, 400_001)
    middle = min(max(value, math.sqrt(2)), 2.0)
    variance = error**2 + (
        np.array([largest_variance(x) for x in grid[::40]]) - largest_variance(middle)
    ) / size  # fmt: skip
    inside = grid[::40][(grid[::40] - middle) ** 2 <= square * variance]
    low, high = _score_ends(value, error, square, size)
    assert (low, high) == pytest.approx((inside[0], inside[-1]), abs=1e-4)
    # at equality there is width all the same
    assert high - low > 0.01
