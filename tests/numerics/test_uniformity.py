"""Uniform ranks stay in their band as often as stated; symmetric probabilities are told from shifted ones."""

import numpy as np
import pytest
from scipy import stats

from vifamily.errors import ConfigError, ShapeError
from vifamily.numerics.uniformity import bin_test, ecdf_band, ecdf_test, symmetry_test

REPEATS = 300


def rejections(test, draw, level=0.05):
    rng = np.random.default_rng(0)
    return sum(test(draw(rng)) < level for _ in range(REPEATS))


def within(count, probability=0.05):
    """Whether a count of rejections is what a test of that size gives, five standard errors."""
    error = np.sqrt(REPEATS * probability * (1 - probability))
    return abs(count - REPEATS * probability) < 5 * error


TESTS = {
    "ecdf": (lambda x: ecdf_test(x, 99), lambda rng: rng.integers(0, 100, size=60)),
    "ecdf of few draws": (lambda x: ecdf_test(x, 9), lambda rng: rng.integers(0, 10, size=60)),
    "bins": (lambda x: bin_test(x, 99), lambda rng: rng.integers(0, 100, size=100)),
    "symmetry": (lambda p: symmetry_test(p).p_value, lambda rng: rng.uniform(size=60)),
    "symmetry of what is not uniform": (lambda p: symmetry_test(p).p_value, lambda rng: rng.beta(0.3, 0.3, size=60)),
    "symmetry with ties": (lambda p: symmetry_test(p).p_value, lambda rng: rng.integers(0, 5, size=60) / 4),
}


@pytest.mark.parametrize("name", TESTS)
def test_a_test_rejects_as_often_as_it_says(name):
    test, draw = TESTS[name]
    assert within(rejections(test, draw)) or "ties" in name and rejections(test, draw) < REPEATS * 0.1


def test_the_band_holds_the_whole_ecdf_as_often_as_it_says():
    band, rng = ecdf_band(60, 99, coverage=0.9), np.random.default_rng(1)
    ranks = rng.integers(0, 100, size=(2000, 60))
    ecdf = (ranks[:, :, None] < np.round(band.points * 100)).mean(1)
    inside = ((ecdf >= band.lower - 1e-9) & (ecdf <= band.upper + 1e-9)).all(1).mean()
    # discrete counts make the band a little wide; its level is itself known to 0.005
    assert 0.88 < inside < 0.94


def test_the_band_leaves_out_exactly_what_the_test_rejects():
    band, rng = ecdf_band(80, 99, seed=3), np.random.default_rng(2)
    for _ in range(50):
        ranks = np.minimum(99, (100 * rng.beta(1.25, 1, size=80)).astype(int))
        ecdf = (ranks[:, None] < np.round(band.points * 100)).mean(0)
        outside = ((ecdf < band.lower - 1e-9) | (ecdf > band.upper + 1e-9)).any()
        p = ecdf_test(ranks, 99, seed=3)
        assert outside == (p < 0.05) or 0.03 < p < 0.07


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.5, 2.5), (1.6, 1.0)], ids=["narrow", "wide", "shifted"])
def test_ranks_that_are_not_uniform_are_found(a, b):
    ranks = (100 * np.random.default_rng(0).beta(a, b, size=200)).astype(int)
    assert ecdf_test(ranks, 99) < 0.001
    assert bin_test(ranks, 99) < 0.01


def test_symmetry_has_the_distance_of_two_samples_and_sees_no_spread():
    rng = np.random.default_rng(0)
    for p in (rng.uniform(size=40), rng.beta(0.4, 0.4, size=40), rng.beta(3, 1, size=40)):
        assert symmetry_test(p).statistic == pytest.approx(stats.ks_2samp(p, 1 - p).statistic)
    assert symmetry_test(rng.beta(0.3, 0.3, size=200)).p_value > 0.01
    assert symmetry_test(rng.beta(1.6, 1.0, size=200)).p_value < 0.001
    assert symmetry_test(np.full(30, 0.5)).p_value == 1.0


def test_what_cannot_be_ranks_is_refused():
    for wrong in ([0.5, 1.0], [[1]], [-1, 3], [100], []):
        with pytest.raises(ShapeError, match="whole numbers from 0 to 99"):
            ecdf_test(wrong, 99)
    with pytest.raises(ShapeError, match=r"in \[0, 1\]"):
        symmetry_test([0.2, 1.2])
    with pytest.raises(ConfigError, match="coverage"):
        ecdf_band(50, 99, coverage=1.0)
    with pytest.raises(ConfigError, match="needs ranks and draws"):
        ecdf_band(0, 99)
