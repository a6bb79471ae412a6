"""Predictions: laws of total variance and of total entropy, scores, calibration."""

import math

import numpy as np
import pytest
import torch

from vifamily import errors, rng
from vifamily.models import Prediction
from vifamily.models._likelihoods import likelihood_of
from vifamily.testing._tools import seeded

DOUBLE = torch.float64


def prediction(outputs, spec):
    return Prediction(torch.as_tensor(outputs, dtype=DOUBLE), likelihood_of(spec))


def test_law_of_total_variance(seed):
    outputs = torch.randn(4, 3, generator=seeded(0), dtype=DOUBLE)
    found = prediction(outputs, "gaussian(sd=0.5)")
    torch.testing.assert_close(found.sd.square(), found.epistemic + found.aleatoric)
    torch.testing.assert_close(found.epistemic, outputs.var(0, correction=0))
    many = prediction(outputs.repeat(10_000, 1), "gaussian(sd=0.5)").sample(rng.generator(seed, "new"))
    square = (many - found.mean).square()
    assert bool(((square.mean(0) - found.sd.square()).abs() < 5 * square.std(0) / 200).all())


def test_heteroscedastic_noise_is_averaged():
    found = prediction([[[0.0, 0.0]], [[2.0, 1.0]]], "heteroscedastic")
    spread = [math.log(2) + 1e-6, math.log1p(math.e) + 1e-6]
    assert found.epistemic.item() == pytest.approx(1.0)
    assert found.aleatoric.item() == pytest.approx((spread[0] ** 2 + spread[1] ** 2) / 2)


def test_entropies_of_two_sure_draws_that_disagree():
    found = prediction([[[50.0, 0.0]], [[0.0, 50.0]]], "categorical")
    assert found.entropy.item() == pytest.approx(math.log(2))
    assert found.epistemic.item() == pytest.approx(math.log(2))
    assert found.aleatoric.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(found.probabilities, torch.full((1, 2), 0.5, dtype=DOUBLE))


def test_entropies_of_draws_that_agree():
    found = prediction([[0.0], [0.0]], "bernoulli")
    assert found.aleatoric.item() == pytest.approx(math.log(2))
    assert found.epistemic.item() == 0.0
    assert found.entropy.item() == pytest.approx(math.log(2))


def test_log_score_is_that_of_the_mixture():
    outputs = torch.randn(4, 3, generator=seeded(0), dtype=DOUBLE)
    y = torch.randn(3, generator=seeded(1), dtype=DOUBLE)
    density = torch.distributions.Normal(outputs, 0.5).log_prob(y).exp().mean(0)
    torch.testing.assert_close(prediction(outputs, "gaussian(sd=0.5)").log_score(y), density.log())
    torch.testing.assert_close(prediction(outputs, "gaussian(sd=0.5)").log_score(y.numpy()), density.log())


@pytest.mark.parametrize("spec", ["gaussian(sd=1.0)", "student_t(df=3, scale=1.0)", "poisson", "heteroscedastic"])
def test_intervals_cover_as_they_say_where_the_model_is_right(spec, seed):
    count = 4000
    wide = (count, 2) if spec == "heteroscedastic" else (count,)
    outputs = 2 + torch.randn(wide, generator=seeded(0), dtype=DOUBLE)
    outputs = outputs.expand(400, *wide)
    found = Prediction(outputs, likelihood_of(spec))
    y = found.sample(rng.generator(seed, "data"))[0]
    scores = found.calibration(y, seed=1)
    for level in (50, 80, 95):
        share = level / 100
        slack = 0.12 if spec == "poisson" else 0.0  # whole numbers have no interval of a given mass
        assert abs(scores[f"coverage_{level}"] - share) < 5 * math.sqrt(share * (1 - share) / count) + slack
    assert scores["rmse"] == pytest.approx(float((found.mean - y).square().mean().sqrt()))


def test_calibration_error_of_known_bins():
    # confidence 0.8 on ten data of which six are right: a gap of 0.2
    outputs = torch.full((2, 10), math.log(4.0), dtype=DOUBLE)
    y = torch.tensor([1] * 6 + [0] * 4)
    scores = prediction(outputs, "bernoulli").calibration(y)
    assert scores["ece"] == pytest.approx(0.2)
    assert scores["error_rate"] == pytest.approx(0.4)
    logits = torch.stack([torch.zeros(10), outputs[0]], -1).expand(2, 10, 2)
    assert prediction(logits, "categorical").calibration(y) == pytest.approx(scores)


def test_calibration_of_draws_from_the_probabilities(seed):
    logits = 2 * torch.randn(1, 4000, 3, generator=seeded(0), dtype=DOUBLE)
    found = prediction(logits, "categorical")
    y = found.sample(rng.generator(seed, "labels"))[0]
    # each bin of n data deviates by up to 0.5 / sqrt(n); the sum over bins weighs them by n / N
    assert found.calibration(y)["ece"] < 5 * 0.5 * math.sqrt(15 / 4000)


def test_what_is_not_known_is_refused():
    found = prediction(torch.zeros(2, 3), lambda outputs, y: -(outputs - y).square())
    assert found.log_score(torch.zeros(3)).tolist() == [0.0] * 3
    for ask in ("mean", "sd", "epistemic", "entropy", "probabilities"):
        with pytest.raises(errors.NotAvailableError):
            getattr(found, ask)
    with pytest.raises(errors.NotAvailableError):
        found.calibration(torch.zeros(3))
    with pytest.raises(errors.NotAvailableError):
        prediction(torch.zeros(2, 3), "gaussian(sd=1.0)").probabilities  # noqa: B018
    with pytest.raises(errors.NotAvailableError):
        prediction(torch.zeros(2, 3), "bernoulli").sd  # noqa: B018


def test_data_are_checked():
    found = prediction(torch.zeros(2, 3), "gaussian(sd=1.0)")
    assert len(found) == 3
    assert "2 draws at 3 inputs" in repr(found)
    for y in (torch.zeros(4), torch.zeros(3, 1), np.float64(1.0)):
        with pytest.raises(errors.ShapeError):
            found.log_score(y)


# -- several fits ------------------------------------------------------------------------------------------------------
def test_a_mixture_scores_each_fit_under_its_own_noise():
    outputs = torch.randn(6, 3, generator=seeded(0), dtype=DOUBLE)
    y = torch.randn(3, generator=seeded(1), dtype=DOUBLE)
    sds = torch.tensor([0.5, 0.5, 2.0, 2.0, 2.0, 2.0], dtype=DOUBLE)[:, None]
    mixed = Prediction.mix([prediction(outputs[:2], "gaussian(sd=0.5)"), prediction(outputs[2:], "gaussian(sd=2.0)")])
    law = torch.distributions.Normal(outputs, sds)
    torch.testing.assert_close(mixed.log_score(y), law.log_prob(y).exp().mean(0).log())
    torch.testing.assert_close(mixed.aleatoric, sds.square().mean().expand(3))
    torch.testing.assert_close(mixed.sd.square(), outputs.var(0, correction=0) + sds.square().mean())
    inside = ((law.cdf(y).mean(0) - 0.5).abs() <= 0.25).double().mean().item()
    assert mixed.calibration(y)["coverage_50"] == pytest.approx(inside)


def test_a_mixture_draws_from_each_fit(seed):
    sure = prediction(torch.zeros(20_000, 1), "gaussian(sd=0.1)")
    loose = prediction(torch.full((20_000, 1), 5.0), "gaussian(sd=1.0)")
    new = Prediction.mix([sure, loose]).sample(rng.generator(seed, "new"))[:, 0]
    for part, mean, sd in ((new[:20_000], 0.0, 0.1), (new[20_000:], 5.0, 1.0)):
        assert abs(part.mean() - mean) < 5 * sd / 20_000**0.5
        assert abs(part.std() - sd) < 5 * sd / 40_000**0.5


def test_one_prediction_mixed_is_itself():
    outputs = torch.randn(4, 3, 2, generator=seeded(0), dtype=DOUBLE)
    y = torch.tensor([0, 1, 1])
    one = prediction(outputs, "categorical")
    mixed = Prediction.mix([one])
    torch.testing.assert_close(mixed.probabilities, one.probabilities)
    assert mixed.calibration(y) == one.calibration(y)
    two = Prediction.mix([prediction(outputs[:1], "categorical"), prediction(outputs[1:], "categorical")])
    assert two.calibration(y) == one.calibration(y)


def test_fits_of_one_number_count_and_labels_are_checked():
    outputs = torch.zeros(2, 3, 2, dtype=DOUBLE)
    mixed = Prediction.mix([prediction(outputs, "categorical"), prediction(outputs, "categorical")])
    with pytest.raises(errors.DataError):
        mixed.log_score(torch.tensor([0, 1, 2]))
    counts = Prediction.mix([prediction(outputs, "poisson"), prediction(outputs, "poisson")])
    with pytest.raises(errors.DataError):
        counts.log_score(torch.full((3, 2), -1.0))
    assert counts.calibration(torch.ones(3, 2))["rmse"] == 0.0


def test_what_cannot_be_mixed_is_refused():
    gaussian = prediction(torch.zeros(2, 3), "gaussian(sd=1.0)")
    with pytest.raises(errors.DataError, match="nothing to mix"):
        Prediction.mix([])
    with pytest.raises(errors.ShapeError, match="same inputs"):
        Prediction.mix([gaussian, prediction(torch.zeros(2, 4), "gaussian(sd=1.0)")])
    with pytest.raises(errors.NotAvailableError, match="gaussian, student_t"):
        Prediction.mix([gaussian, prediction(torch.zeros(2, 3), "student_t(df=4)")])
