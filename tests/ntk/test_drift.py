"""Drift of kernels: figures known in closed form, and how the rotation toy moves against width."""

import math

import pytest
import torch

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.ntk import DriftRecorder, LinearisedNetwork, TwoLayerReLU, kernel_drift, layerwise_gram, width_sweep
from vifamily.rng import generator

DOUBLE = torch.float64
EYE = torch.eye(4, dtype=DOUBLE)


def test_drift_in_closed_form() -> None:
    # two inputs, two outputs: one block moves by diag(3, 4), and the other stays
    now = EYE + torch.diag(torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=DOUBLE))
    found = kernel_drift(now, EYE, outputs=2)
    assert found.relative == pytest.approx(5 / 2, abs=1e-12)
    assert found.diagonal == pytest.approx(5 / 2, abs=1e-12)
    assert "moved" in str(found)


def test_scale_alone_leaves_the_centred_alignment() -> None:
    found = kernel_drift(1.05 * EYE + 2.0, EYE)  # a constant is removed by centring
    assert found.similarity == pytest.approx(1.0, abs=1e-12)
    assert kernel_drift(1.05 * EYE, EYE).relative == pytest.approx(0.05, abs=1e-12)
    assert "linearised network" in kernel_drift(1.05 * EYE, EYE).note()


def descend(model, x, steps):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - x[:, :1] * x[:, 1:]).square().mean().backward()
        optimiser.step()


def test_a_recorder_sees_a_network_move_and_a_linearised_one_stay(seed) -> None:
    x = torch.randn(6, 2, generator=generator(seed, "x"), dtype=DOUBLE)
    net = TwoLayerReLU(2, 12, 1, generator=generator(seed, "net"), readout="normal")
    linear = LinearisedNetwork(net)
    first = net.hidden.weight.detach().clone()
    for model, route in ((net, {"route": layerwise_gram}), (linear, {})):
        recorder = DriftRecorder(model, x, **route)
        assert recorder.record(0).relative == 0.0
        descend(model, x, 20)
        recorder.record(20)
        assert recorder.steps == [0, 20]
        if model is net:
            assert recorder.drifts[1].relative > 0.01
            moved = float((net.hidden.weight - first).detach().norm() / first.norm())
            assert recorder.moved[1]["hidden.weight"] == pytest.approx(moved, abs=1e-12)
        else:
            assert recorder.drifts[1].relative < 1e-12


def test_slopes_and_their_errors() -> None:
    swept = width_sweep(lambda w, s: {"a": 2.0 / w, "b": (1 + 0.1 * s) * w**-0.5}, [16, 64, 256], [-1, 0, 1])
    assert swept.slopes["a"] == pytest.approx(-1.0, abs=1e-10)
    assert swept.slopes["b"] == pytest.approx(-0.5, abs=1e-10)
    # each mean has relative error 0.1 / sqrt 3; the design has log widths at distance log 16 about its middle
    assert swept.errors["b"] == pytest.approx(0.1 / math.sqrt(3) * math.sqrt(2) / math.log(16), rel=1e-9)
    assert "falls about as one over the width" in swept.notes[0]
    assert "root of the width" in swept.notes[1]
    assert "hardly falls" in width_sweep(lambda w, s: {"a": 1.0}, [16, 64], [0]).note()
    assert "slope -1.000" in str(swept)
    assert swept.plot().axes


def test_one_seed_has_no_error() -> None:
    swept = width_sweep(lambda w, _: {"a": 2.0 / w}, [16, 64], [0])
    assert math.isnan(swept.errors["a"]) and "±" not in str(swept)


REFUSED = {
    "one width": (lambda: width_sweep(lambda w, s: {"a": 1.0}, [16], [0]), ConfigError, "two ascending widths"),
    "descending": (lambda: width_sweep(lambda w, s: {"a": 1.0}, [16, 8], [0]), ConfigError, "two ascending widths"),
    "zero": (lambda: width_sweep(lambda w, s: {"a": 0.0}, [8, 16], [0]), DataError, "positive"),
    "names": (lambda: width_sweep(lambda w, s: {str(w): 1.0}, [8, 16], [0]), DataError, "every call"),
    "shape": (lambda: kernel_drift(EYE, EYE[:2, :2]), ShapeError, "one shape"),
    "outputs": (lambda: kernel_drift(EYE, EYE, outputs=3), ShapeError, "multiple of 3"),
    "zero kernel": (lambda: kernel_drift(EYE, 0 * EYE), DataError, "is zero"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call()
