"""Joint coverage: right posteriors pass at their level, narrow, wide and shifted ones are named."""

import json
import math

import pytest
import torch

from vifamily import rng
from vifamily.diagnostics import expected_coverage, tarp
from vifamily.errors import DataError, ShapeError

DOUBLE = torch.float64
SIZE, DRAWS, DIM = 400, 99, 3


def posteriors(seed, scale=1.0, shift=0.0):
    """Truths and draws of N(x / 2, I / 2) where theta ~ N(0, I) and x ~ N(theta, I)."""
    g = rng.generator(seed, "posteriors")
    theta = torch.randn(SIZE, DIM, generator=g, dtype=DOUBLE)
    x = theta + torch.randn(SIZE, DIM, generator=g, dtype=DOUBLE)
    sd = math.sqrt(0.5) * scale
    draws = x[:, None] / 2 + shift + sd * torch.randn(SIZE, DRAWS, DIM, generator=g, dtype=DOUBLE)

    def log_prob(value):
        return -0.5 * (((value - (x[:, None] / 2 + shift)) / sd) ** 2).sum(-1)

    return theta, draws, log_prob(theta[:, None])[:, 0], log_prob(draws)


CASES = [(1.0, "no such pattern"), (0.6, "too narrow"), (1.6, "too wide")]


@pytest.mark.parametrize(("scale", "reading"), CASES)
def test_density_regions(seed, scale, reading):
    _, _, truth, draws = posteriors(seed, scale)
    found = expected_coverage(truth, draws, seed=seed)
    assert found.reading == reading
    assert found.calibrated(0.01) == (scale == 1.0)


@pytest.mark.parametrize(("scale", "reading"), CASES)
def test_random_references(seed, scale, reading):
    theta, draws, _, _ = posteriors(seed, scale)
    found = tarp(theta, draws, generator=rng.generator(seed, "tarp"))
    assert found.reading == reading
    assert found.calibrated(0.01) == (scale == 1.0)


def test_random_references_see_a_shift(seed):
    theta, draws, _, _ = posteriors(seed, shift=0.5)
    assert not tarp(theta, draws, generator=rng.generator(seed, "tarp")).calibrated()


def test_coverage_of_narrow_posteriors_by_chi_square(seed):
    # a region of credibility c holds a chi-square of 3 degrees below its quantile; with sd 0.6 of the right one the
    # truth is inside with probability F(0.36 F^-1(c)): for c = 0.95, F(0.36 * 7.8147) = 0.5786
    _, _, truth, draws = posteriors(seed, 0.6)
    expected = 0.5786
    seen = float(expected_coverage(truth, draws, seed=seed).coverage(0.95))
    # 99 draws place the edge of the region within a few hundredths
    assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - expected) / SIZE) + 0.02


def test_prior_passes_and_references_that_know_the_data_find_it(seed):
    g = rng.generator(seed, "prior")
    theta = torch.randn(SIZE, 1, generator=g, dtype=DOUBLE)
    x = theta + 0.5 * torch.randn(SIZE, 1, generator=g, dtype=DOUBLE)
    draws = torch.randn(SIZE, DRAWS, 1, generator=g, dtype=DOUBLE)  # the prior, whatever x is
    assert tarp(theta, draws, generator=g).calibrated(0.01)
    assert not tarp(theta, draws, generator=g, references=x).calibrated(0.01)


def test_coverage_is_the_share_of_ranks(seed):
    found = expected_coverage(torch.zeros(20), torch.ones(20, 9), seed=seed)
    assert found.ranks.tolist() == [9] * 20  # every draw is denser than the truth
    assert float(found.coverage(0.9)) == 0.0
    assert found.coverage(torch.tensor([0.5, 0.96])).tolist() == [0.0, 1.0]


def test_ties_are_broken_at_random(seed):
    found = expected_coverage(torch.zeros(400), torch.zeros(400, 9), seed=seed)
    assert found.calibrated(0.001)
    assert set(found.ranks.tolist()) == set(range(10))


def test_result_as_data_and_picture(seed, tmp_path):
    found = expected_coverage(*posteriors(seed)[2:], seed=seed)
    assert json.loads(json.dumps(found.to_dict()))["num_draws"] == DRAWS
    found.plot(path=tmp_path / "coverage.png")
    assert (tmp_path / "coverage.png").stat().st_size > 5000
    assert "p-value" in str(found)


def test_refusals(seed):
    g = rng.generator(seed, "refusals")
    with pytest.raises(ShapeError, match="log densities"):
        expected_coverage(torch.zeros(20, 1), torch.zeros(20, 9))
    with pytest.raises(ShapeError, match="20 simulations"):
        expected_coverage(torch.zeros(5), torch.zeros(5, 9))
    with pytest.raises(DataError, match="NaN"):
        expected_coverage(torch.zeros(20), torch.full((20, 9), math.nan))
    with pytest.raises(ShapeError, match="TARP"):
        tarp(torch.zeros(20, 2), torch.zeros(20, 9, 3), generator=g)
    with pytest.raises(DataError, match="NaN"):
        tarp(torch.full((20, 2), math.inf), torch.zeros(20, 9, 2), generator=g)
    with pytest.raises(ShapeError, match="references"):
        tarp(torch.zeros(20, 2), torch.zeros(20, 9, 2), generator=g, references=torch.zeros(3, 2))
