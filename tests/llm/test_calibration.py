"""Scores of probabilities by hand, against scikit-learn, and on predictions that are calibrated by construction."""

import itertools
import math

import pytest
import torch
from sklearn import metrics

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.llm import auroc, risk_coverage, score_probabilities


def test_scores_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]], dtype=torch.float64)
    report = score_probabilities(p, torch.tensor([0, 1, 1, 1]), bins=5)
    assert report.accuracy == 0.75 and report.num_bins == 5 and report.num_predictions == 4
    assert report.nll == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.7) + math.log(0.95)) / 4)
    assert report.brier == pytest.approx(2 * (0.01 + 0.36 + 0.09 + 0.0025) / 4)
    # 0.6 is the upper end of its bin; 0.7 is alone; 0.9 and 0.95 share the last
    assert report.count.tolist() == [0, 0, 1, 1, 2]
    assert report.ece == pytest.approx((0.6 + 0.3 + 2 * (1 - 0.925)) / 4)
    assert math.isnan(float(report.confidence[0])) and float(report.confidence[4]) == pytest.approx(0.925)
    text = str(report)
    assert "5 bins of equal width" in text and "4 predictions" in text and "0.7500" in text
    assert report.to_dict()["ece_bins"] == 5 and report.to_dict()["ece_binning"] == "equal_width"


def test_bins_of_equal_mass_by_hand() -> None:
    p = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]], dtype=torch.float64)
    report = score_probabilities(p, torch.tensor([1, 0, 0, 0]), bins=2, binning="equal_mass")
    assert report.count.tolist() == [2, 2]
    assert report.ece == pytest.approx((2 * abs(0.5 - 0.65) + 2 * (1 - 0.85)) / 4)
    assert score_probabilities(p, torch.tensor([1, 0, 0, 0]), bins=9, binning="equal_mass").count.sum() == 4


def test_calibrated_predictions_have_little_error(generator: torch.Generator) -> None:
    count, bins = 20_000, 10
    p = torch.rand(count, generator=generator, dtype=torch.float64)
    label = (torch.rand(count, generator=generator, dtype=torch.float64) < p).long()
    report = score_probabilities(torch.stack([1 - p, p], 1), label, bins=bins)
    # per filled bin (five of them, 0.5 to 1) |gap| has mean at most sqrt(p q / n) <= 0.5 / sqrt(4000)
    assert report.ece < 5 * 0.5 / math.sqrt(count / 5)
    surer = torch.stack([1 - p, p], 1).square()
    assert score_probabilities(surer / surer.sum(1, keepdim=True), label, bins=bins).ece > 0.05
    assert report.nll == pytest.approx(metrics.log_loss(label.numpy(), p.numpy()), rel=1e-9)
    assert abs(report.nll - 0.5) < 5 * report.nll_error  # the mean of the entropy of p over the unit interval is 1/2


def test_certain_and_right_is_perfect() -> None:
    report = score_probabilities(torch.eye(3), torch.arange(3))
    assert (report.nll, report.brier, report.accuracy, report.ece) == (0, 0, 1, 0)
    assert score_probabilities(torch.eye(3), torch.tensor([1, 2, 0])).nll == math.inf


def test_auroc_counts_pairs(generator: torch.Generator) -> None:
    score = torch.randint(6, (60,), generator=generator).double()  # with many ties
    positive = torch.rand(60, generator=generator) < 0.4
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, b in itertools.product(score[positive].tolist(), score[~positive].tolist())
    ]
    assert auroc(score, positive) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert auroc(score, positive) == pytest.approx(metrics.roc_auc_score(positive.numpy(), score.numpy()), abs=1e-12)
    assert auroc(-score, positive) == pytest.approx(1 - auroc(score, positive), abs=1e-12)
    assert auroc(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5


def test_risk_by_hand_and_over_orders_of_ties() -> None:
    curve = risk_coverage(torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.tensor([True, False, True, False]))
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 2 / 3, 1 / 2])
    assert curve.area == pytest.approx((0 + 1 / 2 + 2 / 3 + 1 / 2) / 4)
    assert curve.best_area == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4) and curve.excess > 0
    assert curve.at(0.5) == pytest.approx(0.5) and curve.at(1) == pytest.approx(0.5) and curve.at(0.01) == 0
    assert "25%" in str(curve) and curve.to_dict()["risk"] == 0.5
    wrong = [True, False, False, True]
    tied = risk_coverage(torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor(wrong))
    orders = [[sum(order[: k + 1]) / (k + 1) for k in range(3)] for order in itertools.permutations([1.0, 0.0, 0.0])]
    mean = [sum(column) / len(orders) for column in zip(*orders, strict=True)]
    assert tied.risk.tolist() == pytest.approx([*mean, 0.5])


def test_uncertainty_that_knows_its_errors_has_no_excess() -> None:
    wrong = torch.tensor([False, True, False, True, False])
    assert risk_coverage(wrong.double(), wrong).excess == pytest.approx(0, abs=1e-12)
    losses = torch.tensor([0.1, 2.0, 0.5])
    assert risk_coverage(losses, losses).risk.tolist() == pytest.approx([0.1, 0.3, 2.6 / 3])


def test_bad_arguments_are_refused() -> None:
    p = torch.full((2, 2), 0.5)
    with pytest.raises(DataError, match="sum to one over classes"):
        score_probabilities(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(DataError, match="integers from 0 to 1"):
        score_probabilities(p, torch.tensor([0, 2]))
    with pytest.raises(ShapeError, match="label"):
        score_probabilities(p, torch.tensor([0]))
    with pytest.raises(ConfigError, match="bins must be a positive integer, got 0"):
        score_probabilities(p, torch.tensor([0, 1]), bins=0)
    with pytest.raises(ConfigError, match="binning must be one of equal_width, equal_mass"):
        score_probabilities(p, torch.tensor([0, 1]), binning="quantile")
    with pytest.raises(DataError, match="all 2 are positive"):
        auroc(torch.zeros(2), torch.tensor([True, True]))
    with pytest.raises(DataError, match="a score is NaN"):
        auroc(torch.tensor([math.nan, 0.0]), torch.tensor([True, False]))
    with pytest.raises(ShapeError, match="vectors of one length"):
        risk_coverage(torch.zeros(2), torch.zeros(3))
    with pytest.raises(DataError, match="losses from 0"):
        risk_coverage(torch.zeros(2), torch.tensor([-1.0, 0.0]))
    with pytest.raises(ConfigError, match="coverage must be above 0"):
        risk_coverage(torch.zeros(2), torch.zeros(2)).at(0)
