"""The arctangent ratio as a classifier: the contract of scikit-learn, and the angle of known densities."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from vifamily.errors import ConfigError, DataError
from vifamily.rng import scoped
from vifamily.roc import ArcLengthRatio

MODELS = ["kernel", "network", LogisticRegression(C=1e3)]


def unequal_by_design(estimator):
    """Minibatches and held-out parts are drawn by rows, so a repeated row is not a row of weight two."""
    if estimator.model == "network":
        reason = "rows are held out and batched at random"
        return {
            "check_sample_weight_equivalence_on_dense_data": reason,
            "check_sample_weights_invariance": reason,
        }
    return {}


@parametrize_with_checks(
    [ArcLengthRatio(), ArcLengthRatio("network", max_iter=60), ArcLengthRatio(LogisticRegression())],
    expected_failed_checks=unequal_by_design,
)
def test_contract(estimator, check, seed):
    with scoped(seed):  # some checks draw from NumPy's global stream
        check(estimator)


@pytest.mark.parametrize("model", MODELS)
def test_angle_is_free_of_the_class_frequencies(seed, model):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(1, 1, (500, 1)), rng.normal(size=(4000, 1))])
    fitted = ArcLengthRatio(model, random_state=0).fit(x, np.repeat([1, 0], [500, 4000]))
    at = np.linspace(-1, 2, 7)[:, None]
    assert np.abs(fitted.angle(at) - np.arctan(np.exp(at[:, 0] - 0.5))).max() < 0.2
    odds = np.divide(*fitted.predict_proba(at).T[::-1])
    assert odds == pytest.approx(fitted.density_ratio(at) * 500 / 4000, rel=1e-10)
    even = np.divide(*fitted.predict_proba(at, prior=0.5).T[::-1])
    assert even == pytest.approx(fitted.density_ratio(at), rel=1e-10)
    assert np.tan(fitted.angle(at)) == pytest.approx(fitted.density_ratio(at), rel=1e-9)


@pytest.mark.parametrize(
    "classifier",
    [
        LogisticRegression(class_weight="balanced", C=1e3),
        LogisticRegression(class_weight={0: 1.0, 1: 5.0}, C=1e3),
        make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", C=1e3)),
        LinearDiscriminantAnalysis(),
    ],
)
def test_class_weights_of_a_classifier_are_divided_out(seed, classifier):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(1, 1, (1000, 1)), rng.normal(size=(4000, 1))])
    fitted = ArcLengthRatio(classifier).fit(x, np.repeat([1, 0], [1000, 4000]))
    at = np.linspace(-1, 2, 7)[:, None]
    # a well-specified logistic: log p / q = x - 1/2, five standard errors of its two coefficients
    assert np.abs(fitted.log_density_ratio(at) - (at[:, 0] - 0.5)).max() < 0.45


@pytest.mark.parametrize("model", ["kernel", LogisticRegression()])
def test_weights_are_repetitions(seed, model):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, 2)), np.arange(40) % 2
    w = rng.integers(0, 4, 40)
    at = rng.normal(size=(9, 2))
    weighted = ArcLengthRatio(model, random_state=0).fit(x, y, sample_weight=w)
    repeated = ArcLengthRatio(model, random_state=0).fit(np.repeat(x, w, 0), np.repeat(y, w))
    assert weighted.prior_ == pytest.approx(repeated.prior_, rel=1e-12)
    assert weighted.angle(at) == pytest.approx(repeated.angle(at), abs=1e-4)


@pytest.mark.parametrize("model", ["kernel", "network"])
def test_a_seed_repeats_a_fit_and_leaves_the_globals_alone(seed, model):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(300, 3)), np.arange(300) % 2
    one, two = (ArcLengthRatio(model, max_iter=20, random_state=3).fit(x, y).angle(x) for _ in range(2))
    assert np.array_equal(one, two)


def test_the_kernel_is_fitted_to_a_part_of_a_large_sample(seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(1, 1, (100_000, 1)), rng.normal(size=(3000, 1))])
    fitted = ArcLengthRatio(max_samples=2000, random_state=0).fit(x, np.repeat([1, 0], [100_000, 3000]))
    assert fitted.fitted_.alpha == pytest.approx(0.05 / np.sqrt(2000))
    at = np.linspace(-1, 2, 7)[:, None]
    assert np.abs(fitted.angle(at) - np.arctan(np.exp(at[:, 0] - 0.5))).max() < 0.2


def test_constant_features_and_equal_points_give_even_odds():
    x, y = np.ones((20, 2)), np.arange(20) % 2
    for model in ("kernel", "network"):
        assert ArcLengthRatio(model, random_state=0).fit(x, y).angle(x) == pytest.approx(np.pi / 4, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bandwidth": -1}, "bandwidth"),
        ({"alpha": 0}, "alpha"),
        ({"model": "forest"}, "kernel"),
        ({"model": StandardScaler()}, "predict_proba"),
        ({"scaling": "log"}, "scaling"),
        ({"hidden": ()}, "hidden"),
        ({"hidden": 32}, "hidden"),
        ({"hidden": (3.5,)}, "positive integer"),
        ({"num_centers": 2.5}, "num_centers must be a positive integer"),
        ({"batch_size": True}, "batch_size"),
        ({"max_iter": "20"}, "max_iter"),
        ({"bandwidth": None}, "bandwidth"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"validation_fraction": "a fifth"}, "validation_fraction"),
        ({"validation_fraction": 1}, "validation_fraction"),
        ({"random_state": "x"}, "random_state"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        clone(ArcLengthRatio(**settings)).fit(np.arange(6.0)[:, None], [0, 1] * 3)


def test_bad_data_is_refused():
    x = np.arange(6.0)[:, None]
    with pytest.raises(DataError, match="one class"):
        ArcLengthRatio().fit(x, np.ones(6))
    with pytest.raises(DataError, match="negative"):
        ArcLengthRatio().fit(x, [0, 1] * 3, sample_weight=[1, 1, 1, 1, 1, -1])
    with pytest.raises(ConfigError, match="balanced"):
        ArcLengthRatio(LogisticRegression(class_weight="balanced")).fit(x, [0, 1] * 3, sample_weight=np.ones(6))
    with pytest.raises(ConfigError, match="prior"):
        ArcLengthRatio().fit(x, [0, 1] * 3).predict_proba(x, prior=1)
    with pytest.raises(ConfigError, match="prior"):
        ArcLengthRatio().fit(x, [0, 1] * 3).predict_proba(x, prior="even")
    with pytest.raises(ValueError, match="NaN"):
        ArcLengthRatio().fit(x * np.nan, [0, 1] * 3)
