"""Effective sample size and Monte-Carlo standard error of a correlated chain."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ShapeError

__all__ = ["autocovariance", "effective_sample_size", "mcse"]


def autocovariance(chains: Tensor) -> Tensor:
    """Autocovariance at every lag, divided by the length of the chain, by the fast Fourier transform.

    Args:
        chains: ``(..., time, quantity)``.

    Returns:
        ``(..., lag, quantity)``; lag zero is the (biased) variance.

    Example:
        >>> [round(float(v), 4) for v in autocovariance(torch.tensor([[1.0], [2.0], [3.0]])).ravel()]
        [0.6667, 0.0, -0.3333]
    """
    lags_last = _autocovariance(chains.detach().cpu().movedim(-1, -2).numpy())
    return torch.from_numpy(lags_last).movedim(-1, -2).to(chains)


def _autocovariance(chains: np.ndarray) -> np.ndarray:
    """The same with time and lag as the last axis."""
    time = chains.shape[-1]
    centred = chains - chains.mean(axis=-1, keepdims=True)
    # Padding to twice the length keeps the circular convolution from wrapping round.
    size = 1 << (2 * time - 1).bit_length()
    spectrum = np.fft.rfft(centred, n=size)
    power = spectrum.real**2 + spectrum.imag**2
    out: np.ndarray = np.fft.irfft(power, n=size)[..., :time] / time
    return out


def effective_sample_size(chain: Tensor) -> Tensor:
    r"""Number of independent draws whose mean would be as precise as the mean of this chain.

    :math:`n / (1 + 2 \sum_t \rho_t)`, the autocorrelations from the two halves of the chain together (so that a drift
    lowers it) and summed over Geyer's initial positive, monotone sequence of pairs (Geyer 1992, section 3.3; Vehtari et
    al. 2021, section 3.2).

    Args:
        chain: ``(time, quantity)``, or ``(time,)`` for one quantity; at least eight times.

    Returns:
        ``(quantity,)``, a scalar for one quantity; at most ``n log10 n`` (negatively correlated chains can beat
        independent draws). A constant has ``n``; a value that is not finite gives NaN.

    Raises:
        ShapeError: If the chain has another rank or fewer than eight times.

    Example:
        >>> x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
        >>> 3000 < float(effective_sample_size(x)) < 5000
        True
    """
    chain = torch.as_tensor(chain)
    if chain.dim() not in (1, 2) or chain.shape[0] < 8:
        raise ShapeError(
            "an effective sample size needs a chain of shape (time, quantity) with eight times or more, "
            f"got {tuple(chain.shape)}."
        )
    columns = (chain if chain.dim() == 2 else chain.unsqueeze(-1)).detach()
    out = torch.from_numpy(_sizes(columns.to("cpu", torch.float64).numpy().T)).to(chain.device)
    return out if chain.dim() == 2 else out[0]


def _sizes(rows: np.ndarray) -> np.ndarray:
    """Effective sample sizes of chains ``(quantity, time)``; in numpy, whose calls cost least on short chains."""
    time = rows.shape[1] // 2
    halves = np.stack([rows[:, -2 * time : -time], rows[:, -time:]])
    with np.errstate(all="ignore"):
        covariance = _autocovariance(halves).mean(axis=0)
        within = covariance[:, :1] * time / (time - 1)
        means = halves.mean(axis=-1)
        total = (time - 1) / time * within + 0.5 * (means[0] - means[1])[:, None] ** 2
        correlation = 1 - (within - covariance * time / (time - 1)) / total
        correlation[:, 0] = 1.0
        pairs = correlation[:, : time - time % 2].reshape(len(rows), time // 2, 2).sum(axis=2)
        # NaN correlations compare as "not positive" and would pass for independence: see below
        positive = np.logical_and.accumulate(pairs > 0, axis=1)
        monotone = np.minimum.accumulate(pairs, axis=1)
        tau = -1 + 2 * np.where(positive, monotone, 0.0).sum(axis=1)
        size = 2 * time
        out = size / np.maximum(tau, 1 / math.log10(size))
        level = np.abs(rows).max(axis=1)
        out = np.where(total[:, 0] <= (1e-14 * level) ** 2, float(size), out)
    return np.where(np.isfinite(rows).all(axis=1), out, np.nan)


def mcse(chain: Tensor) -> Tensor:
    """Monte-Carlo standard error of the mean of a chain: standard deviation over the root of the effective sample size.

    Args:
        chain: ``(time, quantity)``, or ``(time,)`` for one quantity; at least eight times.

    Returns:
        ``(quantity,)``, a scalar for one quantity, in the units of the quantity.

    Raises:
        ShapeError: If the chain has another rank or fewer than eight times.

    Example:
        >>> x = torch.randn(2500, generator=torch.Generator().manual_seed(0))
        >>> 0.015 < float(mcse(x)) < 0.025
        True
    """
    chain = torch.as_tensor(chain)
    size = effective_sample_size(chain)
    return chain.detach().to(torch.float64).std(dim=0) / size.sqrt()
