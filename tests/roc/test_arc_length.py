"""Cross-fitted arc length, against population values by quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.roc import ArcLengthRatio, arc_length, arc_length_from_angles

NORMAL = stats.norm()
# positives, negatives, arc length, maximal AUC: one-dimensional pairs whose values are known to six digits
PAIRS = {
    "shift 0.25": (stats.norm(0.25), NORMAL, 1.424977, 0.570158),
    "shift 0.5": (stats.norm(0.5), NORMAL, 1.454447, 0.638163),
    "shift 1": (stats.norm(1), NORMAL, 1.546469, 0.760250),
    "shift 1.5": (stats.norm(1.5), NORMAL, 1.652002, 0.855578),
    "shift 2": (stats.norm(2), NORMAL, 1.749823, 0.921350),
    "shift 3": (stats.norm(3), NORMAL, 1.891545, 0.983053),
    "shift 4": (stats.norm(4), NORMAL, 1.962522, 0.997661),
    "scale 2": (stats.norm(0, 2), NORMAL, 1.516167, 0.704833),
    "scale 3": (stats.norm(0, 3), NORMAL, 1.607320, 0.795167),
    "N(1, 2)": (stats.norm(1, 2), NORMAL, 1.551719, 0.744084),
    "N(1, 0.5)": (stats.norm(1, 0.5), NORMAL, 1.646311, 0.831161),
    "N(2, 1.5)": (stats.norm(2, 1.5), NORMAL, 1.678423, 0.866559),
    "Cauchy shift 1": (stats.cauchy(1), stats.cauchy(), 1.486230, 0.685600),
    "Cauchy shift 2": (stats.cauchy(2), stats.cauchy(), 1.604263, 0.806436),
    "t3 shift 1": (stats.t(3, 1), stats.t(3), 1.512266, 0.717197),
    "t2 and normal": (stats.t(2), NORMAL, 1.451521, 0.584986),
    "Cauchy and normal": (stats.cauchy(), NORMAL, 1.494297, 0.647408),
    "Laplace and normal": (stats.laplace(), NORMAL, 1.438165, 0.581378),
    "exponential rates": (stats.expon(scale=2), stats.expon(), 1.478942857545, 2 / 3),
}


@pytest.mark.parametrize("name", PAIRS)
def test_estimates_of_the_table_at_ten_thousand_points(seed, name):
    positive, negative, length, area = PAIRS[name]
    rng = np.random.default_rng(seed)
    a, b = (law.rvs(size=(10_000, 1), random_state=rng) for law in (positive, negative))
    found = arc_length(a, b, folds=3, interval="wald")
    assert abs(found.value - length) < 5 * found.standard_error
    assert abs(found.auc - area) < 5 * found.auc_standard_error
    assert found.auc_lower_bound < area + 5 * found.auc_standard_error
    assert found.auc_range[0] <= area + 0.02


@pytest.mark.parametrize(
    ("dim", "scale", "length", "area"), [(2, 1.5, 1.497840, 0.692308), (5, 1.5, 1.595039, 0.802870),
                                         (5, 2.0, 1.763695, 0.922811)],
)  # fmt: skip
def test_scale_in_several_dimensions(seed, dim, scale, length, area):
    rng = np.random.default_rng(seed)
    found = arc_length(rng.normal(0, scale, (4000, dim)), rng.normal(size=(4000, dim)))
    # the gap is the price of a hundred centres; it is downwards
    assert -0.02 < found.value - length < 5 * found.standard_error
    assert found.auc < area + 5 * found.auc_standard_error


@pytest.mark.parametrize("name", ["shift 0.25", "shift 4", "Cauchy shift 1", "t2 and normal"])
def test_root_mean_squared_error_is_near_that_of_the_true_ratio(seed, name):
    positive, negative, length, _ = PAIRS[name]
    rng = np.random.default_rng(seed)
    mine, oracle = [], []
    for _ in range(20):
        a, b = (law.rvs(size=(1000, 1), random_state=rng) for law in (positive, negative))
        mine.append(arc_length(a, b, interval="wald").value - length)
        angles = (np.arctan2(positive.pdf(x[:, 0]), negative.pdf(x[:, 0])) for x in (a, b))
        oracle.append(arc_length_from_angles(*angles).value - length)
    over = np.square(mine) - 1.25**2 * np.square(oracle)
    assert over.mean() < 5 * over.std() / math.sqrt(20)
    assert abs(np.mean(np.subtract(mine, oracle))) < 0.5 * np.std(oracle)


@pytest.mark.parametrize(("shift", "length"), [(0.0, math.sqrt(2)), (0.25, 1.424977), (1.0, 1.546469), (3.0, 1.891545)])
def test_default_interval_and_bound_cover(seed, shift, length):
    rng = np.random.default_rng(seed)
    held = []
    for k in range(60):
        found = arc_length(rng.normal(shift, 1, (100, 1)), rng.normal(size=(100, 1)), seed=k)
        assert found.interval_kind == "score"
        low, high = found.interval
        held.append((low <= length + 1e-12 and length - 1e-12 <= high, found.lower_bound <= length + 1e-12))
    # five standard errors below 95 %
    assert np.mean(held, axis=0).min() > 0.95 - 5 * math.sqrt(0.95 * 0.05 / 60)


def test_other_models_get_permutations_near_equality(seed):
    rng = np.random.default_rng(seed)
    ratio = ArcLengthRatio(LogisticRegression())
    near = arc_length(rng.normal(size=(40, 1)), rng.normal(size=(40, 1)), ratio=ratio, folds=2, num_permutations=39)
    far = arc_length(rng.normal(2, 1, (40, 1)), rng.normal(size=(40, 1)), ratio=ratio, folds=2)
    assert (near.interval_kind, far.interval_kind) == ("permutation", "score")
    assert far.out_of_fold.shortfall == 0


def test_standard_error_is_that_of_the_influence_function(seed):
    rng = np.random.default_rng(seed)
    found = arc_length(rng.normal(1, 1, (2000, 1)), rng.normal(size=(2000, 1)), interval="wald")
    assert found.standard_error == pytest.approx(math.sqrt(2 * 0.0498346 / 2000), rel=0.15)
    assert found.interval_kind == "wald"
    assert found.interval[1] - found.value == pytest.approx(1.959964 * found.standard_error, rel=1e-6)
    # the bound is that of the held-out length alone
    held_out = np.sin(found.out_of_fold.angle_pos).mean() + np.cos(found.out_of_fold.angle_neg).mean()
    assert 0 < found.value - held_out < 0.005
    assert found.lower_bound == pytest.approx(held_out - 1.644854 * found.standard_error, rel=1e-6)
    assert found.auc_lower_bound == pytest.approx(found.auc - 1.644854 * found.auc_standard_error, rel=1e-6)
    assert found.surface_area == found.auc - 0.5
    assert f"{found.auc_lower_bound:.4f}" in found.certificate
    assert found.distance == pytest.approx(math.sqrt(found.value - math.sqrt(2)), rel=1e-12)


def test_permutation_interval_at_equality_covers_at_its_level(seed):
    rng = np.random.default_rng(seed)
    covered = []
    for k in range(20):
        a, b = rng.normal(size=(60, 1)), rng.normal(size=(60, 1))
        found = arc_length(a, b, ratio=ArcLengthRatio(num_centers=15), folds=2, level=0.8, seed=k,
                           interval="permutation", num_permutations=19)  # fmt: skip
        covered.append(found.interval[0] <= math.sqrt(2) + 1e-12 and found.interval[1] >= math.sqrt(2) - 1e-12)
    # at least 4 in 5, less five standard errors
    assert np.mean(covered) > 0.8 - 5 * math.sqrt(0.16 / 20)


def test_bootstrap_and_wald_agree_away_from_equality(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, (1000, 1)), rng.normal(size=(1000, 1))
    one, two = (arc_length(a, b, interval=kind).interval for kind in ("wald", "bootstrap"))
    assert two == pytest.approx(one, abs=0.004)


def test_any_classifier_and_a_warning_where_it_follows_noise(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.5, 1, (300, 2)), rng.normal(size=(300, 2))
    forest = ArcLengthRatio(RandomForestClassifier(20, min_samples_leaf=1, n_jobs=1))
    found = arc_length(a, b, ratio=forest, interval="wald")
    assert found.train_value > found.value + 0.2
    assert "follow noise" in str(found)


def test_results_repeat_and_follow_the_seed(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, (100, 1)), rng.normal(size=(100, 1))
    one, two, three = (arc_length(a, b, seed=s) for s in (1, 1, 2))
    assert one == two
    assert one.value != three.value


def test_equal_points_give_the_shortest_curve():
    found = arc_length(np.ones((20, 2)), np.ones((20, 2)))
    assert found.value == pytest.approx(math.sqrt(2), abs=1e-4)
    assert found.auc == 0.5
    assert "near equality" in str(found)


def test_a_constant_feature_and_units_change_nothing(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, (60, 1)), rng.normal(size=(60, 1))
    plain = arc_length(a, b).value
    constant = arc_length(np.c_[a, np.full(60, 3.0)], np.c_[b, np.full(60, 3.0)]).value
    assert constant == pytest.approx(plain, abs=1e-9)
    with np.errstate(over="raise"):
        for unit in (1e300, 1e-300):
            assert arc_length(unit * a, unit * b).value == pytest.approx(plain, abs=1e-9)
    on_graph = torch.from_numpy(a).requires_grad_()
    assert arc_length(on_graph, b).value == plain


def test_two_different_points_give_a_long_curve_and_an_honest_bound():
    found = arc_length(np.ones((20, 1)), np.zeros((20, 1)))
    assert found.value > 1.9
    assert found.auc == 1
    assert found.auc_lower_bound == pytest.approx(0.05 ** (1 / 20))
    for kind in ("wald", "bootstrap", "permutation"):
        low, high = arc_length(np.ones((20, 1)), np.zeros((20, 1)), interval=kind).interval
        assert low <= found.interval[0] < 1.95 < high


def test_bad_input_is_refused():
    x = np.zeros((20, 1))
    with pytest.raises(ShapeError, match="width"):
        arc_length(x, np.zeros((20, 2)))
    with pytest.raises(DataError, match="NaN"):
        arc_length(x, x * np.nan)
    with pytest.raises(DataError, match="10 points"):
        arc_length(x[:1], x)
    for folds in (1, 2.5, "5"):
        with pytest.raises(ConfigError, match="folds"):
            arc_length(x, x, folds=folds)
    with pytest.raises(ConfigError, match="level"):
        arc_length(x, x, level=95)
    with pytest.raises(ConfigError, match="num_bootstrap"):
        arc_length(x, x, interval="bootstrap", num_bootstrap=0)
    with pytest.raises(DataError, match="overflow"):
        arc_length(x + 1e307, x)
    for ratio in (LogisticRegression(), "kernel", ArcLengthRatio):
        with pytest.raises(ConfigError, match="wrap"):
            arc_length(x, x, ratio=ratio)
    for values in ([["a"]] * 20, [[0.0], [0.0, 1.0]], x + 1j):
        with pytest.raises(DataError, match="real numbers"):
            arc_length(values, x)
    with pytest.raises(ShapeError, match="x\\[:, None\\]"):
        arc_length(x[:, 0], x[:, 0])
    with pytest.raises(ConfigError, match="interval"):
        arc_length(x, x, interval="exact")
    with pytest.raises(ConfigError, match="39"):
        arc_length(x, x, interval="permutation", num_permutations=9)
    with pytest.raises(ShapeError, match="vectors"):
        arc_length_from_angles([0.1], [0.2, 0.3])
    with pytest.raises(DataError, match="pi/2"):
        arc_length_from_angles([0.1, np.nan], [0.2, 0.3])


def test_no_area_is_certified_at_equality(seed):
    rng = np.random.default_rng(seed)
    false = []
    for k in range(60):
        found = arc_length(rng.normal(size=(60, 1)), rng.normal(size=(60, 1)), interval="wald", seed=k)
        false.append(found.auc_lower_bound > 0.5)
    # at most 1 in 20, and five standard errors
    assert np.mean(false) < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 60)
    assert np.mean(false) < 0.1
