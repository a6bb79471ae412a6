"""Running arc lengths: the same numbers as all at once, and a million points."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.roc import ArcLengthRatio, ArcLengthStream, arc_length, arc_length_from_angles


def test_blocks_give_what_all_points_give(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(400, 2)) + np.array([1.0, 0.0]) * (np.arange(400) % 2)[:, None], np.arange(400) % 2
    fitted = ArcLengthRatio(random_state=0).fit(x[:200], y[:200])
    stream = ArcLengthStream(fitted)
    assert math.isnan(stream.value)
    for rows in np.array_split(np.arange(200, 400), 7):
        stream.update(x[rows], y[rows])
    u = fitted.angle(x[200:])
    whole = arc_length_from_angles(u[y[200:] == 1], u[y[200:] == 0])
    assert stream.value == pytest.approx(whole.value, abs=1e-12)
    assert stream.standard_error == pytest.approx(whole.standard_error, abs=1e-12)
    assert stream.lower_bound() == pytest.approx(whole.lower_bound, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["kernel", "network"])
def test_a_million_points(seed, model):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, (500_000, 1)), rng.normal(size=(500_000, 1))
    found = arc_length(a, b, ratio=ArcLengthRatio(model, max_samples=20_000), folds=2, interval="wald")
    assert abs(found.value - 1.546469) < 5 * found.standard_error
    assert found.standard_error == pytest.approx(math.sqrt(2 * 0.0498346 / 500_000), rel=0.05)


def test_a_stream_of_many_points(seed):
    rng = np.random.default_rng(seed)
    fitted = ArcLengthRatio(LogisticRegression()).fit(
        np.concatenate([rng.normal(1, 1, (5000, 1)), rng.normal(size=(5000, 1))]), np.repeat([1, 0], 5000)
    )
    stream = ArcLengthStream(fitted)
    for _ in range(10):
        stream.update(rng.normal(1, 1, (20_000, 1)), np.ones(20_000))
        stream.update(rng.normal(size=(20_000, 1)), np.zeros(20_000))
    assert (stream.num_pos, stream.num_neg) == (200_000, 200_000)
    assert abs(stream.value - 1.546469) < 5 * stream.standard_error


def test_bad_input_is_refused():
    x = np.arange(6.0)[:, None]
    with pytest.raises(ConfigError, match="angles"):
        ArcLengthStream(LogisticRegression())
    stream = ArcLengthStream(ArcLengthRatio().fit(x, [0, 1] * 3))
    with pytest.raises(DataError, match="labels"):
        stream.update(x, [2] * 6)
    for labels in (1, [1], [[1]] * 6):
        with pytest.raises(ShapeError, match="one label"):
            stream.update(x, labels)
    stream.update(x[:0], [])
    assert (stream.num_pos, stream.num_neg) == (0, 0)
    with pytest.raises(ConfigError, match="not fitted"):
        ArcLengthStream(ArcLengthRatio())
    with pytest.raises(ConfigError, match="level"):
        stream.lower_bound(1.0)
