"""Coordinates in which a conditional family starts: what a linear regression on the context leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vifamily.numerics.truncated_logistic import truncated_logistic_inverse, truncated_logistic_score
from vifamily.types import LatentSpec

__all__ = ["RegressionFrame"]

_LOGISTIC_WIDTH = 0.5513288954217921
"""Width of the logistic law with standard deviation one, the square root of three over pi."""
_PENALTIES = (1e-2, 1.0, 1e2, 1e4, 1e6)
_LEAST_SHARE = 1e-3
"""Least residual standard deviation, as a share of that of the coordinate."""


class RegressionFrame(nn.Module):
    r"""A bijection of ``z`` to residuals ``v``, given a context ``c``, with ``loc = intercept + c slope``.

    On the real line ``v = (z - loc) / width``. A parameter between two bounds has a logit for ``z``; there ``loc`` and
    ``width`` are those of its place ``t`` between the bounds, and ``v`` is the normal score of ``t`` under a logistic
    law cut to the bounds (:func:`~vifamily.numerics.truncated_logistic.truncated_logistic_score`). So the posterior of
    a uniform prior may end sharply at a bound, while inside ``v`` is about linear in the parameter. Where the
    posterior's location moves with the data and its shape hardly does, the law of ``v`` hardly depends on the context.

    ``slope`` ``(context_dim, dim)``, ``intercept`` and ``log_width`` ``(dim,)`` are trained with the family. They are
    what is added to ``start_slope``, ``start_intercept`` and ``log unit``, the first two in units of the width at the
    start: a step that suits a wide posterior would otherwise throw a narrow one far off. Before :meth:`fit` the map is
    the identity.

    Args:
        latent: What is covered, with a context.
    """

    bounded: Tensor
    start_slope: Tensor
    start_intercept: Tensor
    unit: Tensor

    def __init__(self, latent: LatentSpec) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.slope = nn.Parameter(torch.zeros(latent.context_dim or 0, latent.dim, **options))
        self.intercept = nn.Parameter(torch.zeros(latent.dim, **options))
        self.log_width = nn.Parameter(torch.zeros(latent.dim, **options))
        self.register_buffer("start_slope", torch.zeros_like(self.slope.detach()))
        self.register_buffer("start_intercept", torch.zeros_like(self.intercept.detach()))
        self.register_buffer("unit", torch.ones_like(self.intercept.detach()))
        self.register_buffer("bounded", torch.zeros(latent.dim, dtype=torch.bool, device=latent.device))

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map points ``(..., datum, dim)`` to residuals; also ``log |det dv/dz|``, ``(..., datum)``."""
        loc, width = self._at(context)
        v, log_jacobian = (z - loc) / width, -width.log().expand_as(z)
        if self.any_bounded:
            score, log_slope = truncated_logistic_score(torch.where(self.bounded, z, 0.0), *self._safe(loc, width))
            v, log_jacobian = self._pick(score, v), self._pick(log_slope, log_jacobian)
        return v, log_jacobian.sum(-1)

    def inverse(self, v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map residuals ``(..., datum, dim)`` to points; also ``log |det dv/dz|`` there."""
        loc, width = self._at(context)
        z, log_jacobian = loc + width * v, -width.log().expand_as(v)
        if self.any_bounded:
            logit, log_slope = truncated_logistic_inverse(torch.where(self.bounded, v, 0.0), *self._safe(loc, width))
            z, log_jacobian = self._pick(logit, z), self._pick(log_slope, log_jacobian)
        return z, log_jacobian.sum(-1)

    @property
    def any_bounded(self) -> bool:
        """Whether a parameter lies between two bounds."""
        return bool(self.bounded.any())

    def _at(self, context: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.start_intercept + self.unit * self.intercept + context @ (self.start_slope + self.unit * self.slope)
        return loc, self.unit * self.log_width.exp()

    def _safe(self, loc: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers that suit the unit interval in the place of those of coordinates that have no bounds."""
        return torch.where(self.bounded, loc, 0.5), torch.where(self.bounded, width, 1.0)

    def _pick(self, bounded: Tensor, free: Tensor) -> Tensor:
        return torch.where(self.bounded, bounded, free)

    @torch.no_grad()
    def fit(self, z: Tensor, context: Tensor, bounded: Tensor) -> None:
        """Set the map by ridge regression, its penalty chosen for each coordinate by leaving pairs out.

        The first half of the pairs is regressed on; the width is that of residuals of the other half, which the
        regression has not seen: many context numbers and few pairs would make the residuals of its own too small.

        Args:
            z: Points, ``(pair, dim)``.
            context: Their contexts, ``(pair, context_dim)``.
            bounded: Which coordinates are logits of a number between two bounds, ``(dim,)``.
        """
        from sklearn.linear_model import RidgeCV

        z, context, bounded = z.double(), context.double(), bounded.to(z.device)
        places = torch.where(bounded, z.sigmoid(), z)
        seen = len(z) // 2
        ridge = RidgeCV(alphas=_PENALTIES, alpha_per_target=True)
        ridge.fit(context[:seen].cpu().numpy(), places[:seen].cpu().numpy())
        slope = torch.as_tensor(ridge.coef_, dtype=torch.float64).reshape(z.shape[1], -1).T
        intercept = torch.as_tensor(ridge.intercept_, dtype=torch.float64).reshape(-1)
        rest = (places - context @ slope.to(z) - intercept.to(z))[seen:]
        spread = places.std(0)
        width = torch.maximum(rest.square().mean(0).sqrt(), _LEAST_SHARE * spread).clamp_min(1e-12)
        self.bounded.copy_(bounded)
        self.start_slope.copy_(slope)
        self.start_intercept.copy_(intercept)
        self.unit.copy_(torch.where(bounded, _LOGISTIC_WIDTH * width, width))
        for change in (self.slope, self.intercept, self.log_width):
            change.zero_()
