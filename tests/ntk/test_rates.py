"""Rates and bounds: eigenvalues in closed form, the rotation toy's own figures, and bounds that are never broken."""

import math

import pytest
import torch

from vifamily.errors import ConfigError, IncompatibleError, ShapeError
from vifamily.ntk import certificate, flow_rates, predicted_flow, relu_kernel
from vifamily.rng import generator

DOUBLE = torch.float64
MEAN = math.exp(-0.5 * 0.5**2)  # mean resultant length of a rotation with noise of 0.5
BEST = 4.575082  # the natural parameter's length at which a von Mises law has that mean


def circle(count):
    angle = 2 * math.pi * torch.arange(count, dtype=DOUBLE) / count
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def von_mises(x):
    def loss(eta):
        length = (eta.square().sum(1) + 1e-20).sqrt()
        return torch.special.i0e(length).log() + length - MEAN * (eta * x).sum(1)

    return loss


def toy(count=32):
    x = circle(count)
    return x, torch.kron(relu_kernel(x), torch.eye(2, dtype=DOUBLE)), von_mises(x), BEST * x


def squares(y):
    return lambda f: 0.5 * (f - y).square().sum(1)


def test_the_toy_has_the_known_rate_and_no_part_that_stays() -> None:
    x, gram, loss, best = toy()
    found = flow_rates(gram, loss, best, 0 * x)
    # radial curvature A'(kappa) = 0.02831 times the eigenvalue 1/8 of the first harmonic; the gap is radial
    weight = found.amounts.square() / found.amounts.square().sum()
    assert float((weight * found.rates).sum()) == pytest.approx(0.003538, rel=2e-3)
    assert found.stuck < 1e-10 and found.flat == 0


def test_a_rate_is_the_slope_of_the_flow() -> None:
    x, gram, loss, best = toy()
    flow = predicted_flow(gram, loss, 0.995 * best, [200.0, 400.0], tolerance=1e-11)
    excess = flow.loss - loss(best).mean()
    slope = float((excess[0] / excess[1]).log() / 200 / 2)
    assert slope == pytest.approx(0.003538, rel=1e-2)
    found = flow_rates(gram, loss, best, 0.995 * best)
    assert found.excess(200.0) == pytest.approx(float(excess[0]), rel=0.05)


def test_times_and_largest_step_in_closed_form() -> None:
    y = torch.tensor([[2.0], [1.0]], dtype=DOUBLE)
    found = flow_rates(torch.diag(torch.tensor([4.0, 1.0], dtype=DOUBLE)), squares(y), y, 0 * y)
    assert found.largest_step == pytest.approx(1.0, abs=1e-12)
    # amounts over root two: from 2 / sqrt 2 to 1 / sqrt 2 at rate 2
    assert found.times(1 / math.sqrt(2)).tolist() == pytest.approx([math.log(2) / 2, 0.0], abs=1e-12)
    assert found.excess(0.0) == pytest.approx(1.25, abs=1e-12)
    t = found.time_to(0.3)
    assert found.excess(t) == pytest.approx(0.3 * 1.25, rel=1e-8)
    assert "Every part" in str(found)


def test_what_lies_outside_of_the_range_stays() -> None:
    y = torch.tensor([[1.0], [1.0]], dtype=DOUBLE)
    gram = torch.diag(torch.tensor([4.0, 0.0], dtype=DOUBLE))
    found = flow_rates(gram, squares(y), y, 0 * y)
    assert found.stuck == pytest.approx(0.5, abs=1e-12)
    assert found.time_to(0.4) == math.inf and found.time_to(0.6) < math.inf
    bound = certificate(gram, 0 * y - y, time=1.0)
    assert bound.bound == math.inf and bound.outside == pytest.approx(0.5) and bound.time_for(0.1) == math.inf
    assert "No bound" in str(bound) and "stays" in found.note()


def test_a_clamp_is_flat() -> None:
    y = torch.full((2, 1), -3.0, dtype=DOUBLE)
    found = flow_rates(torch.eye(2, dtype=DOUBLE), lambda f: 0.5 * f.clamp(-1, 1).square().sum(1), y, 0 * y)
    assert found.flat == 2 and "clamp" in found.note()


def test_the_toy_has_the_known_norm_and_stays_below_its_bound() -> None:
    x, gram, loss, best = toy()
    assert certificate(gram, best, time=1.0).norm == pytest.approx(8 * BEST**2, rel=1e-4)
    times = [1.0, 10.0, 100.0, 1000.0]
    flow = predicted_flow(gram, loss, 0 * x, times)
    for time, value in zip(times, flow.loss, strict=True):
        bound = certificate(gram, best, time=time)
        assert float(value - loss(best).mean()) <= bound.bound
        assert bound.time_for(bound.bound) == pytest.approx(time)
    assert float(flow.loss[2] - loss(best).mean()) == pytest.approx(5.7e-2, rel=0.02)
    assert float(flow.loss[3] - loss(best).mean()) == pytest.approx(3.1e-5, rel=0.05)


@pytest.mark.parametrize("trial", range(4))
def test_a_bound_is_never_broken(seed, trial) -> None:
    source = generator(seed, "bound", trial)
    root, y = (torch.randn(5, d, generator=source, dtype=DOUBLE) for d in (5, 1))

    def loss(f):  # convex and not a square: logistic, with its minimum at y
        return torch.nn.functional.softplus(f).sum(1) - (y.sigmoid() * f).sum(1)

    gram = root @ root.T
    times = [0.1, 1.0, 10.0, 100.0]
    flow = predicted_flow(gram, loss, 0 * y, times)
    for time, value in zip(times, flow.loss, strict=True):
        assert float(value - loss(y).mean()) <= certificate(gram, 0 * y - y, time=time).bound


ONE = torch.ones(2, 1, dtype=DOUBLE)
EYE = torch.eye(2, dtype=DOUBLE)
REFUSED = {
    "not convex": (lambda: flow_rates(EYE, lambda f: -f.square().sum(1), ONE, ONE), IncompatibleError, "not convex"),
    "shapes": (lambda: flow_rates(EYE, squares(ONE), ONE, ONE[:1]), ShapeError, "best and start"),
    "kernel": (lambda: flow_rates(torch.eye(4, dtype=DOUBLE), squares(ONE), ONE, ONE), ShapeError, "4 rows"),
    "share": (lambda: flow_rates(EYE, squares(ONE), ONE, 0 * ONE).time_to(2.0), ConfigError, "share"),
    "time": (lambda: certificate(EYE, ONE, time=0.0), ConfigError, "time"),
    "gap": (lambda: certificate(EYE, ONE[:1], time=1.0), ShapeError, "2 entries"),
    "excess": (lambda: certificate(EYE, ONE, time=1.0).time_for(0.0), ConfigError, "excess"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call()
