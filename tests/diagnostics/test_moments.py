"""Errors of moments against a reference."""

import math

import pytest
import torch

from vifamily.diagnostics.moments import distances, moment_errors
from vifamily.errors import DataError, ShapeError


def test_known_offsets(generator):
    x = torch.randn(20_000, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 0.5]) + torch.tensor(
        [1.0, 0]
    )
    found = moment_errors(x, [0.0, 0.0], [4.0, 1.0], names=["a", "b"])
    assert abs(float(found.mean_error[0]) - 0.25) < 5 * float(found.mean_error_se[0])
    exact = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    assert bool(((found.log_sd_ratio - exact).abs() < 5 * found.log_sd_ratio_se).all())
    name, worst = found.worst_mean
    assert name == "a"
    assert worst.value == float(found.mean_error[0])


def test_errors_are_the_spread_over_repetitions(generator):
    # a chi-square with four degrees of freedom: skewed, heavier than normal
    x = (torch.randn(400, 500, 4, generator=generator, dtype=torch.float64) ** 2).sum(-1)
    parts = [moment_errors(part[:, None], [4.0], [8**0.5]) for part in x]
    for value, error in (("mean_error", "mean_error_se"), ("log_sd_ratio", "log_sd_ratio_se")):
        spread = torch.cat([getattr(p, value) for p in parts]).std()
        claimed = torch.cat([getattr(p, error) for p in parts]).mean()
        assert float(spread) == pytest.approx(float(claimed), rel=0.3)


def test_the_worst_is_by_size_and_nan_is_worst():
    x = torch.tensor([[0.0, math.nan], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    found = moment_errors(x, [50.0, 0.0], [1.0, 1.0], names=["a", "b"])
    assert found.worst_mean[0] == "b"
    assert moment_errors(x[:, :1], [50.0], [1.0]).worst_mean[1].value == -49


def test_distances_grow_with_the_shift_and_floors_are_small(generator):
    x, y = (torch.randn(1000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([100.0, 0.01], dtype=torch.float64)
    near = distances(x * scale, y * scale, scale, generator=generator)
    far = distances((x + 1) * scale, y * scale, scale, generator=generator)
    assert near["sliced_wasserstein"].value < 2 * near["sliced_wasserstein_floor"].value
    assert far["sliced_wasserstein"].value == pytest.approx(1, abs=0.1)  # |(1, 1)| / sqrt(2)
    assert abs(near["mmd"].value) < 5 * near["mmd"].error
    assert far["mmd"].value > 5 * far["mmd"].error


@pytest.mark.parametrize(("mean", "sd"), [([0.0], [1.0, 1.0]), ([0.0, 0.0], [1.0])])
def test_bad_shapes(mean, sd):
    with pytest.raises(ShapeError, match="quantity"):
        moment_errors(torch.zeros(5, 2), mean, sd)


def test_bad_reference():
    with pytest.raises(DataError, match="positive"):
        moment_errors(torch.zeros(5, 1), [0.0], [0.0])
    with pytest.raises(ShapeError, match="names"):
        moment_errors(torch.zeros(5, 1), [0.0], [1.0], names=["a", "b"])
