"""How far draws are from a reference: means, standard deviations, distances."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics.bounds import Estimate
from vifamily.diagnostics.two_sample import median_bandwidth, mmd, sliced_wasserstein
from vifamily.errors import DataError, ShapeError

__all__ = ["MomentErrors", "distances", "moment_errors"]


@dataclasses.dataclass(frozen=True)
class MomentErrors:
    """Errors of means and standard deviations against a reference.

    Attributes:
        names: Names of the quantities.
        mean_error: ``(mean - reference mean) / reference sd``, ``(quantity,)``.
        mean_error_se: Its Monte-Carlo standard error.
        log_sd_ratio: ``log(sd / reference sd)``, ``(quantity,)``; negative means too narrow.
        log_sd_ratio_se: Its Monte-Carlo standard error.
    """

    names: tuple[str, ...]
    mean_error: Tensor
    mean_error_se: Tensor
    log_sd_ratio: Tensor
    log_sd_ratio_se: Tensor

    def _worst(self, value: Tensor, error: Tensor) -> tuple[str, Estimate]:
        index = int(value.abs().nan_to_num(math.inf).argmax())
        return self.names[index], Estimate(float(value[index]), float(error[index]))

    @property
    def worst_mean(self) -> tuple[str, Estimate]:
        """The quantity whose mean is furthest off, with its signed error in reference standard deviations."""
        return self._worst(self.mean_error, self.mean_error_se)

    @property
    def worst_sd(self) -> tuple[str, Estimate]:
        """The quantity whose standard deviation is furthest off, with its signed log ratio."""
        return self._worst(self.log_sd_ratio, self.log_sd_ratio_se)


def moment_errors(draws: Any, mean: Any, sd: Any, names: Sequence[str] | None = None) -> MomentErrors:
    """Compare means and standard deviations of draws with a reference.

    Args:
        draws: ``(draw, quantity)``, two draws or more, independent.
        mean: Reference means, ``(quantity,)``.
        sd: Reference standard deviations, ``(quantity,)``, positive.
        names: Names of the quantities.

    Returns:
        Signed errors per quantity, with Monte-Carlo errors of the draws (the reference is taken as exact; the error
        of a log standard deviation comes from the fourth moment of the draws).

    Raises:
        ShapeError: If the shapes disagree.
        DataError: If a reference standard deviation is not positive.

    Example:
        >>> x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> name, worst = moment_errors(3 * x, [0.0], [1.0], ["mu"]).worst_sd
        >>> name, round(worst.value, 1)  # log 3
        ('mu', 1.1)
    """
    x = torch.as_tensor(draws).detach().to("cpu", torch.float64)
    centre, spread = (torch.as_tensor(v).detach().to("cpu", torch.float64) for v in (mean, sd))
    if x.dim() != 2 or x.shape[0] < 2 or centre.shape != x.shape[1:] or spread.shape != x.shape[1:] or not x.shape[1]:
        raise ShapeError(
            "moment errors need draws (draw, quantity) and a mean and sd of shape (quantity,), "
            f"got {tuple(x.shape)}, {tuple(centre.shape)} and {tuple(spread.shape)}."
        )
    if not bool((spread > 0).all()):
        raise DataError("every reference standard deviation must be positive; leave constant quantities out.")
    labels = tuple(names) if names is not None else tuple(str(i) for i in range(x.shape[1]))
    if len(labels) != x.shape[1]:
        raise ShapeError(f"got {len(labels)} names for {x.shape[1]} quantities.")
    size, own = x.shape[0], x.std(0)
    kurtosis = ((x - x.mean(0)) ** 4).mean(0) / x.var(0, correction=0) ** 2
    return MomentErrors(
        labels,
        (x.mean(0) - centre) / spread,
        own / spread / math.sqrt(size),
        (own / spread).log(),
        ((kurtosis - 1).clamp_min(0) / (4 * size)).sqrt(),
    )


def distances(draws: Any, reference: Any, sd: Any, *, generator: torch.Generator) -> dict[str, Estimate]:
    """Sliced Wasserstein distance and squared MMD to reference draws, in units of the reference standard deviations.

    Args:
        draws: ``(draw, quantity)``.
        reference: ``(other draw, quantity)``.
        sd: Reference standard deviations, ``(quantity,)``; both samples are divided by them.
        generator: Randomness of the projections.

    Returns:
        ``sliced_wasserstein`` (order 2) and ``mmd`` (squared, unbiased, median heuristic on the reference), and the
        same between the two halves of the reference under ``sliced_wasserstein_floor`` and ``mmd_floor``: what draws
        from the exact posterior would show at that size.

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> out = distances(x + 1, x, [1.0, 1.0], generator=torch.Generator().manual_seed(1))
        >>> out["sliced_wasserstein"].value > out["sliced_wasserstein_floor"].value
        True
    """
    scale = torch.as_tensor(sd).detach().to("cpu", torch.float64)
    x, y = (torch.as_tensor(v).detach().to("cpu", torch.float64) / scale for v in (draws, reference))
    width = median_bandwidth(y[::2], y[1::2])
    first, second = y[::2], y[1::2]
    return {
        "sliced_wasserstein": sliced_wasserstein(x, y, generator=generator),
        "mmd": mmd(x, y, bandwidth=width),
        "sliced_wasserstein_floor": sliced_wasserstein(first, second, generator=generator),
        "mmd_floor": mmd(first, second, bandwidth=width),
    }
