"""The kernel fit of the arctangent ratio: known ratios, weights as repetitions, the optimum against its neighbours."""

import numpy as np
import pytest

from vifamily.numerics.kernel_angle import balanced_size, kernel_angle, robust_scale
from vifamily.numerics.penalised_angle import PENALTIES


def normal_pair(seed, sizes=(4000, 4000), shift=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, (sizes[0], 1)), rng.normal(size=(sizes[1], 1))


def test_angle_of_two_normals(seed):
    found = kernel_angle(*normal_pair(seed), np.random.default_rng(0))
    at = np.linspace(-1, 2, 9)[:, None]
    assert np.abs(found(at) - np.arctan(np.exp(at[:, 0] - 0.5))).max() < 0.12


def test_weights_are_repetitions(seed):
    rng = np.random.default_rng(seed)
    p, q = normal_pair(seed, (30, 40))
    w, v = rng.integers(1, 4, 30), rng.integers(1, 4, 40)
    weighted = kernel_angle(p, q, rng, weight_pos=w.astype(float), weight_neg=v.astype(float))
    repeated = kernel_angle(np.repeat(p, w, 0), np.repeat(q, v, 0), rng)
    at = np.linspace(-3, 3, 11)[:, None]
    assert weighted(at) == pytest.approx(repeated(at), abs=1e-6)
    unit = weighted.alpha * np.sqrt(balanced_size(w.sum(), v.sum()))
    assert min(abs(unit / each - 1) for each in PENALTIES) < 1e-12
    assert weighted.shortfall == pytest.approx(repeated.shortfall, rel=1e-6)


def test_no_neighbour_is_better(seed):
    p, q = normal_pair(seed, (50, 60))
    rng = np.random.default_rng(seed)
    found = kernel_angle(p, q, rng, num_centers=10, robust=False)
    centers, width = found.features.centers, found.features.bandwidth
    gram = np.exp(-0.5 * ((centers - centers.T) / width) ** 2)

    def gain(coefficients, intercept):
        u, v = (np.exp(-0.5 * ((x - centers.T) / width) ** 2) @ coefficients + intercept for x in (p, q))
        inside = np.sin(np.clip(u, 0, np.pi / 2)).mean() + np.cos(np.clip(v, 0, np.pi / 2)).mean()
        outside = np.minimum(u, 0).mean() + np.minimum(np.pi / 2 - v, 0).mean()
        return inside + outside - found.alpha * coefficients @ gram @ coefficients

    best = gain(found.coefficients, found.intercept)
    for _ in range(20):
        step = 0.05 * rng.normal(size=10)
        assert gain(found.coefficients + step, found.intercept) < best
    assert gain(found.coefficients, found.intercept + 0.05) < best


def test_scaling_of_skewed_and_of_constant_features():
    x = np.stack([np.r_[np.zeros(9), 5.0], np.ones(10)], axis=1)
    scale = robust_scale(x)
    assert scale.location.tolist() == [0.0, 1.0]
    assert scale.scale.tolist() == pytest.approx([1.5, 1.0])
    weighted = robust_scale(x, np.r_[np.ones(9), 91.0])
    assert weighted.location.tolist() == [5.0, 1.0]


def test_far_points_do_not_move_the_fit(seed):
    p, q = normal_pair(seed)
    at = np.linspace(-1, 2, 5)[:, None]
    plain = kernel_angle(p, q, np.random.default_rng(0))(at)
    spoiled = kernel_angle(np.r_[p, [[1e9]]], np.r_[q, [[-1e9]]], np.random.default_rng(0))(at)
    assert spoiled == pytest.approx(plain, abs=0.1)
