"""Classifier two-sample tests: samples of one law, of laws apart, of different forms, and what is refused."""

import pytest
import torch

from vifamily.diagnostics import c2st
from vifamily.errors import ConfigError, ShapeError
from vifamily.rng import generator


def normal(num, dim, seed, name):
    return torch.randn(num, dim, generator=generator(seed, name), dtype=torch.float64)


def test_samples_of_one_law_cannot_be_told_apart(seed):
    found = c2st(normal(600, 2, seed, "a"), normal(600, 2, seed, "b"), most_epochs=100)
    # over-fitting can only lower the accuracy on parts that were not seen
    assert found.value < 0.5 + 5 * found.error


def test_the_accuracy_of_a_shift_is_that_of_the_best_classifier(seed):
    # two normal laws two apart: the best classifier is right with probability Phi(1) = 0.841
    found = c2st(normal(1500, 1, seed, "a"), normal(1500, 1, seed, "b") + 2, most_epochs=100)
    assert found.value == pytest.approx(0.8413, abs=5 * found.error)


def test_a_difference_in_correlation_is_seen(seed):
    x, y = normal(800, 2, seed, "a"), normal(800, 2, seed, "b")
    y[:, 1] = 0.95 * y[:, 0] + (1 - 0.95**2) ** 0.5 * y[:, 1]
    assert c2st(x, y, most_epochs=100).value > 0.6


def test_units_do_not_matter_and_seeds_do():
    x, y = normal(200, 2, 0, "a"), normal(300, 2, 0, "b") + 1
    one = c2st(x, y, most_epochs=30)
    assert one == c2st(1e6 * x, 1e6 * y, most_epochs=30)
    assert one == c2st(x, y, most_epochs=30)


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(ConfigError, match="ten draws"):
        c2st(torch.zeros(20, 1), torch.zeros(20, 1))
    with pytest.raises(ShapeError):
        c2st(torch.zeros(100, 1), torch.zeros(100, 2))
