"""The arctangent ratio as a classifier: the contract of scikit-learn, and the angle of known densities."""

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from vifamily.errors import ConfigError, DataError
from vifamily.rng import scoped
from vifamily.roc import ArcLengthRatio


@parametrize_with_checks([ArcLengthRatio()])
def test_contract(estimator, check, seed):
    with scoped(seed):  # some checks draw from NumPy's global stream
        check(estimator)


def test_angle_is_free_of_the_class_frequencies(seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(1, 1, (500, 1)), rng.normal(size=(4000, 1))])
    fitted = ArcLengthRatio(random_state=0).fit(x, np.repeat([1, 0], [500, 4000]))
    at = np.linspace(-1, 2, 7)[:, None]
    assert np.abs(fitted.angle(at) - np.arctan(np.exp(at[:, 0] - 0.5))).max() < 0.2
    odds = np.divide(*fitted.predict_proba(at).T[::-1])
    assert odds == pytest.approx(fitted.density_ratio(at) * 500 / 4000, rel=1e-10)


def test_bad_input_is_refused():
    x = np.arange(6.0)[:, None]
    with pytest.raises(DataError, match="one class"):
        ArcLengthRatio().fit(x, np.ones(6))
    with pytest.raises(ConfigError, match="positive"):
        ArcLengthRatio(bandwidth=-1).fit(x, [0, 1] * 3)
