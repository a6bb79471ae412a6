"""R-hat: do several chains, or the two halves of one, look like the same distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.errors import ShapeError

__all__ = ["rhat", "split_chains", "split_rhat"]


def split_chains(chains: Tensor) -> Tensor:
    """Cut every chain in two halves, ``(chain, time, quantity) -> (2 chain, time // 2, quantity)``.

    With an odd number of times the first one is left out, the one most likely to be before stationarity.

    Example:
        >>> split_chains(torch.arange(5.0).reshape(1, 5, 1))[..., 0]
        tensor([[1., 2.],
                [3., 4.]])
    """
    half = chains.shape[1] // 2
    return torch.cat([chains[:, -2 * half : -half], chains[:, -half:]], dim=0)


def rhat(chains: Tensor) -> Tensor:
    r"""Potential scale reduction of several chains.

    :math:`\hat R = \sqrt{\big(\tfrac{n-1}{n} W + B / n\big) / W}` with :math:`W` the mean variance
    within chains and :math:`B / n` the variance of the chain means (Gelman et al., Bayesian Data Analysis, 3rd edition,
    equation 11.4).

    Args:
        chains: ``(chain, time, quantity)``, at least two chains of at least two times.

    Returns:
        ``(quantity,)``, 1 at agreement. A quantity that is one constant everywhere has 1; different constants have
        infinity; a value that is not finite gives NaN.

    Raises:
        ShapeError: If there are fewer than two chains or two times.

    Example:
        >>> chains = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(rhat(chains) < 1.01), bool(rhat(chains + torch.arange(4.0).reshape(4, 1, 1)) > 1.2)
        (True, True)
    """
    if chains.dim() != 3 or chains.shape[0] < 2 or chains.shape[1] < 2:
        raise ShapeError(
            "R-hat needs chains of shape (chain, time, quantity) with two chains and two times or more, "
            f"got {tuple(chains.shape)}."
        )
    chains = chains.detach().to(torch.float64)
    time = chains.shape[1]
    within = chains.var(dim=1).mean(dim=0)
    between = chains.mean(dim=1).var(dim=0)
    ratio = ((time - 1) / time * within + between) / within
    # Rounding leaves means of equal constants apart by a few units of the last place.
    level = chains.abs().amax(dim=(0, 1))
    frozen = within <= (1e-14 * level) ** 2
    agree = between <= (1e-14 * level) ** 2
    constant = torch.where(agree, torch.ones_like(ratio), torch.full_like(ratio, torch.inf))
    return torch.where(frozen, constant, ratio.sqrt())


def split_rhat(chain: Tensor) -> Tensor:
    """R-hat of the two halves of one chain: near 1 when its level has stopped moving.

    Args:
        chain: ``(time, quantity)``, or ``(time,)`` for one quantity; at least four times.

    Returns:
        ``(quantity,)``, a scalar for one quantity.

    Raises:
        ShapeError: If the chain has another rank or fewer than four times.

    Example:
        >>> still = torch.randn(500, generator=torch.Generator().manual_seed(1))
        >>> bool(split_rhat(still) < 1.01), bool(split_rhat(still + torch.linspace(0, 5, 500)) > 1.5)
        (True, True)
    """
    chain = torch.as_tensor(chain)
    if chain.dim() not in (1, 2) or chain.shape[0] < 4:
        raise ShapeError(
            f"split R-hat needs a chain of shape (time, quantity) with four times or more, got {tuple(chain.shape)}."
        )
    columns = chain if chain.dim() == 2 else chain.unsqueeze(-1)
    out = rhat(split_chains(columns.unsqueeze(0)))
    return out if chain.dim() == 2 else out[0]
