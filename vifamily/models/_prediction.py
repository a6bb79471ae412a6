"""What a network predicts: outputs under posterior draws, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily import rng
from vifamily.errors import DataError, NotAvailableError, ShapeError
from vifamily.models._data import as_numbers
from vifamily.models._likelihoods import Likelihood
from vifamily.models._mixed_likelihood import MixedLikelihood

__all__ = ["Prediction"]

_BINS = 15
_INTERVALS = (0.5, 0.8, 0.95)


class Prediction:
    r"""Predictions at some inputs, from draws of the outputs of a network.

    For regression, :attr:`epistemic` and :attr:`aleatoric` are the two parts of the variance,

    .. math:: \operatorname{Var}[y] = \operatorname{Var}_z\, \mathbb{E}[y \mid z]
              + \mathbb{E}_z \operatorname{Var}[y \mid z],

    what more data would take away, and what they would not. For classification they are the two parts of the entropy of
    the mean probabilities in nats: the mutual information of class and weights, and the mean entropy.

    Args:
        draws: Outputs of the network, ``(draw, datum, ...)``.
        likelihood: The law of a datum given outputs.

    Attributes:
        draws: Outputs of the network, ``(draw, datum, ...)``.

    Example:
        >>> import torch
        >>> from vifamily.models._likelihoods import likelihood_of
        >>> outputs = torch.tensor([[1.0], [3.0]])  # two draws at one input
        >>> prediction = Prediction(outputs, likelihood_of("gaussian(sd=2.0)"))
        >>> prediction.mean.item(), prediction.epistemic.item(), prediction.aleatoric.item()
        (2.0, 1.0, 4.0)
    """

    def __init__(self, draws: Tensor, likelihood: Likelihood) -> None:
        self.draws, self._likelihood = draws.detach(), likelihood

    @classmethod
    def mix(cls, predictions: Sequence[Prediction]) -> Prediction:
        r"""Mix predictions of several fits, each with noise of its own, at the same inputs.

        .. math:: p(y \mid x) = \sum_k \frac{S_k}{\sum_j S_j} \cdot
                  \frac{1}{S_k} \sum_{s=1}^{S_k} p_k(y \mid x, z_{ks}),

        so that a fit counts by its number of draws ``S_k``, and fits with as many draws each in equal parts. What fits
        disagree on is part of :attr:`epistemic`.

        Args:
            predictions: One of each fit, under likelihoods of the same name.

        Returns:
            A prediction with the draws of all of them.

        Raises:
            DataError: If there is none.
            ShapeError: If their inputs or outputs differ in number or shape.
            NotAvailableError: If their likelihoods are different ones.

        Example:
            >>> import torch
            >>> from vifamily.models._likelihoods import likelihood_of
            >>> sure = Prediction(torch.tensor([[1.0], [1.0]]), likelihood_of("gaussian(sd=1.0)"))
            >>> other = Prediction(torch.tensor([[3.0], [3.0]]), likelihood_of("gaussian(sd=2.0)"))
            >>> both = Prediction.mix([sure, other])
            >>> both.mean.item(), both.epistemic.item(), both.aleatoric.item()
            (2.0, 1.0, 2.5)
        """
        parts = list(predictions)
        if not parts:
            raise DataError("there is nothing to mix: give the prediction of at least one fit.")
        laws, draws = [part._likelihood for part in parts], [part.draws for part in parts]
        shapes = dict.fromkeys(tuple(part.shape[1:]) for part in draws)
        if len(shapes) > 1:
            raise ShapeError(
                f"predictions that are mixed must be of the same inputs; outputs have shapes (datum, ...) of "
                f"{', '.join(map(str, shapes))}."
            )
        if len({type(law) for law in laws}) > 1:
            raise NotAvailableError(
                f"predictions that are mixed must have one likelihood, each with numbers of its own; got "
                f"{', '.join(dict.fromkeys(law.name for law in laws))}."
            )
        like = draws[0]
        return cls(torch.cat([part.to(like) for part in draws]), MixedLikelihood(laws, [len(part) for part in draws]))

    def __repr__(self) -> str:
        """Say what it is of."""
        draws, data = self.draws.shape[:2]
        return f"Prediction({draws} draws at {data} inputs, {self._likelihood.name} likelihood)"

    def __len__(self) -> int:
        """Number of inputs."""
        return self.draws.shape[1]

    # -- moments -------------------------------------------------------------------------------------------------------
    @property
    def mean(self) -> Tensor:
        """Predictive mean of a datum, ``(datum, ...)``; for classes the same as :attr:`probabilities`."""
        with torch.no_grad():
            return self._likelihood.mean(self.draws).mean(0)

    @property
    def probabilities(self) -> Tensor:
        """Mean probabilities of the classes, ``(datum, ..., class)``; of 1, ``(datum, ...)``, for two."""
        self._need("classification", "probabilities")
        return self.mean

    @property
    def sd(self) -> Tensor:
        """Predictive standard deviation of a datum, noise included, ``(datum, ...)``."""
        self._need("regression", "a standard deviation")
        return (self.epistemic + self.aleatoric).sqrt()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the mean probabilities in nats, ``(datum, ...)``: epistemic plus aleatoric."""
        self._need("classification", "an entropy")
        return self._entropy(self.mean)

    @property
    def epistemic(self) -> Tensor:
        """What is not known for want of data, ``(datum, ...)``: a variance, or a mutual information in nats."""
        with torch.no_grad():
            if self._likelihood.kind == "classification":
                return (self.entropy - self.aleatoric).clamp_min(0.0)
            self._need("regression", "a variance")
            return self._likelihood.mean(self.draws).var(0, correction=0)

    @property
    def aleatoric(self) -> Tensor:
        """What no data would tell, ``(datum, ...)``: a variance, or a mean entropy in nats."""
        with torch.no_grad():
            if self._likelihood.kind == "classification":
                return self._entropy(self._likelihood.mean(self.draws)).mean(0)
            self._need("regression", "a variance")
            return self._likelihood.variance(self.draws).mean(0)

    def _entropy(self, p: Tensor) -> Tensor:
        if self._likelihood.output_axes == 0:
            p = torch.stack([p, 1 - p], -1)
        entropy: Tensor = -torch.special.xlogy(p, p).sum(-1)
        return entropy

    def _need(self, kind: str, what: str) -> None:
        own = self._likelihood.kind
        if own != kind:
            raise NotAvailableError(
                f"{what} needs a likelihood of {kind}; the {self._likelihood.name} one is of {own}."
            )

    # -- new data ------------------------------------------------------------------------------------------------------
    def sample(self, generator: torch.Generator | None = None, *, seed: int = 0) -> Tensor:
        """Draw new data, one for each draw and input, ``(draw, datum, ...)``.

        Args:
            generator: Randomness; made from the seed by default.
            seed: Seed.

        Raises:
            NotAvailableError: If the likelihood does not draw.
        """
        source = rng.generator(seed, "prediction") if generator is None else generator
        with torch.no_grad():
            return self._likelihood.sample(self.draws, generator=source)

    # -- against data --------------------------------------------------------------------------------------------------
    def log_score(self, y: Any) -> Tensor:
        r"""Log predictive density of data at these inputs, larger is better.

        .. math:: \log \tfrac{1}{S} \sum_s p(y_i \mid z_s)

        Args:
            y: Data, ``(datum, ...)``.

        Returns:
            ``(datum,)``.

        Raises:
            ShapeError: If the data do not fit the outputs.
            DataError: If values are impossible.
        """
        data = self._data(y)
        with torch.no_grad():
            each = self._likelihood.log_prob(self.draws, data)
            return each.logsumexp(0) - math.log(each.shape[0])

    def calibration(self, y: Any, *, seed: int = 0) -> dict[str, float]:
        """Compare predictions with data.

        Args:
            y: Data, ``(datum, ...)``.
            seed: Seed of the draws that stand for a distribution function where there is no closed form.

        Returns:
            For regression ``rmse`` of the means and the share of data in central intervals, ``coverage_50``,
            ``coverage_80`` and ``coverage_95``; for classification ``error_rate`` and ``ece``, the expected calibration
            error over 15 bins of confidence. With all of them the mean ``log_score``.

        Raises:
            ShapeError: If the data do not fit the outputs.
            DataError: If values are impossible.
            NotAvailableError: If only a log density is known.
        """
        data = self._data(y)
        out = {"log_score": float(self.log_score(data).mean())}
        if self._likelihood.kind == "classification":
            return out | self._classes(data)
        self._need("regression", "calibration")
        out["rmse"] = float((self.mean - data.to(self.mean)).square().mean().sqrt())
        position = self._position(data, seed)
        for level in _INTERVALS:
            inside = (position - 0.5).abs() <= level / 2
            out[f"coverage_{100 * level:.0f}"] = float(inside.double().mean())
        return out

    def _position(self, y: Tensor, seed: int) -> Tensor:
        """Value of the predictive distribution function at the data; halfway up a step."""
        with torch.no_grad():
            known = self._likelihood.cdf(self.draws, y)
            if known is not None:
                return known.mean(0)
            new = self.sample(seed=seed)
            return ((new < y).double() + 0.5 * (new == y).double()).mean(0)

    def _classes(self, y: Tensor) -> dict[str, float]:
        p = self.probabilities
        if self._likelihood.output_axes == 0:
            p = torch.stack([1 - p, p], -1)
        confidence, label = p.max(-1)
        right = (label == y.to(label)).double().flatten()
        confidence = confidence.double().flatten()
        place = (confidence * _BINS).long().clamp_max(_BINS - 1)
        gap = torch.zeros(_BINS, dtype=torch.float64, device=p.device).index_add_(0, place, right - confidence)
        return {"error_rate": float(1 - right.mean()), "ece": float(gap.abs().sum() / right.numel())}

    def _data(self, y: Any) -> Tensor:
        data = as_numbers(y, "y").to(self.draws.device)
        if data.dim() == 0 or data.shape[0] != len(self):
            raise ShapeError(
                f"y must hold one datum for each of the {len(self)} inputs, got shape {tuple(data.shape)}."
            )
        self._likelihood.check(data, self.draws.shape[2:])
        if not bool(torch.isfinite(data).all()):
            raise DataError(f"y holds {int((~torch.isfinite(data)).sum())} NaN or infinite value(s): leave them out.")
        return data
