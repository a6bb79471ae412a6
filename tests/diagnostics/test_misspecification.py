"""Data unlike any simulation are found, data like them pass at the level of the test."""

import math

import pytest
import torch

from vifamily import rng
from vifamily.diagnostics import misspecification_mmd
from vifamily.errors import ConfigError, DataError, ShapeError


def test_level_where_the_model_is_right(seed):
    p = []
    for index in range(60):
        g = rng.generator(seed, "level", index)
        x = torch.randn(401, 2, generator=g)
        p.append(misspecification_mmd(x[0], x[1:], generator=g, num_null=99).p_value)
    assert abs(sum(p) / len(p) - 0.5) < 5 * math.sqrt(1 / 12 / len(p)) + 0.01
    assert sum(value <= 0.1 for value in p) < 6 + 5 * math.sqrt(60 * 0.1 * 0.9)


def test_power_grows_with_the_number_of_data_sets(seed):
    g = rng.generator(seed, "power")
    simulated = torch.randn(2000, 2, generator=g)
    observed = torch.randn(50, 2, generator=g) + 0.8
    assert misspecification_mmd(observed, simulated, generator=g).p_value < 0.01
    single = misspecification_mmd(torch.tensor([0.8, 0.8]), simulated, generator=g)
    assert single.p_value > 0.05


def test_features_decide_what_is_seen(seed):
    g = rng.generator(seed, "features")
    simulated = torch.randn(1000, 2, generator=g)
    odd = torch.tensor([0.0, 9.0])
    assert misspecification_mmd(odd, simulated, generator=g).p_value < 0.01
    assert misspecification_mmd(odd, simulated, generator=g, embedding=lambda x: x[:, :1]).p_value > 0.05


def test_refusals(seed):
    g = rng.generator(seed, "refusals")
    with pytest.raises(ShapeError, match="simulations or more"):
        misspecification_mmd(torch.zeros(10, 2), torch.zeros(30, 2), generator=g)
    with pytest.raises(DataError):
        misspecification_mmd(torch.tensor([math.nan]), torch.zeros(30, 1), generator=g)
    with pytest.raises(ConfigError, match="num_null"):
        misspecification_mmd(torch.zeros(1), torch.zeros(30, 1), generator=g, num_null=0)
