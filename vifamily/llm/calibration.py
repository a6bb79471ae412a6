"""Whether predicted probabilities can be trusted: calibration, and whether uncertainty finds what is wrong.

Predict with the mixture of probabilities at power one, whatever alpha trained.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics._tables import render
from vifamily.errors import ConfigError, DataError, ShapeError

__all__ = ["BINNING", "CalibrationReport", "RiskCoverage", "auroc", "score_probabilities", "risk_coverage"]

BINNING = ("equal_width", "equal_mass")
"""How predictions are put in bins by their confidence: of one width, or of one size."""

_SUM = 1e-3


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    r"""Scores of probabilities against what came true; prints as a table, with its bins.

    Attributes:
        nll: Mean negative log probability of the true class, in nats.
        brier: Mean of :math:`\sum_c (p_c - 1[y = c])^2` over all classes: 0 to 2, and for two classes twice what the
            score of one probability would be.
        accuracy: Share of predictions whose likeliest class is true.
        ece: Expected calibration error: mean distance of confidence and accuracy over bins, weighted by their size.
        binning: How bins are made, one of :data:`BINNING`.
        count: Predictions in each bin, ``(bin,)``.
        confidence: Mean probability of the likeliest class in each bin, NaN where it is empty, ``(bin,)``.
        bin_accuracy: Accuracy in each bin, NaN where it is empty, ``(bin,)``.
        nll_error: Standard error of the first.
    """

    nll: float
    brier: float
    accuracy: float
    ece: float
    binning: str
    count: Tensor
    confidence: Tensor
    bin_accuracy: Tensor
    nll_error: float

    @property
    def num_predictions(self) -> int:
        """Number of predictions."""
        return int(self.count.sum())

    @property
    def num_bins(self) -> int:
        """Number of bins, empty ones too."""
        return len(self.count)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "num_predictions": self.num_predictions,
            "nll": self.nll,
            "nll_error": self.nll_error,
            "brier": self.brier,
            "accuracy": self.accuracy,
            "ece": self.ece,
            "ece_bins": self.num_bins,
            "ece_binning": self.binning,
        }

    def __str__(self) -> str:
        """Return the scores as a table."""
        rows = [
            ("accuracy", f"{self.accuracy:.4f}"),
            ("NLL, nats", f"{self.nll:.4f} ± {self.nll_error:.4f}"),
            ("Brier, summed over classes", f"{self.brier:.4f}"),
            (f"ECE, {self.num_bins} bins of {self.binning.replace('_', ' ')}", f"{self.ece:.4f}"),
        ]
        return render(f"calibration of {self.num_predictions} predictions", ("score", "value"), rows)


def score_probabilities(
    probability: Tensor, label: Tensor, *, bins: int = 15, binning: str = "equal_width"
) -> CalibrationReport:
    r"""Score probabilities of classes against labels.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \,\lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert

    with predictions in bins by the probability of their likeliest class; bin b of equal width is the interval
    :math:`(b/B, (b+1)/B]`. The error depends on the bins, so they are part of the result; with few predictions to a bin
    chance alone makes it positive.

    Args:
        probability: Of each class, ``(prediction, class)``; sums to one.
        label: The true classes, integers ``(prediction,)``.
        bins: Number of bins B.
        binning: ``"equal_width"`` or ``"equal_mass"``.

    Returns:
        The scores.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If probabilities or labels are none.
        ConfigError: If the bins cannot be used.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]])
        >>> report = score_probabilities(p, torch.tensor([0, 0, 1, 1]))
        >>> report.accuracy, round(report.ece, 3), round(report.brier, 3)
        (0.5, 0.3, 0.68)
    """
    p, y = _checked(probability, label)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ConfigError(f"bins must be a positive integer, got {bins!r}.")
    if binning not in BINNING:
        raise ConfigError(f"binning must be one of {', '.join(BINNING)}, got {binning!r}.")
    confidence, guess = p.max(1)
    right = (guess == y).double()
    if binning == "equal_width":
        which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    else:
        # ties in confidence may be parted; a stable order makes that the same every time
        rank = torch.empty(len(y), dtype=torch.long)
        rank[confidence.argsort(stable=True)] = torch.arange(len(y))
        which = rank * bins // len(y)
    count = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, torch.ones(len(y), dtype=torch.float64))
    mean = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, confidence) / count
    accuracy = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, right) / count
    each = -p.gather(1, y.unsqueeze(1)).squeeze(1).log()
    target = torch.nn.functional.one_hot(y, p.shape[1]).double()
    gap = torch.where(count > 0, count * (accuracy - mean).abs(), torch.zeros_like(count))
    return CalibrationReport(
        nll=float(each.mean()),
        brier=float((p - target).square().sum(1).mean()),
        accuracy=float(right.mean()),
        ece=float(gap.sum() / len(y)),
        binning=binning,
        count=count.long(),
        confidence=mean,
        bin_accuracy=accuracy,
        nll_error=float(each.std() / math.sqrt(len(y))) if len(y) > 1 else math.nan,
    )


def auroc(score: Tensor, positive: Tensor) -> float:
    """Area under the curve of hits against false alarms: the chance that a positive has the larger score, ties half.

    For errors, take an uncertainty as the score and what was answered wrong as positive; for inputs out of
    distribution, the uncertainties of both sets and which set each is from. One half is what chance gives.

    Args:
        score: Larger where positives are expected, ``(item,)``.
        positive: True for positives, ``(item,)``.

    Returns:
        From 0 to 1.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If a score is NaN, or all items are of one kind.

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True]))
        0.75
    """
    s, truth = _scores(score, positive, "positive")
    hits, count = int(truth.sum()), len(truth)
    if hits in (0, count):
        raise DataError(f"AUROC needs items of both kinds, and all {count} are {'positive' if hits else 'negative'}.")
    _, group, size = torch.unique(s, return_inverse=True, return_counts=True)
    # the mean rank of each group of ties, counted from one
    rank = (size.cumsum(0).double() - (size.double() - 1) / 2)[group]
    return float((rank[truth].sum() - hits * (hits + 1) / 2) / (hits * (count - hits)))


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """Error among the items that are answered, as more of them are; the surest are answered first.

    Attributes:
        coverage: Share of the items that are answered, ``(item,)``.
        risk: Share of those that are wrong, ``(item,)``; the mean over the orders of ties.
        area: Mean risk over coverages (AURC): smaller is better.
        best_area: What an uncertainty would reach that puts all errors last.
    """

    coverage: Tensor
    risk: Tensor
    area: float
    best_area: float

    @property
    def excess(self) -> float:
        """Area above the best (E-AURC), from 0."""
        return self.area - self.best_area

    def at(self, coverage: float) -> float:
        """Risk when this share of the items is answered, rounded up to whole items.

        Raises:
            ConfigError: If the share is not above 0 and at most 1.
        """
        if not 0 < coverage <= 1:
            raise ConfigError(f"coverage must be above 0 and at most 1, got {coverage!r}.")
        return float(self.risk[max(1, math.ceil(coverage * len(self.risk) - 1e-9)) - 1])

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {"area": self.area, "best_area": self.best_area, "risk": float(self.risk[-1]), "at_half": self.at(0.5)}

    def __str__(self) -> str:
        """Return the curve at some coverages as a table."""
        rows = [(f"{share:.0%}", f"{self.at(share):.4f}") for share in (0.25, 0.5, 0.75, 0.9, 1.0)]
        note = f"Area {self.area:.4f}, of which {self.best_area:.4f} no order avoids."
        return render(f"risk at coverage, {len(self.risk)} items", ("coverage", "risk"), rows, note)


def risk_coverage(uncertainty: Tensor, wrong: Tensor) -> RiskCoverage:
    """How much error goes when the least sure items are not answered.

    Args:
        uncertainty: Of each item, ``(item,)``.
        wrong: True for items answered wrong, or a loss from 0, ``(item,)``.

    Returns:
        The curve with its area.

    Raises:
        ShapeError: If shapes disagree.
        DataError: If there are no items, or a value is NaN.

    Example:
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([False, False, False, True]))
        >>> curve.risk.tolist(), curve.excess
        ([0.0, 0.0, 0.0, 0.25], 0.0)
    """
    u, _ = _scores(uncertainty, wrong, "wrong")
    loss = wrong.detach().cpu().double()
    if bool(loss.isnan().any()) or float(loss.min()) < 0:
        raise DataError("wrong must hold truth values, or losses from 0 that are not NaN.")
    _, group, size = torch.unique(u, return_inverse=True, return_counts=True)
    # within ties every order is as likely, so each item stands for the mean of its group
    mean = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, loss) / size
    number = torch.arange(1, len(u) + 1, dtype=torch.float64)
    risk = mean.repeat_interleave(size).cumsum(0) / number
    best = loss.sort().values.cumsum(0) / number
    return RiskCoverage(number / len(u), risk, float(risk.mean()), float(best.mean()))


def _checked(probability: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if probability.dim() != 2 or label.shape != probability.shape[:1] or not probability.numel():
        raise ShapeError(
            "probability must have shape (prediction, class) and label (prediction,), got "
            f"{tuple(probability.shape)} and {tuple(label.shape)}."
        )
    p = probability.detach().cpu().double()
    if bool(p.isnan().any()) or float(p.min()) < 0 or float((p.sum(1) - 1).abs().max()) > _SUM:
        raise DataError("probabilities must lie in [0, 1] and sum to one over classes. For logits, pass softmax(-1).")
    y = label.detach().cpu()
    if y.dtype.is_floating_point or int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
        raise DataError(f"labels must be integers from 0 to {p.shape[1] - 1}.")
    return p, y.long()


def _scores(score: Tensor, truth: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if score.dim() != 1 or truth.shape != score.shape or not score.numel():
        raise ShapeError(
            f"scores and {name} must be vectors of one length, got {tuple(score.shape)} and {tuple(truth.shape)}."
        )
    s = score.detach().cpu().double()
    if bool(s.isnan().any()):
        raise DataError("a score is NaN.")
    return s, truth.detach().cpu().bool()
