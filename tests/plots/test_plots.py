"""Figures from arrays: what is on them, what is refused, and that matplotlib's globals stay as they were."""

import numpy as np
import pytest

from vifamily import plots
from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.plots import _style as style

RNG = np.random.default_rng(3)
DRAWS = RNG.normal(size=(800, 3))
REFERENCE = RNG.normal(size=(700, 3)) * 2


def normal(points):
    return -0.5 * (points**2).sum(axis=1)


FIGURES = {
    "pairs": lambda: plots.pairs(DRAWS, ["a", "b", "c"], reference=REFERENCE, title="pairs"),
    "marginals": lambda: plots.marginals(DRAWS, reference=REFERENCE, title="marginals"),
    "contour": lambda: plots.contour(normal, DRAWS[:, :2], log_q=normal, title="contour"),
    "loss_trace": lambda: plots.loss_trace(
        np.arange(300), RNG.normal(size=300), np.ones(300), step_size=np.repeat([0.1, 0.05, 0.02], 100), level=0.0
    ),
    "k_hat of weights": lambda: plots.k_hat(0.9, 0.67, log_weights=RNG.normal(size=400)),
    "k_hat of data": lambda: plots.k_hat(RNG.uniform(size=20), names=[f"row {i}" for i in range(20)]),
    "ecdf_difference": lambda: plots.ecdf_difference(RNG.integers(0, 100, size=(60, 20)), 99, title="ranks"),
    "probability_histograms": lambda: plots.probability_histograms(RNG.uniform(size=(60, 5)), list("abcde")),
    "cell_grid": lambda: plots.cell_grid(
        [plots.Row("p", ["a", "b"], reference=REFERENCE[:, :2]), plots.Row("r", ["a"], reference=REFERENCE[:, :1])],
        ["mean_field", "full_rank"],
        {
            (0, 0): plots.Panel(DRAWS[:, :2], "error 0.1"),
            (0, 1): plots.Panel(None, "failed"),
            (1, 1): plots.Panel(DRAWS[:, :1]),
        },
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_saved_and_globals_stay(name, tmp_path):
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    figure = FIGURES[name]()
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.figs


def texts(figure):
    found = [
        t.get_text() for axes in figure.axes for t in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
    ]
    found += [t.get_text() for axes in figure.axes for t in [axes.title, axes._left_title]]
    found += [t.get_text() for box in figure.legends for t in box.get_texts()]
    found += [t.get_text() for axes in figure.axes if axes.get_legend() for t in axes.get_legend().get_texts()]
    return "\n".join(found) + (figure.get_suptitle() or "")


def test_pairs_labels_and_panels():
    figure = plots.pairs(DRAWS, ["mu", "tau", "theta[0]"], reference=REFERENCE, reference_label="NUTS")
    seen = texts(figure)
    assert all(name in seen for name in ("mu", "tau", "theta[0]", "posterior", "NUTS"))
    assert sum(axes.get_visible() for axes in figure.axes) == 6


def test_pairs_says_what_is_left_out():
    figure = plots.pairs(RNG.normal(size=(50, 12)), max_columns=3, title="many")
    assert "first 3 of 12" in texts(figure)


def test_limits_keep_the_reference_in_view_when_the_fit_went_astray():
    reference = RNG.normal(size=5000)
    low, high = style.limits(1e6 + RNG.normal(size=5000), reference)
    assert low < -2.5
    assert 2.5 < high < 50


def test_limits_of_a_constant_have_width():
    low, high = style.limits(np.full(10, 3.0))
    assert low < 3.0 < high


def test_density_integrates_to_one_and_finds_both_modes():
    draws = np.concatenate([RNG.normal(-4, 0.5, 4000), RNG.normal(4, 0.5, 4000)])
    grid, height = style.density(draws, (-8, 8))
    step = grid[1] - grid[0]
    assert abs(height.sum() * step - 1) < 1e-6
    exact = 0.5 * 1 / (0.5 * np.sqrt(2 * np.pi))
    # Silverman's rule would give a quarter of this height here
    assert abs(height[np.abs(grid + 4).argmin()] - exact) < 0.15 * exact
    assert height[np.abs(grid).argmin()] < 1e-3


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_mass_levels_of_a_normal(mass):
    grid = np.linspace(-6, 6, 401)
    x, y = np.meshgrid(grid, grid)
    (level,) = style.mass_levels(np.exp(-0.5 * (x**2 + y**2)), [mass])
    # the region that holds a mass m of a standard normal in the plane has density 1 - m of its peak
    assert abs(level - (1 - mass)) < 2e-3


def test_contour_takes_values_on_a_grid():
    x, y, points = plots.grid_over(DRAWS[:, :2], num=30)
    by_values = plots.contour(normal(points).reshape(30, 30), DRAWS[:, :2], x=x, y=y)
    assert by_values.axes[0].get_xlim() == pytest.approx((x[0], x[-1]))


def test_contour_with_density_minus_infinity_in_places():
    figure = plots.contour(lambda p: np.where(p[:, 0] > 0, normal(p), -np.inf), DRAWS[:, :2])
    assert figure.axes


def test_loss_trace_ignores_a_wild_start_and_marks_cuts():
    step = np.arange(1000)
    loss = 1e8 * np.exp(-step / 5) + np.sin(step)
    figure = plots.loss_trace(step, loss, step_size=np.where(step < 500, 0.1, 0.05))
    assert figure.axes[0].get_ylim()[1] < 50
    assert "step size cut" in texts(figure)


def test_loss_trace_of_one_point():
    assert plots.loss_trace([0], [1.0], [0.1]).axes[0].get_xlim() == (0.0, 1.0)


def test_k_hat_says_its_verdict():
    weights = RNG.normal(size=300)
    assert "k-hat 0.90, above the threshold 0.70" in texts(plots.k_hat(0.9, log_weights=weights))
    assert "k-hat 0.20, below the threshold 0.70" in texts(plots.k_hat(0.2, log_weights=weights))
    assert "2 of 4 data above" in texts(plots.k_hat([0.1, 0.8, 1.3, 0.2]))


def test_k_hat_counts_effective_draws():
    assert "(100 of 100 effective)" in texts(plots.k_hat(0.0, log_weights=np.zeros(100)))


def test_cell_grid_shows_reason_and_columns():
    seen = texts(FIGURES["cell_grid"]())
    assert all(word in seen for word in ("mean_field", "full_rank", "failed", "error 0.1"))


def test_finite_ensemble_of_few_points():
    points = np.repeat(RNG.normal(size=(3, 2)), 50, axis=0)
    for drawn in (points, np.ones((20, 2))):
        figure = plots.pairs(drawn)
        figure.canvas.draw()
        assert len(figure.axes) == 4  # two by two panels


REFUSED = {
    "rank": (lambda: plots.pairs(np.zeros((2, 2, 2))), ShapeError, "must have shape"),
    "names": (lambda: plots.pairs(DRAWS, ["a"]), ShapeError, "3 columns need 3 names"),
    "reference": (lambda: plots.marginals(DRAWS, reference=REFERENCE[:, :2]), ShapeError, "reference must have shape"),
    "empty": (lambda: plots.marginals(np.full((10, 2), np.nan)), DataError, "at least two finite draws"),
    "no columns": (lambda: plots.pairs(DRAWS, max_columns=0), ConfigError, "max_columns"),
    "three dimensions": (lambda: plots.contour(normal, DRAWS), ShapeError, r"\(draw, 2\)"),
    "values without grid": (lambda: plots.contour(np.zeros((3, 3)), DRAWS[:, :2]), ShapeError, "need their grid"),
    "half a grid": (lambda: plots.contour(normal, DRAWS[:, :2], x=[0, 1]), ShapeError, "both x and y"),
    "transposed": (
        lambda: plots.contour(np.zeros((2, 3)), DRAWS[:, :2], x=[0, 1], y=[0, 1, 2]),
        ShapeError,
        r"\(3, 2\)",
    ),
    "function of wrong size": (lambda: plots.contour(lambda p: p, DRAWS[:, :2]), ShapeError, "one number per point"),
    "lengths": (lambda: plots.loss_trace([0, 1], [1.0]), ShapeError, "one length"),
    "no finite loss": (lambda: plots.loss_trace([0, 1], [np.nan, np.inf]), DataError, "no finite value"),
    "k without weights": (lambda: plots.k_hat(0.3), ShapeError, "log weights"),
    "many k with weights": (lambda: plots.k_hat([0.1, 0.2], log_weights=[1.0, 2.0]), ShapeError, "single k"),
    "empty grid": (lambda: plots.cell_grid([], ["a"], {}), ShapeError, "at least one row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        call()


def test_units_that_the_same_members_share_stand_together():
    first, second = [0.51, 0.0, 0.49, 0.0], [0.0, 0.5, 0.0, 0.5]
    # who of two has a little more of a unit does not tear units apart
    map_ = np.array([first, second, first[::-1], [0.49, 0.0, 0.51, 0.0], second, first]).T
    axes = plots.responsibilities(map_).axes[0]
    drawn = axes.images[0].get_array()
    shared = [tuple(np.flatnonzero(column > 0.4)) for column in drawn.T]
    assert shared == sorted(shared) and len(set(shared)) == 2
    assert [label.get_text() for label in plots.responsibilities(map_, unit_names="abcdef").axes[0].get_xticklabels()]


def test_many_units_are_averaged_and_counted():
    map_ = np.zeros((2, 5000))
    map_[0, :2000], map_[1, 2000:] = 1, 1
    figure = plots.responsibilities(map_, unit="token", unit_names=[str(i) for i in range(5000)])
    figure.canvas.draw()
    axes, usage = figure.axes[0], figure.axes[1]
    drawn = axes.images[0].get_array()
    assert drawn.shape[1] < 1000 and np.allclose(drawn.mean(1), [0.4, 0.6], atol=0.01)
    ticks = [label for label in axes.get_xticklabels() if 0 <= label.get_position()[0] <= 5000]
    assert 3 <= len(ticks) <= 8 and {label.get_text() for label in ticks} >= {"0", "1000", "4000"}
    assert len([t for t in usage.get_xticks() if 0 <= t <= usage.get_xlim()[1]]) <= 3
    with pytest.raises(ShapeError, match="5000 units need 5000 names"):
        plots.responsibilities(map_, unit_names=["a"])
