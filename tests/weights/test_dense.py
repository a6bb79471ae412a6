"""Every weight a latent: priors, starts, and one conjugate case in closed form."""

import math

import torch
from torch import nn
from torch.nn.utils import skip_init

from vifamily.testing._tools import seeded
from vifamily.weights.dense import Dense


def filled(net, value=0.25):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def linear(a, b, **options):
    return filled(skip_init(nn.Linear, a, b, **options))


def test_latent_is_the_parameters_one_after_the_other():
    made = Dense().build(nn.Sequential(linear(3, 2), nn.Tanh(), linear(2, 1)), generator=seeded(0))
    assert made.layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    z = torch.arange(float(made.dim)).unsqueeze(0)
    named = made.materialise(z)
    assert torch.equal(named["0.weight"][0], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(named["2.bias"][0], torch.tensor([10.0]))


def test_priors_by_kind_of_layer():
    net = nn.Sequential(
        filled(skip_init(nn.Embedding, 5, 4)),
        nn.LayerNorm(4),
        linear(4, 2),
        filled(skip_init(nn.Conv1d, 4, 2, 3)),
    )
    made = Dense().build(net, generator=seeded(0))
    mean, sd = (made.layout.constrain(part) for part in made.prior())
    assert set(sd["0.weight"].flatten().tolist()) == {1.0}
    assert set(mean["1.weight"].tolist()) == {1.0}
    assert set(mean["1.bias"].tolist()) == {0.0}
    torch.testing.assert_close(sd["2.weight"], torch.full((2, 4), math.sqrt(2 / 4)))
    torch.testing.assert_close(sd["3.weight"], torch.full((2, 4, 3), math.sqrt(2 / 12)))
    assert set(sd["2.bias"].tolist()) == {1.0}


def test_a_fit_begins_near_the_nets_values_each_time_elsewhere():
    made = Dense().build(linear(8, 4), generator=seeded(0))
    (a, sd), (b, _) = (made.initial(seeded(k)) for k in (1, 2))
    assert not torch.equal(a, b)
    assert float((a - 0.25).abs().max()) < 0.06
    torch.testing.assert_close(sd, torch.full_like(sd, 0.1 * math.sqrt(2 / 8)))


def test_a_fit_can_begin_at_a_draw_of_the_prior():
    made = Dense(begin="prior").build(linear(50, 40), generator=seeded(0))
    mean, _ = made.initial(seeded(1))
    prior_mean, prior_sd = made.prior()
    standard = (mean - prior_mean) / prior_sd
    count = len(standard)
    assert abs(float(standard.mean())) < 5 / math.sqrt(count)
    assert abs(float(standard.square().mean()) - 1) < 5 * math.sqrt(2 / count)


def test_frozen_parameters_are_left_alone():
    layer = linear(3, 2)
    layer.weight.requires_grad_(False)  # noqa: FBT003
    made = Dense().build(layer, generator=seeded(0))
    assert made.layout.names == ("bias",)
    assert made.report.point == 0
