"""Whether independent fits of one posterior agree."""

from __future__ import annotations

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from vifamily.errors import ShapeError
from vifamily.numerics.rhat import rhat

__all__ = ["restart_rhat"]


def restart_rhat(draws: Tensor) -> Tensor:
    """R-hat with each restart's draws taken as a chain, on ranks.

    The larger of the R-hat of normal scores of the ranks (do locations agree) and of the same after folding around the
    median (do spreads agree), so that heavy tails and monotone changes of units do not matter (Vehtari et al. 2021,
    section 4). Restarts that found different modes show here, where k-hat is blind.

    Args:
        draws: ``(restart, draw, quantity)``, two restarts and four draws or more.

    Returns:
        ``(quantity,)``; below 1.01 for restarts that agree, above 1.05 for ones that do not. NaN where a draw is not
        finite.

    Raises:
        ShapeError: If there are fewer than two restarts or four draws.

    Example:
        >>> x = torch.randn(3, 500, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(restart_rhat(x) < 1.02), bool(restart_rhat(x * torch.tensor([1.0, 1, 3]).reshape(3, 1, 1)) > 1.05)
        (True, True)
    """
    if draws.dim() != 3 or draws.shape[0] < 2 or draws.shape[1] < 4:
        raise ShapeError(
            "restart agreement needs draws (restart, draw, quantity) of two restarts and four draws or more, "
            f"got {tuple(draws.shape)}."
        )
    values = draws.detach().to("cpu", torch.float64).numpy()
    folded = np.abs(values - np.median(values, axis=(0, 1)))
    both = torch.stack([rhat(torch.from_numpy(_normal_scores(v))) for v in (values, folded)])
    out = both.max(dim=0).values
    return torch.where(torch.from_numpy(np.isfinite(values).all(axis=(0, 1))), out, torch.full_like(out, torch.nan))


def _normal_scores(values: np.ndarray) -> np.ndarray:
    shape = values.shape
    rank = stats.rankdata(values.reshape(-1, shape[-1]), axis=0, nan_policy="propagate")
    scores = special.ndtri((rank - 0.375) / (shape[0] * shape[1] + 0.25))
    return np.asarray(scores, dtype=np.float64).reshape(shape)
