"""A critic on pairs of parameters and data: the log ratio of two joint laws with one law of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vifamily.objectives._ratio_critic import LogRatio

__all__ = ["JointRatio"]


class JointRatio(nn.Module):
    r"""A scalar function ``g(z, x)`` that stands for ``log p(z | x) - log q(z | x)``.

    Data go through an encoder of the critic's own; a quadratic form in parameters and code, which is the best there is
    between Gaussians whose means are linear in the code, and a network beside it make the number.

    Args:
        encoder: From data ``(datum, *shape)`` to codes ``(datum, code)``.
        z: Parameters that set the scale, ``(pair, dim)``.
        x: Their data.
        hidden: Widths of the hidden layers; None takes two of four times the coordinates, between 64 and 256.
        generator: Randomness of the weights.

    Example:
        >>> z, x = torch.randn(100, 2), torch.randn(100, 3)
        >>> critic = JointRatio(nn.Identity(), z, x, None, torch.Generator().manual_seed(0))
        >>> critic(torch.zeros(5, 4, 2), critic.encode(torch.zeros(5, 3))).shape
        torch.Size([5, 4])
    """

    def __init__(
        self, encoder: nn.Module, z: Tensor, x: Tensor, hidden: Sequence[int] | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            points = torch.cat([z, encoder(x).to(z)], -1)
        sizes = hidden or (min(256, max(64, 4 * points.shape[-1])),) * 2
        tiny = math.sqrt(torch.finfo(points.dtype).tiny)
        self.ratio = LogRatio(points.mean(0), points.std(0).clamp_min(tiny), sizes, generator, ())

    def encode(self, x: Tensor) -> Tensor:
        """Encode data ``(datum, *shape)``, ``(datum, code)``."""
        out: Tensor = self.encoder(x)
        return out

    def forward(self, z: Tensor, code: Tensor) -> Tensor:
        """Return g at parameters ``(datum, draw, dim)`` and codes ``(datum, code)``, ``(datum, draw)``."""
        beside = code.unsqueeze(-2).expand(*z.shape[:-1], code.shape[-1])
        out: Tensor = self.ratio(torch.cat([z, beside], -1))
        return out
