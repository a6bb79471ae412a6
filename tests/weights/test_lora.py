"""Low-rank adapters: the change that they make, what stays, and where a fit begins."""

import math

import torch
from torch import nn
from torch.nn.utils import skip_init

from vifamily.testing._tools import seeded
from vifamily.weights.lora import Lora


def linear(a, b):
    layer = skip_init(nn.Linear, a, b, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(b, a, generator=seeded(a), dtype=torch.float64))
        layer.bias.copy_(torch.randn(b, generator=seeded(b), dtype=torch.float64))
    return layer


def test_output_is_that_of_the_changed_weight():
    layer = linear(5, 3)
    made = Lora(rank=2, scale=3.0).build(layer, generator=seeded(0))
    x = torch.randn(6, 5, generator=seeded(1), dtype=torch.float64)
    z = torch.randn(4, made.dim, generator=seeded(2), dtype=torch.float64)
    for draw, out in zip(z, made(x, z), strict=True):
        a, b = draw[:10].reshape(2, 5), draw[10:].reshape(3, 2)
        weight = layer.weight + 3.0 / 2 * b @ a
        torch.testing.assert_close(out, x @ weight.T + layer.bias, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(made.materialise(draw)["weight"], weight, rtol=1e-10, atol=1e-10)


def test_a_latent_for_each_datum():
    made = Lora(rank=2).build(nn.Sequential(linear(5, 4), nn.Tanh(), linear(4, 3)), generator=seeded(0))
    x = torch.randn(6, 2, 5, generator=seeded(1), dtype=torch.float64)  # two positions for each datum
    z = torch.randn(3, 6, made.dim, generator=seeded(2), dtype=torch.float64)
    expected = torch.cat([made(x[i : i + 1], z[:, i]) for i in range(6)], 1)
    torch.testing.assert_close(made(x, z), expected, rtol=1e-10, atol=1e-10)


def test_rank_one_makes_changes_of_rank_one():
    layer = linear(6, 5)
    made = Lora(rank=1).build(layer, generator=seeded(0))
    z = torch.randn(made.dim, generator=seeded(2), dtype=torch.float64)
    singular = torch.linalg.svdvals(made.materialise(z)["weight"] - layer.weight.detach())
    assert singular[0] > 1e-2
    assert singular[1] < 1e-12


def test_only_linear_layers_and_the_base_is_fixed():
    net = nn.Sequential(linear(4, 3), nn.LayerNorm(3, dtype=torch.float64), linear(3, 2))
    made = Lora(rank=2).build(net, generator=seeded(0), rest="frozen")
    assert made.report.converted == {"0": 14, "2": 10}
    assert made.report.skipped == {"1": "not a linear layer"}
    assert not [p for p in made.parameters() if p.requires_grad]
    points = Lora(rank=2).build(net, generator=seeded(0))
    assert points.report.point == 3 + 6 + 2  # biases and the norm


def test_a_fit_begins_at_the_nets_own_function():
    net = nn.Sequential(linear(4, 3), nn.Tanh(), linear(3, 2))
    made = Lora(rank=2).build(net, generator=seeded(0))
    x = torch.randn(6, 4, generator=seeded(1), dtype=torch.float64)
    starts = [made.initial(seeded(k)) for k in range(2)]
    for mean, _ in starts:
        torch.testing.assert_close(made(x, mean.unsqueeze(0))[0], net(x), rtol=1e-10, atol=1e-10)
    assert not torch.equal(starts[0][0], starts[1][0])


def test_changes_under_the_prior_have_the_variance_of_the_formula(seed):
    rank, scale, wide, draws = 3, 2.0, 7, 20_000
    layer = linear(wide, 1)
    made = Lora(rank=rank, scale=scale).build(layer, generator=seeded(0))
    mean, sd = made.prior()
    z = mean + sd * torch.randn(draws, made.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = (made.materialise(z)["weight"] - layer.weight.detach()).square().mean((-1, -2))
    expected = (scale / rank) ** 2 * rank / wide  # r products of independent factors of variances 1 and 1/in
    assert abs(float(change.mean()) - expected) < 5 * float(change.std()) / math.sqrt(draws)
