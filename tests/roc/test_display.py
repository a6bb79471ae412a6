"""The display of the optimal ROC curve: what it draws, and that it follows scikit-learn's conventions."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.roc import ArcLengthRatio, OptimalRocDisplay, arc_length, arc_length_from_angles


def angles(seed, n=400):
    rng = np.random.default_rng(seed)
    return [np.arctan(np.exp(x - 0.5)) for x in (rng.normal(1, 1, n), rng.normal(size=n))]


def test_curves_and_annotations_are_drawn(seed):
    rng = np.random.default_rng(seed)
    result = arc_length(rng.normal(1, 1, (200, 1)), rng.normal(size=(200, 1)))
    before = dict(matplotlib.rcParams)
    display = result.plot()
    assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels[0] == "held out (length 2)"
    assert labels[1] == f"its hull (length {display.hull_length:.3f})"
    assert f"arc length {result.value:.3f}" in display.ax_.texts[0].get_text()
    assert display.line_.get_xdata()[-1] == 1
    assert isinstance(display.figure_, Figure)


def test_hull_is_above_the_staircase_and_inside_the_band(seed):
    display = OptimalRocDisplay.from_arc_length(arc_length_from_angles(*angles(seed)))
    assert (np.interp(display.fpr, *display.hull) >= display.tpr - 1e-12).all()
    grid, low, high = display.band()
    height = np.interp(grid, *display.hull)
    assert ((low <= height + 1e-12) & (height <= high + 1e-12)).all()
    assert (high[20:-20] > low[20:-20]).all()


def test_band_is_that_of_binomial_rates_with_a_known_slope():
    display = OptimalRocDisplay(arc_length_from_angles(np.full(50, np.pi / 4), np.full(100, np.pi / 4)))
    grid, low, high = display.band(3)
    # equal samples: the slope is one, the rate a half
    assert high[1] - low[1] == pytest.approx(2 * 1.959964 * np.sqrt(0.25 / 50 + 0.25 / 100), rel=1e-6)
    assert grid.tolist() == [0.0, 0.5, 1.0]


def test_from_estimator_and_from_predictions(seed):
    rng = np.random.default_rng(seed)
    x, y = np.concatenate([rng.normal(1, 1, (300, 1)), rng.normal(size=(300, 1))]), np.repeat(["yes", "no"], 300)
    fitted = ArcLengthRatio(random_state=0).fit(x[::2], y[::2])
    axes = Figure().add_subplot()
    display = OptimalRocDisplay.from_estimator(fitted, x[1::2], y[1::2], ax=axes)
    assert display.ax_ is axes
    assert axes.get_title(loc="left") == "ArcLengthRatio"
    other = OptimalRocDisplay.from_predictions(y[1::2], fitted.angle(x[1::2]), name="mine")
    assert other.result.value == display.result.value
    assert other.ax_.get_title(loc="left") == "mine"


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="ArcLengthRatio"):
        OptimalRocDisplay.from_estimator(LogisticRegression(), [[0.0]], [1])
    with pytest.raises(ShapeError, match="one angle"):
        OptimalRocDisplay.from_predictions([0, 1], [0.1])
    fitted = ArcLengthRatio().fit([[0.0], [1.0]], [0, 1])
    with pytest.raises(DataError, match="among"):
        OptimalRocDisplay.from_estimator(fitted, [[0.0], [1.0]], ["ill", "well"])
    with pytest.raises(DataError, match="two points"):
        OptimalRocDisplay.from_predictions([0, 0, 1], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match="pi/2"):
        OptimalRocDisplay.from_predictions([0, 0, 1, 1], [0.1, 0.2, 0.3, 2.0])
