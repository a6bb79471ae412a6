"""Leave-one-out cross-validation from an approximate posterior."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics._tables import render
from vifamily.diagnostics.psis import FEWEST_DRAWS, k_hat_threshold, psis
from vifamily.errors import DataError, ShapeError
from vifamily.numerics.log_mean_exp import log_mean_exp

__all__ = ["Loo", "loo"]


@dataclasses.dataclass(frozen=True)
class Loo:
    """Expected log predictive density of one new datum at a time, summed over the data.

    Attributes:
        elpd: The sum, in nats.
        elpd_error: Its standard error over data, ``sqrt(N) sd(pointwise)``.
        p_loo: Effective number of parameters, the log predictive density with all data minus ``elpd``.
        pointwise: ``log p(y_i | y_-i)``, ``(datum,)``.
        k_hat: Tail index of the weights of each datum, ``(datum,)``.
        threshold: Largest k-hat at which this many draws are enough.
        num_draws: Number of draws.
    """

    elpd: float
    elpd_error: float
    p_loo: float
    pointwise: Tensor
    k_hat: Tensor
    threshold: float
    num_draws: int

    @property
    def num_unreliable(self) -> int:
        """Number of data whose k-hat is above the threshold."""
        return int((~(self.k_hat <= self.threshold)).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "elpd": self.elpd,
            "elpd_error": self.elpd_error,
            "p_loo": self.p_loo,
            "num_data": int(self.pointwise.shape[0]),
            "num_draws": self.num_draws,
            "k_hat_worst": float(self.k_hat.max()),
            "k_hat_threshold": self.threshold,
            "num_unreliable": self.num_unreliable,
        }

    def __str__(self) -> str:
        """Return the figures as a table, with a sentence where some are unreliable."""
        lines = [
            ("elpd_loo", f"{self.elpd:.2f} ± {self.elpd_error:.2f}"),
            ("p_loo", f"{self.p_loo:.2f}"),
            ("data", str(int(self.pointwise.shape[0]))),
            ("worst k-hat", f"{float(self.k_hat.max()):.2f} (threshold {self.threshold:.2f})"),
        ]
        note = ""
        if self.num_unreliable:
            note = f"{self.num_unreliable} data have k-hat above the threshold: their terms cannot be trusted."
        return render("PSIS leave-one-out", ("figure", "value"), lines, note)


def loo(log_likelihood: Tensor, log_ratio: Tensor) -> Loo:
    r"""PSIS-LOO with draws of an approximate posterior.

    :math:`\log p(y_i \mid y_{-i}) \approx \log \sum_s w_{is}\, p(y_i \mid \theta_s)`, the normalised weights
    :math:`w_{is} \propto \frac{p(\theta_s, y)}{q(\theta_s)} \frac{1}{p(y_i \mid \theta_s)}` Pareto-smoothed for each
    datum: one step corrects for the approximation and takes the datum out (Magnusson et al. 2019, Bayesian
    leave-one-out cross-validation for large data, equation 8).

    Args:
        log_likelihood: ``log p(y_i | theta_s)``, ``(draw, datum)``.
        log_ratio: ``log p(theta_s, y) - log q(theta_s)`` up to a constant, ``(draw,)``; zeros for draws from the exact
            posterior.

    Returns:
        The sum, its error, and the terms with their k-hats.

    Raises:
        ShapeError: If the shapes disagree or there are fewer than 25 draws.
        DataError: If a log likelihood is NaN or plus infinity.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> y = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        >>> mu = y.mean() + torch.randn(4000, generator=generator, dtype=torch.float64) / 3**0.5
        >>> ll = torch.distributions.Normal(mu[:, None], 1.0).log_prob(y)
        >>> abs(loo(ll, torch.zeros(4000)).elpd - (-4.865)) < 0.1  # the exact answer
        True
    """
    if log_likelihood.dim() != 2 or not log_likelihood.shape[1] or log_ratio.shape != log_likelihood.shape[:1]:
        raise ShapeError(
            "leave-one-out needs log likelihoods (draw, datum) and log ratios (draw,), "
            f"got {tuple(log_likelihood.shape)} and {tuple(log_ratio.shape)}."
        )
    if log_likelihood.shape[0] < FEWEST_DRAWS:
        raise ShapeError(f"leave-one-out needs 25 draws or more, got {log_likelihood.shape[0]}.")
    density = log_likelihood.detach().to("cpu", torch.float64)
    if bool((density.isnan() | (density == math.inf)).any()):
        raise DataError("a log likelihood is NaN or infinite; look at the likelihood at draws far in the tails.")
    ratio = log_ratio.detach().to("cpu", torch.float64)
    terms, shapes = [], []
    for column in density.unbind(1):
        weights = psis(ratio - column)
        # A draw that rules the datum out has an infinite ratio times a zero density: it adds nothing to the mean.
        kept = weights.log_weight + column
        terms.append(torch.logsumexp(torch.where(column.isfinite(), kept, torch.full_like(kept, -math.inf)), 0))
        shapes.append(weights.k_hat)
    pointwise = torch.stack(terms)
    whole = psis(ratio)
    log_weight = whole.log_weight + math.log(whole.num_draws)
    full = log_mean_exp(log_weight.unsqueeze(1) + density, 0)
    size = pointwise.shape[0]
    error = math.sqrt(size) * float(pointwise.std()) if size > 1 else math.nan
    return Loo(
        float(pointwise.sum()),
        error,
        float(full.sum() - pointwise.sum()),
        pointwise,
        torch.tensor(shapes, dtype=torch.float64),
        k_hat_threshold(density.shape[0]),
        density.shape[0],
    )
