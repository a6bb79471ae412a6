"""The penalised angle: slopes by hand, points left out against refits, the noise of a fit against its law."""

import numpy as np
import pytest
import torch

from vifamily.numerics.arctangent_ratio import RIGHT_ANGLE, extended_sine
from vifamily.numerics.penalised_angle import (
    PENALTIES,
    ClassFeatures,
    best_penalty,
    extended_terms,
    fit_linear_angle,
)


def sample(x):
    """Constant, linear and quadratic features of points."""
    return ClassFeatures(np.column_stack([np.ones(len(x)), x, x**2 / 4]), np.full(len(x), 1 / len(x)), float(len(x)))


def length(coefficients, x, y):
    u, v = (np.clip(sample(z).phi @ coefficients, 0, RIGHT_ANGLE) for z in (x, y))
    return np.sin(u).mean() + np.cos(v).mean()


def test_terms_by_hand_are_those_of_tensors():
    u = torch.tensor([-2.0, -0.1, 0.3, 1.5, 1.6, 9.0], dtype=torch.float64, requires_grad=True)
    value, slope, curvature = extended_terms(u.detach().numpy())
    wanted = extended_sine(u)
    assert value == pytest.approx(wanted.detach().numpy(), abs=1e-14)
    (gradient,) = torch.autograd.grad(wanted.sum(), u, create_graph=True)
    assert slope == pytest.approx(gradient.detach().numpy(), abs=1e-14)
    (second,) = torch.autograd.grad(gradient.sum(), u)
    assert curvature == pytest.approx(-second.numpy(), abs=1e-14)


def test_the_gradient_vanishes_at_the_fit(seed):
    rng = np.random.default_rng(seed)
    pos, neg = sample(rng.normal(1, 1, 80)), sample(rng.normal(size=70))
    found = fit_linear_angle(pos, neg, 1e-3)
    at, step = found.coefficients, 1e-6

    def loss(b):
        gain = extended_terms(pos.phi @ b)[0].mean() + extended_terms(RIGHT_ANGLE - neg.phi @ b)[0].mean()
        return 1e-3 * b[1:] @ b[1:] - gain

    slopes = [(loss(at + step * e) - loss(at - step * e)) / (2 * step) for e in np.eye(3)]
    assert np.abs(slopes).max() < 1e-7


def test_left_out_length_is_that_of_refits(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(1, 1, 40), rng.normal(size=30)
    found = fit_linear_angle(sample(x), sample(y), 1e-2)
    total = 0.0
    for i in range(40):
        at = fit_linear_angle(sample(np.delete(x, i)), sample(y), 1e-2).coefficients
        total += float(np.sin(np.clip(sample(x[[i]]).phi @ at, 0, RIGHT_ANGLE))[0]) / 40
    for i in range(30):
        at = fit_linear_angle(sample(x), sample(np.delete(y, i)), 1e-2).coefficients
        total += float(np.cos(np.clip(sample(y[[i]]).phi @ at, 0, RIGHT_ANGLE))[0]) / 30
    at_own = length(found.coefficients, x, y)
    assert abs(found.left_out - total) < 0.1 * (at_own - total)


def test_shortfall_is_the_mean_loss_of_length(seed):
    rng = np.random.default_rng(seed)
    fresh = rng.normal(1, 1, 100_000), rng.normal(size=100_000)
    best = length(fit_linear_angle(sample(fresh[0]), sample(fresh[1]), 1e-9).coefficients, *fresh)
    short, said = [], []
    for _ in range(200):
        found = fit_linear_angle(sample(rng.normal(1, 1, 150)), sample(rng.normal(size=150)), 1e-9)
        short.append(best - length(found.coefficients, *fresh))
        said.append(found.shortfall)
    # an order beyond the first is left out: a fifth at so few points
    assert abs(np.mean(short) - np.mean(said)) < 5 * np.std(short) / np.sqrt(200) + 0.2 * np.mean(short)


def test_penalty_is_weak_where_there_is_something_to_find(seed):
    rng = np.random.default_rng(seed)
    near, far = (best_penalty(sample(rng.normal(s, 1, 400)), sample(rng.normal(size=400)), 400.0) for s in (0.0, 3.0))
    assert far.alpha < near.alpha
    assert near.alpha in [unit / 20 for unit in PENALTIES]


def test_weights_are_repetitions(seed):
    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(1, 1, 30), rng.normal(size=30), rng.integers(1, 4, 30)
    weighted = best_penalty(ClassFeatures(sample(x).phi, w / w.sum(), float(w.sum())), sample(y), 30.0)
    repeated = best_penalty(sample(np.repeat(x, w)), sample(y), 30.0)
    assert weighted.coefficients == pytest.approx(repeated.coefficients, abs=1e-8)
    assert (weighted.alpha, weighted.left_out) == pytest.approx((repeated.alpha, repeated.left_out), rel=1e-8)
    assert weighted.shortfall == pytest.approx(repeated.shortfall, rel=1e-6)


def test_points_told_apart_end_in_time():
    found = best_penalty(sample(np.linspace(8, 9, 20)), sample(np.linspace(0, 1, 20)), 20.0)
    assert length(found.coefficients, np.linspace(8, 9, 20), np.linspace(0, 1, 20)) > 1.99
    assert np.isfinite([found.left_out, found.shortfall]).all()
