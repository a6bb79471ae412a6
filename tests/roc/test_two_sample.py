"""The permutation test: statistics by hand, the exact level at equality, and power beside accuracy."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.roc import ArcLengthRatio, arc_length_test
from vifamily.roc._two_sample import _shares


def test_statistics_are_what_they_are_called(seed):
    rng = np.random.default_rng(seed)
    angle, y = rng.uniform(0, np.pi / 2, 50), np.repeat([1, 0], [20, 30])
    wanted = {
        "arc_length": np.sin(angle[:20]).mean() + np.cos(angle[20:]).mean(),
        "auc": roc_auc_score(y, angle),
        "accuracy": balanced_accuracy_score(y, angle > np.pi / 4),
    }
    for name, value in wanted.items():
        share, constant = _shares(angle, 20, name)
        assert share[:20].sum() + constant == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("statistic", ["arc_length", "auc", "accuracy"])
def test_level_at_equality(seed, statistic):
    rng = np.random.default_rng(seed)
    ratio, rejected = ArcLengthRatio(num_centers=15), []
    for k in range(150):
        x, y = rng.normal(size=(30, 2)), rng.normal(size=(25, 2))
        found = arc_length_test(x, y, ratio=ratio, statistic=statistic, num_permutations=19, seed=k)
        rejected.append(found.p_value <= 0.2)
    # accuracy has ties, which make it keep its level with room to spare
    assert np.mean(rejected) < 0.2 + 5 * math.sqrt(0.16 / 150)
    if statistic != "accuracy":
        assert np.mean(rejected) > 0.2 - 5 * math.sqrt(0.16 / 150)


def test_power_is_above_that_of_accuracy(seed):
    rng = np.random.default_rng(seed)
    p_values = {"arc_length": [], "accuracy": []}
    for k in range(40):
        x, y = rng.normal(0.3, 1, (300, 2)) * [1, 1] - [0, 0.3], rng.normal(size=(300, 2))
        for name, found in p_values.items():
            found.append(arc_length_test(x, y, statistic=name, num_permutations=99, seed=k).p_value)
    power = {name: np.mean(np.array(found) <= 0.05) for name, found in p_values.items()}
    assert power["arc_length"] > 0.4
    assert power["arc_length"] >= power["accuracy"]


def test_any_classifier_and_any_sizes(seed):
    rng = np.random.default_rng(seed)
    found = arc_length_test(
        rng.normal(2, 1, (12, 1)), rng.normal(size=(200, 1)), ratio=ArcLengthRatio(LogisticRegression())
    )
    assert found.p_value < 0.05
    assert found.num_held_out == (6, 100)
    assert "999 permutations" in str(found)


def test_equal_points_are_never_told_apart():
    assert arc_length_test(np.ones((10, 2)), np.ones((10, 2)), num_permutations=19).p_value == 1


def test_bad_input_is_refused():
    x = np.zeros((10, 1))
    with pytest.raises(ConfigError, match="accuracy"):
        arc_length_test(x, x, statistic="mmd")
    with pytest.raises(ConfigError, match="split"):
        arc_length_test(x, x, split=1)
    with pytest.raises(ShapeError, match="width"):
        arc_length_test(x, np.zeros((10, 2)))
    with pytest.raises(ConfigError, match="num_permutations"):
        arc_length_test(x, x, num_permutations=1.5)
    with pytest.raises(ConfigError, match="wrap"):
        arc_length_test(x, x, ratio=LogisticRegression())
    with pytest.raises(DataError, match="4 points"):
        arc_length_test(x[:3], x)
