"""Subsets by pattern: both patterns count, and batch normalisation is taken where it is named."""

import pytest
import torch
from torch import nn
from torch.nn.utils import skip_init

from vifamily.testing._tools import seeded
from vifamily.weights.subset import Subset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn, self.head = (skip_init(nn.Linear, 3, 4), nn.BatchNorm1d(4), skip_init(nn.Linear, 4, 2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.5)

    def forward(self, x):
        return self.head(torch.tanh(self.bn(self.first(x))))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("first.weight", "first.bias", "head.weight", "head.bias")),
        ({"pattern": "head.*"}, ("head.weight", "head.bias")),
        ({"pattern": "head"}, ("head.weight", "head.bias")),
        ({"pattern": "*.bias"}, ("first.bias", "bn.bias", "head.bias")),
        ({"pattern": "bn.*"}, ("bn.weight", "bn.bias")),
        ({"include": "bn.*"}, ("bn.weight", "bn.bias")),
        ({"include": "bn.*, head.*", "pattern": "*.weight"}, ("bn.weight", "head.weight")),
        ({"pattern": "*.weight", "exclude": "first.*"}, ("bn.weight", "head.weight")),
    ],
)
def test_names(options, names):
    assert Subset(**options).build(Net(), generator=seeded(0)).layout.names == names


def test_batch_normalisation_as_a_latent():
    made = Subset(pattern="bn.*").build(Net(), generator=seeded(0))
    assert made.prior()[0].tolist() == [1.0] * 4 + [0.0] * 4
    x, z = torch.randn(5, 3, generator=seeded(1)), torch.randn(2, made.dim, generator=seeded(2))
    net = Net().eval()
    for draw, out in zip(z, made(x, z), strict=True):
        with torch.no_grad():
            net.bn.weight.copy_(draw[:4])
            net.bn.bias.copy_(draw[4:])
            torch.testing.assert_close(net(x), out)
    assert made.report.point == 16 + 10
