"""Effective sample size and Monte-Carlo standard error of a correlated chain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vifamily.errors import ShapeError
from vifamily.numerics.rhat import split_chains

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
    time = chains.shape[-2]
    centred = chains - chains.mean(dim=-2, keepdim=True)
    # Padding to twice the length keeps the circular convolution from wrapping round.
    size = 1 << (2 * time - 1).bit_length()
    spectrum = torch.fft.rfft(centred, n=size, dim=-2)
    covariance: Tensor = torch.fft.irfft(spectrum.abs() ** 2, n=size, dim=-2)[..., :time, :] / time
    return covariance


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
    columns = (chain if chain.dim() == 2 else chain.unsqueeze(-1)).detach().to(torch.float64)
    halves = split_chains(columns.unsqueeze(0))
    time = halves.shape[1]
    covariance = autocovariance(halves).mean(dim=0)
    within = covariance[0] * time / (time - 1)
    total = (time - 1) / time * within + halves.mean(dim=1).var(dim=0)
    correlation = 1 - (within - covariance * time / (time - 1)) / total
    correlation[0] = 1.0
    pairs = correlation[: time - time % 2].reshape(time // 2, 2, -1).sum(dim=1)
    positive = (pairs > 0).to(torch.float64).cumprod(dim=0)
    monotone = torch.cummin(pairs, dim=0).values
    tau = -1 + 2 * (positive * torch.where(positive > 0, monotone, torch.zeros_like(monotone))).sum(dim=0)
    size = 2 * time
    out = size / tau.clamp_min(1 / math.log10(size))
    level = columns.abs().amax(dim=0)
    out = torch.where(total <= (1e-14 * level) ** 2, torch.full_like(out, float(size)), out)
    # NaN correlations compare as "not positive" and would pass for independence.
    out = torch.where(columns.isfinite().all(dim=0), out, torch.full_like(out, torch.nan))
    return out if chain.dim() == 2 else out[0]


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
