"""ROC curves from scores: the staircase trap, the hull as the best monotone angle, and the curve of known angles."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import roc_auc_score, roc_curve

from vifamily.roc._curves import concave_hull, fitted_curve, polyline_area, polyline_length, staircase


def scores(seed, n=300, shift=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, n), rng.normal(size=n)


def test_staircase_is_that_of_scikit_learn(seed):
    a, b = (np.round(x, 1) for x in scores(seed))
    fpr, tpr = staircase(a, b)
    y, s = np.repeat([1, 0], [len(a), len(b)]), np.concatenate([a, b])
    theirs = roc_curve(y, s, drop_intermediate=False)
    assert fpr == pytest.approx(theirs[0], abs=1e-12)
    assert tpr == pytest.approx(theirs[1], abs=1e-12)
    assert polyline_area(fpr, tpr) == pytest.approx(roc_auc_score(y, s), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_the_staircase_has_length_two_whatever_the_scores(seed, shift):
    assert polyline_length(*staircase(*scores(seed, shift=shift))) == pytest.approx(2.0, abs=1e-12)


def test_length_of_the_hull_is_that_of_the_best_monotone_angle(seed):
    a, b = scores(seed)
    fpr, tpr = concave_hull(*staircase(a, b))
    assert (np.diff(np.diff(tpr) / np.maximum(np.diff(fpr), 1e-300)) < 0).all()
    # the best monotone posterior at even odds is the isotonic regression of the labels
    both = np.concatenate([a, b])
    order = np.argsort(both)
    eta = isotonic_regression(np.repeat([1.0, 0.0], 300)[order])
    u = np.empty(600)
    u[order] = np.arctan2(eta, 1 - eta)
    assert np.sin(u[:300]).mean() + np.cos(u[300:]).mean() == pytest.approx(polyline_length(fpr, tpr), abs=1e-10)


def test_fitted_curve_of_the_true_angle_is_the_optimal_curve(seed):
    a, b = scores(seed, 20_000)
    false, true, angle = fitted_curve(*(np.arctan(np.exp(x - 0.5)) for x in (a, b)))
    assert false[-1] == pytest.approx(1)
    assert (np.diff(angle) <= 0).all()
    at = np.linspace(0.05, 0.95, 10)
    optimal = stats.norm.cdf(stats.norm.ppf(at) + 1)
    assert np.abs(np.interp(at, false, true) - optimal).max() < 5 * 0.5 / math.sqrt(20_000)
    assert polyline_length(false, true) == pytest.approx(1.546469, abs=5 * 0.0023)
    assert polyline_area(false, true) == pytest.approx(0.760250, abs=5 * 0.0025)
