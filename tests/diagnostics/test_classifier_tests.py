"""Classifier two-sample tests: the accuracy of the best classifier where it is known, and error rates at equality."""

import math

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from vifamily.diagnostics import c2st, local_c2st
from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.rng import generator

DOUBLE = torch.float64


def normal(shape, seed, name):
    return torch.randn(shape, generator=generator(seed, name), dtype=DOUBLE)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_accuracy_of_the_best_classifier(seed, shift):
    # N(0, 1) against N(shift, 1): the best rule cuts half way, and is right with probability Phi(shift / 2)
    x, y = normal((2000, 1), seed, "x"), normal((2000, 1), seed, "y") + shift
    found = c2st(x, y, classifier=LinearDiscriminantAnalysis(), seed=seed)
    best = 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))
    assert abs(found.value - best) < 5 * max(found.error, 0.5 / math.sqrt(4000)) + 0.002


def test_network_sees_what_moments_do_not(seed):
    # a ring and a normal with equal means and covariances
    angle = 2 * math.pi * torch.rand(400, generator=generator(seed, "angle"), dtype=DOUBLE)
    ring = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    cloud = normal((400, 2), seed, "cloud")
    assert c2st(cloud, ring, classifier=LinearDiscriminantAnalysis(), seed=seed).value < 0.56
    assert c2st(cloud, ring, seed=seed).value > 0.8


def test_scale_of_the_reference_is_taken_off(seed):
    x, y = normal((300, 2), seed, "x"), normal((300, 2), seed, "y")
    y[:, 1] += 1
    unit = torch.tensor([1e-6, 1e6], dtype=DOUBLE)
    assert c2st(x, y, seed=seed).value == pytest.approx(c2st(x * unit, y * unit, seed=seed).value, abs=1e-3)


def test_same_seed_same_figure(seed):
    x, y = normal((100, 1), seed, "x"), normal((100, 1), seed, "y") + 1
    assert c2st(x, y, seed=seed) == c2st(x, y, seed=seed)


def test_constant_quantity_is_no_error(seed):
    x = torch.cat([normal((100, 1), seed, "x"), torch.ones(100, 1, dtype=DOUBLE)], 1)
    assert 0.3 < c2st(x, x.flip(0), classifier=LogisticRegression(), seed=seed).value < 0.7


def test_c2st_refuses(seed):
    x = normal((50, 2), seed, "x")
    with pytest.raises(ShapeError, match="equal size"):
        c2st(x, x[:40])
    with pytest.raises(ShapeError, match="folds need"):
        c2st(x[:3], x[3:6])
    with pytest.raises(ConfigError, match="folds"):
        c2st(x, x, folds=1)
    with pytest.raises(DataError):
        c2st(x, x.clone().fill_(math.nan))


def simulated(seed, size=400):
    """theta ~ N(0, 1), x | theta ~ N(theta, 1): the posterior is N(x / 2, 1 / 2)."""
    theta = normal((size, 1), seed, "theta")
    return theta, theta + normal((size, 1), seed, "noise")


def quadratic():
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures

    return make_pipeline(PolynomialFeatures(2), LogisticRegression())


def test_local_test_is_even_where_the_posterior_is_right(seed):
    # under the hypothesis p-values are uniform on k / 20: 40 of them, mean one half
    p = []
    for index in range(40):
        theta, x = simulated(seed + index, 150)
        draws = x / 2 + math.sqrt(0.5) * normal((150, 1), seed + index, "draws")
        at = 0.25 + math.sqrt(0.5) * normal((50, 1), seed + index, "at")
        found = local_c2st(
            theta, x, draws, observed=[0.5], observed_draws=at, num_null=19, classifier=quadratic(), seed=index
        )
        p.append(found.p_value)
    mean = sum(p) / len(p)
    assert abs(mean - 0.525) < 5 * math.sqrt((400 - 1) / 12) / 20 / math.sqrt(len(p))


def test_local_test_finds_where_it_is_wrong(seed):
    # right for negative x, a unit too high for positive x
    theta, x = simulated(seed, 1500)
    draws = x / 2 + math.sqrt(0.5) * normal(x.shape, seed, "draws") + (x > 0)
    deep = dict(num_null=19, seed=seed, classifier=_tree())
    statistics = {}
    for at in (-1.5, 1.5):
        q = at / 2 + math.sqrt(0.5) * normal((200, 1), seed, "at") + (at > 0)
        statistics[at] = local_c2st(theta, x, draws, observed=[at], observed_draws=q, **deep)
    assert statistics[1.5].p_value == 0.05
    assert statistics[1.5].statistic > 4 * statistics[-1.5].statistic


def _tree():
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(30, min_samples_leaf=40, random_state=0)


def test_local_test_refuses(seed):
    theta, x = simulated(seed, 30)
    given = dict(observed=[0.0], observed_draws=theta)
    with pytest.raises(ShapeError, match="every simulation"):
        local_c2st(theta, x[:10], theta, **given)
    with pytest.raises(ShapeError, match="columns"):
        local_c2st(theta, x, theta, observed=[0.0, 1.0], observed_draws=theta)
    with pytest.raises(ConfigError, match="num_null"):
        local_c2st(theta, x, theta, num_null=0, **given)
    assert "p-value" in str(local_c2st(theta, x, theta, num_null=1, classifier=LogisticRegression(), **given))
