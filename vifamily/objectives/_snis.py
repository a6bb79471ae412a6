"""Self-normalised importance weights of draws of q: what the inclusive objectives without reference draws share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vifamily.errors import NotAvailableError
from vifamily.objectives._base import log_ratio_parts
from vifamily.types import Batch, Draw, FamilyLike, ModelLike

__all__ = ["defensive_draws", "effective_share", "weighted_draws", "weights_apart"]


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


def defensive_draws(
    family: FamilyLike, model: ModelLike, draw: Draw, batch: Batch | None, *, share: float, widen: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return log ratio, log density of q and log joint at draws of q mixed with a wider law.

    The last of the draws, a part ``share`` of them, are moved away from the mean of the others by the factor
    ``widen``; all are weighed as draws of the mixture (the balance heuristic),

    .. math:: \log p(x, z) - \log[(1 - s)\, q(z) + s\, r(z)], \qquad
              r(z) = c^{-d}\, q\big(m + (z - m) / c\big),

    so that no ratio exceeds ``p / (s r)``, however light the tails of q are.

    Args:
        family: A family with a density at given points, whose draws are independent and carry equal weights.
        model: The model.
        draw: Its draws.
        batch: The data to use, or None for all.
        share: The part s of the draws, at least one and not all.
        widen: The factor c.
    """
    z = draw.z.detach()
    count, dim = z.shape[-2], z.shape[-1]
    wide = min(max(round(share * count), 1), count - 1)
    centre = z[..., : count - wide, :].mean(-2, keepdim=True)
    z = torch.cat([z[..., : count - wide, :], centre + widen * (z[..., count - wide :, :] - centre)], -2)
    ratio, log_q, log_p = weighted_draws(family, model, Draw(z, None, draw.log_weight), batch)
    log_wide = family.log_prob(centre + (z - centre) / widen).detach() - dim * math.log(widen)
    own = log_q.detach()
    proposal = torch.logaddexp(own + math.log1p(-wide / count), log_wide + math.log(wide / count))
    # where neither law has any mass the ratio is that of q, minus infinity over minus infinity is no number
    return torch.where(proposal > -torch.inf, ratio + own - proposal, ratio), log_q, log_p
