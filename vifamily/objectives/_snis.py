"""Self-normalised importance weights of draws of q: what the inclusive objectives without reference draws share."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.errors import NotAvailableError
from vifamily.objectives._base import log_ratio_parts
from vifamily.types import Batch, Draw, FamilyLike, ModelLike

__all__ = ["effective_share", "weighted_draws", "weights_apart"]


def weighted_draws(
    family: FamilyLike, model: ModelLike, draw: Draw, batch: Batch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log ratio, log density of q and log joint at draws from which no gradient flows back to their noise.

    The log joint keeps the gradient of the model's own parameters, the log density that of the family's.
    """
    z = draw.z.detach()
    log_p, _, _ = log_ratio_parts(model, Draw(z, None, draw.log_weight), batch)
    log_q = family.log_prob(z)
    if log_q.shape != log_p.shape:
        raise NotAvailableError("importance weights need one log density per draw, and the family gave none.")
    return (log_p - log_q).detach(), log_q, log_p


def weights_apart(log_share: Tensor, log_weight: Tensor) -> Tensor:
    """KL from normalised weights to those that the draws came with, ``(..., draw) -> (...)``: 0 where they agree."""
    share = log_share.exp()
    return torch.where(share > 0, share * (log_share - log_weight), torch.zeros_like(share)).sum(-1)


def effective_share(log_share: Tensor, log_weight: Tensor) -> Tensor:
    """Effective sample size of importance weights as a part of what equal ratios would have, in (0, 1]."""
    squares: Tensor = torch.logsumexp(2 * log_share - log_weight, -1)
    return (-squares).exp()
