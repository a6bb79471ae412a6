"""Distances between samples against direct sums and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from vifamily.diagnostics.two_sample import median_bandwidth, mmd, sliced_wasserstein, wasserstein_1d
from vifamily.errors import ConfigError, DataError, ShapeError


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("m", "n"), [(7, 7), (7, 3), (10, 4), (1, 5), (6, 9)])
def test_one_dimension_equals_scipy(m, n, generator):
    x, y = normal(generator, m, 2), normal(generator, n, 2) + 1
    ours = wasserstein_1d(x, y, order=1)
    theirs = [stats.wasserstein_distance(x[:, i].numpy(), y[:, i].numpy()) for i in range(2)]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10)


def test_one_dimension_of_order_two_pairs_sorted_values(generator):
    x, y = normal(generator, 50, 1), normal(generator, 50, 1)
    direct = ((x.sort(0).values - y.sort(0).values) ** 2).mean().sqrt()
    assert float(wasserstein_1d(x, y)) == pytest.approx(float(direct), rel=1e-12)


def test_a_shift_is_seen_as_its_length_over_root_dim(generator):
    # every direction sees |w . shift|; the mean square over the sphere is |shift|^2 / dim
    x = normal(generator, 100, 5)
    shift = torch.tensor([3.0, 0, 4, 0, 0], dtype=torch.float64)
    found = sliced_wasserstein(x, x + shift, generator=generator, num_projections=4000)
    assert abs(found.value - 5 / math.sqrt(5)) < 5 * found.error


def test_same_sample_has_no_distance(generator):
    x = normal(generator, 30, 3)
    assert sliced_wasserstein(x, x, generator=generator).value == 0
    assert sliced_wasserstein(x[:, :1], x[:, :1].flip(0), generator=generator).value == 0


def test_mmd_equals_the_direct_sum(generator):
    x, y = normal(generator, 13, 2), normal(generator, 8, 2)
    width = 0.7

    def kernel(a, b):
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * width**2))

    xx = sum(kernel(x[i], x[j]) for i in range(13) for j in range(13) if i != j) / (13 * 12)
    yy = sum(kernel(y[i], y[j]) for i in range(8) for j in range(8) if i != j) / (8 * 7)
    xy = sum(kernel(a, b) for a in x for b in y) / (13 * 8)
    assert mmd(x, y, bandwidth=width).value == pytest.approx(xx + yy - 2 * xy, abs=1e-12)


def test_chunks_change_nothing(generator, monkeypatch):
    x, y = normal(generator, 40, 2), normal(generator, 30, 2)
    whole = mmd(x, y)
    monkeypatch.setattr("vifamily.diagnostics.two_sample._CHUNK", 7)
    assert mmd(x, y).value == pytest.approx(whole.value, abs=1e-13)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_mmd_is_unbiased_and_its_error_is_its_spread(shift, generator):
    # N(0, 1) against N(shift, 1) with width 1: E k = (1/3)^0.5 exp(-shift^2 / 6)
    exact = 2 / math.sqrt(3) * (1 - math.exp(-(shift**2) / 6))
    found = [mmd(normal(generator, 60, 1), normal(generator, 40, 1) + shift, bandwidth=1.0) for _ in range(300)]
    values = np.array([f.value for f in found])
    assert abs(values.mean() - exact) < 5 * values.std() / math.sqrt(300)
    assert values.std() == pytest.approx(np.mean([f.error for f in found]), rel=0.3)


def test_median_heuristic(generator):
    x = normal(generator, 50, 2)
    direct = float(torch.nn.functional.pdist(torch.cat([x, x + 9])).median())
    assert median_bandwidth(x, x + 9) == pytest.approx(direct)
    assert median_bandwidth(torch.zeros(4, 1), torch.zeros(4, 1)) == 1.0


def test_arrays_and_single_precision_are_taken(generator):
    x = normal(generator, 20, 2)
    assert mmd(x.numpy(), x.float() + 1).value > 0


@pytest.mark.parametrize(
    ("x", "y", "error"),
    [
        (torch.zeros(5), torch.zeros(5, 1), ShapeError),
        (torch.zeros(5, 2), torch.zeros(5, 1), ShapeError),
        (torch.zeros(0, 1), torch.zeros(5, 1), ShapeError),
        (torch.full((5, 1), math.nan), torch.zeros(5, 1), DataError),
    ],
)
def test_bad_samples(x, y, error, generator):
    with pytest.raises(error):
        mmd(x, y)
    with pytest.raises(error):
        sliced_wasserstein(x, y, generator=generator)


def test_bad_options(generator):
    x = torch.zeros(5, 1)
    with pytest.raises(ConfigError, match="bandwidth"):
        mmd(x, x, bandwidth=0.0)
    with pytest.raises(ConfigError, match="num_projections"):
        sliced_wasserstein(x, x, generator=generator, num_projections=0)
