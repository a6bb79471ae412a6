"""The kernel Stein test: formula, level, power."""

import math

import numpy as np
import pytest
import torch

from vifamily.diagnostics.stein import kernel_stein
from vifamily.diagnostics.two_sample import median_bandwidth
from vifamily.errors import DataError, ShapeError


def test_stein_kernel_equals_automatic_differentiation(generator):
    z = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    score = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    square = median_bandwidth(z[::2], z[1::2]) ** 2

    def k(x, y):
        return (1 + ((x - y) ** 2).sum() / square) ** -0.5

    total = 0.0
    for i in range(6):
        for j in range(6):
            if i == j:
                continue
            kx = torch.func.grad(k, 0)(z[i], z[j])
            ky = torch.func.grad(k, 1)(z[i], z[j])
            trace = torch.func.jacrev(torch.func.grad(k, 0), 1)(z[i], z[j]).trace()
            total += float(score[i] @ score[j] * k(z[i], z[j]) + score[i] @ ky + score[j] @ kx + trace)
    assert kernel_stein(z, score, generator=generator).statistic == pytest.approx(total / 30, rel=1e-10)


def test_level_under_the_null(generator):
    p = []
    for _ in range(100):
        z = torch.randn(60, 1, generator=generator, dtype=torch.float64)
        p.append(kernel_stein(z, -z, generator=generator, num_bootstrap=200).p_value)
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) < 0.05) < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 100)


def test_power_against_a_wrong_scale(generator):
    z = torch.randn(300, 1, generator=generator, dtype=torch.float64)
    assert kernel_stein(0.6 * z, -0.6 * z, generator=generator).p_value < 0.01


def test_bad_input(generator):
    with pytest.raises(ShapeError, match="scores"):
        kernel_stein(torch.zeros(5, 2), torch.zeros(5, 1), generator=generator)
    with pytest.raises(DataError, match="NaN"):
        kernel_stein(torch.zeros(5, 2), torch.full((5, 2), math.nan), generator=generator)
