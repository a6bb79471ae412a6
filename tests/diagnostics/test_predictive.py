"""Predictive checks."""

import math

import pytest
import torch

from vifamily.diagnostics.predictive import predictive_check
from vifamily.errors import ShapeError


def mean(data):
    return data["y"].mean()


def test_p_value_is_the_upper_tail(generator):
    replicated = {"y": torch.randn(4000, 25, generator=generator, dtype=torch.float64)}
    found = predictive_check(mean, replicated, {"y": torch.full((25,), 0.2, dtype=torch.float64)})
    exact = 0.5 * math.erfc(0.2 * 5 / math.sqrt(2))  # the mean of 25 has standard deviation 1/5
    assert abs(found.p_value - exact) < 5 * found.p_value_error
    assert found.observed == pytest.approx(0.2)
    assert found.replicated.shape == (4000,)
    assert found.to_dict()["p_value"] == found.p_value


def test_ties_count_half():
    found = predictive_check(mean, {"y": torch.zeros(10, 3)}, {"y": torch.zeros(3)})
    assert found.p_value == 0.5


def test_a_missed_feature_is_named(generator):
    replicated = {"y": torch.randn(200, 25, generator=generator)}
    text = str(predictive_check(mean, replicated, {"y": torch.full((25,), 5.0)}, kind="prior"))
    assert "prior predictive" in text
    assert "misses" in text


def test_bad_input():
    with pytest.raises(ShapeError, match="share no name"):
        predictive_check(mean, {"y": torch.zeros(3, 2)}, {"x": torch.zeros(2)})
    with pytest.raises(ShapeError, match="same, positive number"):
        predictive_check(mean, {"y": torch.zeros(3, 2), "x": torch.zeros(4)}, {"y": torch.zeros(2)})
    with pytest.raises(ShapeError, match="one number"):
        predictive_check(lambda d: d["y"], {"y": torch.zeros(3, 2)}, {"y": torch.zeros(2)})


def test_inputs_that_are_not_replicated_stay_as_they_are():
    x = torch.tensor([1.0, 2.0])
    found = predictive_check(lambda d: (d["x"] * d["y"]).sum(), {"y": torch.ones(4, 2)}, {"x": x, "y": torch.zeros(2)})
    assert found.observed == 0
    assert found.replicated.tolist() == [3.0] * 4
