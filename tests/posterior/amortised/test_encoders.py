"""Encoders: standardisation, invariances, shapes, specs."""

import pytest
import torch
from torch import nn

from vifamily.errors import ConfigError, ShapeError
from vifamily.posterior.amortised.encoders import Image, Module, Series, Set, Vector, as_encoder, encoder_spec
from vifamily.rng import generator, scoped

OPTIONS = {"dtype": torch.float32, "device": torch.device("cpu")}


def built(entry, shape):
    return entry.build(shape, generator=generator(0, "encoder"), **OPTIONS)


@pytest.mark.parametrize(
    ("entry", "shape", "size"),
    [
        (Vector(), (3,), 3),
        (Vector(hidden=(8,), outputs=5), (3, 2), 5),
        (Set(outputs=6), (7, 2), 6),
        (Series(outputs=4), (19,), 4),
        (Series(outputs=4), (16, 3), 4),
        (Image(outputs=9), (12, 10), 9),
        (Image(outputs=9), (3, 8, 8), 9),
        (Module(nn.Flatten()), (3, 2), 6),
    ],
)
def test_contexts_have_one_row_per_datum(entry, shape, size):
    encoder = built(entry, shape)
    x = 5 + 3 * torch.randn(20, *shape, generator=generator(1, "x"))
    encoder.fit_scale(x)
    assert encoder(x).shape == (20, size)
    assert set(encoder.state_dict()) >= {"shift", "scale"}
    with pytest.raises(ShapeError):
        encoder(x[:, :1] if len(shape) > 1 else x[:, :1])


def test_the_standardiser_has_the_moments_of_the_simulations():
    encoder = built(Vector(), (3,))
    x = torch.randn(500, 3, generator=generator(1, "x")) * torch.tensor([1e-4, 1.0, 1e5]) + 7
    x[:, 1] = 2.0  # constant
    encoder.fit_scale(x)
    out = encoder(x)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(out.std(0), torch.tensor([1.0, 0.0, 1.0]), atol=1e-2, rtol=0)
    assert float(built(Vector(), (3,)).scale.sum()) == 3


def test_a_set_has_no_order_and_one_standardiser():
    encoder = built(Set(), (9, 2))
    x = torch.randn(4, 9, 2, generator=generator(1, "x"))
    encoder.fit_scale(x)
    torch.testing.assert_close(encoder(x), encoder(x[:, torch.randperm(9, generator=generator(2, "order"))]))
    assert encoder.shift.shape == (1, 2)


def test_the_users_module_is_copied():
    with scoped(0):
        module = nn.Linear(2, 2)
    encoder = built(Module(module), (2,))
    with torch.no_grad():
        encoder.net.weight.zero_()
    assert float(module.weight.detach().abs().sum()) > 0


@pytest.mark.parametrize("entry", [Vector(), Vector(hidden=(4, 4)), Set(hidden=(8,)), Series(), Image(channels=(2,))])
def test_specs_come_back(entry):
    assert as_encoder(encoder_spec(entry)) == entry
    assert encoder_spec(Module(nn.Identity())) is None


@pytest.mark.parametrize("bad", ["nothing", "vector(widths=3)", 4, "set(outputs=0)"])
def test_what_is_no_encoder_is_refused(bad):
    with pytest.raises(ConfigError):
        as_encoder(bad)


@pytest.mark.parametrize(("entry", "shape"), [(Set(), (3,)), (Series(), (2, 2, 2)), (Image(), (4,))])
def test_shapes_that_do_not_suit(entry, shape):
    with pytest.raises(ShapeError, match="takes data of shape"):
        built(entry, shape)
