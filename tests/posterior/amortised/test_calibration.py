"""Calibration of amortised posteriors: a well-specified one passes every check, one that is broken fails them."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import vifamily as vf
from vifamily.errors import NotAvailableError


def fitted():
    """A posterior that is exact but for the fit's own error: ``N(x / 2, 0.5 I)``."""
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    simulator = vf.models.Simulator(prior, lambda t: t + torch.randn_like(t))
    out = vf.fit(simulator, "full_rank", "inclusive_kl(simulations=4000)", encoder="vector", seed=0)
    inner = out.family.family
    with torch.no_grad():  # the exact conditional law in place of the fitted one
        head, scale, shift = inner.head[-1], out.family.encoder.scale, out.family.encoder.shift
        head.weight.zero_()
        head.bias.zero_()
        head.weight[:2] = 0.5 * torch.eye(2) / scale / inner.scale[:, None]
        inner.loc.copy_((0.5 * shift - inner.shift) / inner.scale)
        inner.log_diagonal.copy_((math.sqrt(0.5) / inner.scale).log())
        inner.lower.zero_()
    return out


@pytest.fixture(scope="module")
def exact():
    return fitted()


@pytest.fixture(scope="module")
def narrow(exact):
    out = fitted()
    with torch.no_grad():
        out.family.family.log_diagonal -= math.log(2)
    return out


@pytest.fixture(scope="module")
def shifted(exact):
    out = fitted()
    with torch.no_grad():
        out.family.family.loc += 0.7
    return out


def test_ranks(exact, narrow, shifted, seed):
    assert exact.sbc(200, num_draws=99, seed=seed, progress=False).calibrated(0.001)
    assert not narrow.sbc(200, num_draws=99, seed=seed, progress=False).calibrated(0.001)
    assert not shifted.sbc(200, num_draws=99, seed=seed, progress=False).calibrated(0.001)


def test_coverage(exact, narrow, seed):
    assert exact.coverage(400, num_draws=99, seed=seed).calibrated(0.001)
    found = narrow.coverage(400, num_draws=99, seed=seed)
    assert not found.calibrated(0.001) and found.reading == "too narrow"
    # a normal law of two coordinates and half the scale: its region of half the mass has radius^2 = 2 log 2 / 4
    wanted = 1 - math.exp(-math.log(2) / 4)
    assert float(found.coverage(0.5)) == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / 400) + 0.01)


def test_balls_about_random_points(exact, narrow, shifted, seed):
    assert exact.tarp(400, num_draws=99, seed=seed).calibrated(0.001)
    assert not narrow.tarp(400, num_draws=99, seed=seed).calibrated(0.001)
    assert not shifted.tarp(400, num_draws=99, seed=seed).calibrated(0.001)


def test_at_one_observation(exact, shifted):
    options = {"num_simulations": 400, "num_null": 39, "classifier": LogisticRegression()}
    assert exact.local_c2st(torch.zeros(2), **options).p_value > 0.001
    assert shifted.local_c2st(torch.zeros(2), **options).p_value == pytest.approx(1 / 40)


def test_calibration_needs_the_simulator(exact, tmp_path):
    alone = vf.load(exact.save(tmp_path))
    for check in (alone.sbc, alone.coverage, alone.tarp):
        with pytest.raises(NotAvailableError, match="simulator"):
            check(20)
