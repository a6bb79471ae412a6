"""Cross-fitted arc length, against population values by quadrature."""

import math

import numpy as np
import pytest

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.roc import arc_length


@pytest.mark.parametrize(("shift", "length"), [(1, 1.546469), (2, 1.749823), (3, 1.891545)])
def test_estimate_is_within_sampling_error(seed, shift, length):
    rng = np.random.default_rng(seed)
    found = arc_length(rng.normal(shift, 1, (2000, 1)), rng.normal(size=(2000, 1)))
    assert abs(found.value - length) < 5 * found.standard_error
    assert found.lower_bound > found.interval[0]


def test_standard_error_is_that_of_the_influence_function(seed):
    rng = np.random.default_rng(seed)
    found = arc_length(rng.normal(1, 1, (2000, 1)), rng.normal(size=(2000, 1)))
    assert found.standard_error == pytest.approx(math.sqrt(2 * 0.0498346 / 2000), rel=0.15)


def test_equal_points_give_the_shortest_curve():
    found = arc_length(np.ones((20, 2)), np.ones((20, 2)))
    assert found.value == pytest.approx(math.sqrt(2), abs=1e-4)
    assert "near equality" in str(found)


def test_bad_input_is_refused():
    x = np.zeros((20, 1))
    with pytest.raises(ShapeError, match="width"):
        arc_length(x, np.zeros((20, 2)))
    with pytest.raises(DataError, match="NaN"):
        arc_length(x, x * np.nan)
    with pytest.raises(DataError, match="10 points"):
        arc_length(x[:1], x)
    with pytest.raises(ConfigError, match="folds"):
        arc_length(x, x, folds=1)
