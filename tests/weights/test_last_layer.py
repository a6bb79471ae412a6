"""The last layer alone: which one it is, and what becomes of the others."""

import pytest
import torch
from torch import nn
from torch.nn.utils import skip_init

from vifamily.errors import ConfigError
from vifamily.testing._tools import seeded
from vifamily.weights.dense import Dense
from vifamily.weights.last_layer import LastLayer


def linear(a, b):
    layer = skip_init(nn.Linear, a, b)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.zero_()
    return layer


def build(*layers, **options):
    return LastLayer(**options).build(nn.Sequential(*layers), generator=seeded(0))


def test_others_are_points():
    made = build(linear(3, 4), nn.Tanh(), linear(4, 2))
    assert made.report.converted == {"2": 10}
    assert made.report.skipped == {"0": "not the last layer"}
    assert made.report.point == 16


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(2), nn.LayerNorm(2)])
def test_a_normalisation_at_the_end_is_not_the_last_layer(norm):
    assert build(linear(3, 4), linear(4, 2), norm).report.converted == {"1": 10}


def test_last_of_those_that_are_chosen():
    assert build(linear(3, 4), linear(4, 2), exclude="1.*").report.converted == {"0": 16}
    assert build(linear(3, 4), linear(4, 2), include="1.weight").report.latent == 8
    with pytest.raises(ConfigError, match="no layer"):
        build(linear(3, 4), include="head.*")


def test_outputs_are_linear_in_the_latent():
    made = build(linear(3, 4), nn.Tanh(), linear(4, 2))
    x = torch.randn(5, 3, generator=seeded(1))
    a, b = torch.randn(2, 1, made.dim, generator=seeded(2))
    torch.testing.assert_close(made(x, 0.3 * a + 0.7 * b), 0.3 * made(x, a) + 0.7 * made(x, b))


def test_same_numbers_as_the_dense_entry_on_that_layer():
    net = nn.Sequential(linear(3, 4), nn.Tanh(), linear(4, 2))
    x, z = torch.randn(5, 3, generator=seeded(1)), torch.randn(3, 10, generator=seeded(2))
    other = Dense(include="2.*").build(net, generator=seeded(0))
    assert torch.equal(LastLayer().build(net, generator=seeded(0))(x, z), other(x, z))
