"""Figures of tangent kernels: what is on them and what is refused."""

import numpy as np
import pytest

from vifamily import plots
from vifamily.errors import DataError, ShapeError

TIME = np.arange(5.0)


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_spectrum_marks_zeros_and_draws_them_in_sight():
    axes = plots.kernel_spectrum([1.0, 1e-3, 1e-17, 0.0], zeros=2, title="circle").axes[0]
    assert "zero to rounding (2)" in labels(axes)
    assert axes.get_ylim()[0] > 1e-6


def test_flow_has_a_second_panel_where_there_are_gaps():
    losses = {"predicted": np.exp(-TIME), "realised": np.exp(-TIME) + 0.1}
    one = plots.function_flow(TIME, losses, best=0.0)
    two = plots.function_flow(TIME, losses, {"realised": TIME / 10}, drift=TIME / 20)
    assert (len(one.axes), len(two.axes)) == (1, 2)
    assert labels(two.axes[1]) == ["realised", "drift of the kernel"]


def test_power_laws_write_their_slopes():
    figure = plots.power_laws([64, 256], {"drift": [[1.0], [0.25]], "gap": [[0.1, 0.2], [0.05, 0.04]]}, {"drift": -1.0})
    assert labels(figure.axes[0]) == ["drift, slope -1.00", "gap", "slope -1"]


REFUSED = {
    "no eigenvalue": (lambda: plots.kernel_spectrum([0.0], zeros=1), DataError, "no eigenvalue"),
    "lengths": (lambda: plots.function_flow(TIME, {"predicted": TIME[:3]}), ShapeError, "shape of the times"),
    "widths": (lambda: plots.power_laws([1, 2], {"drift": [[1.0]]}), ShapeError, "each of 2 widths"),
    "nothing positive": (lambda: plots.power_laws([1], {"drift": [[0.0]]}), DataError, "no value is positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call()
