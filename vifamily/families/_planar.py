"""Planar layers of a flow: bends along one direction each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Planar"]

_HALVINGS = 60
"""Of the interval that holds a root: to the last digit of a double."""
_AT_ZERO = math.log(math.e - 1)
"""Makes the constrained product of the vectors zero where the free one is."""


class Planar(nn.Module):
    r"""Planar layers, ``x -> x + u tanh(w'x + b)`` one after the other.

    .. math:: \log|\det J| = \log(1 + w^\top \hat u\, \operatorname{sech}^2(w^\top x + b)), \qquad
        \hat u = u + (m(w^\top u) - w^\top u)\, w / \|w\|^2

    with ``m(a) = softplus(a + log(e - 1)) - 1 > -1``: each layer is one to one whatever the parameters are, and the
    identity at ``u = 0``. The inverse is a root of an increasing function of one number.

    Args:
        dim: Number of coordinates.
        transforms: Number of layers.
        generator: Randomness of the directions.
        dtype: Of the parameters.
        device: Of the parameters.
        start: Size of ``u`` at the start.

    Source: Rezende and Mohamed (2015), "Variational inference with normalizing flows", section 4.1 and appendix A.1.
    """

    def __init__(
        self,
        dim: int,
        transforms: int,
        *,
        generator: torch.Generator,
        dtype: torch.dtype,
        device: torch.device | str,
        start: float,
    ) -> None:
        super().__init__()
        draw = torch.randn(2, transforms, dim, generator=generator, dtype=torch.float64, device=generator.device)
        self.direction = nn.Parameter((draw[0] / math.sqrt(dim)).to(device, dtype))
        self.bend = nn.Parameter((start * draw[1] / math.sqrt(dim)).to(device, dtype))
        self.offset = nn.Parameter(torch.zeros(transforms, dtype=dtype, device=device))

    def forward(self, context: Any = None) -> Planar:
        """Return the map itself: there is nothing that it is conditioned on."""
        return self

    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Direction ``w``, bend ``u``, offset ``b`` and product ``w'u > -1`` of each layer, the bends constrained."""
        w, u = self.direction, self.bend
        free = (w * u).sum(-1, keepdim=True)
        # the smallest number keeps the quotient of a direction of length zero finite
        square = w.square().sum(-1, keepdim=True) + torch.finfo(w.dtype).tiny
        allowed = functional.softplus(free + _AT_ZERO) - 1
        u_hat: Tensor = u + (allowed - free) * w / square
        return list(zip(w, u_hat, self.offset, (w * u_hat).sum(-1), strict=True))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(..., dim)`` to ``(..., dim)``, with the log determinant of the Jacobian, ``(...)``."""
        log_det = x.new_zeros(x.shape[:-1])
        for w, u, b, product in self._layers():
            height = torch.tanh(x @ w + b)
            log_det = log_det + torch.log1p(product * (1 - height.square()))
            x = x + height.unsqueeze(-1) * u
        return x, log_det

    def inv(self, y: Tensor) -> Tensor:
        """Map back, ``(..., dim) -> (..., dim)``, with first derivatives."""
        for w, u, b, product in reversed(self._layers()):
            target = y @ w
            with torch.no_grad():
                root = _root(target, b, product)
            # a Newton step from the root leaves it where it is and gives it its derivatives
            height = torch.tanh(root + b)
            slope = 1 + product * (1 - height.square())
            root = root - (root + product * height - target) / slope
            y = y - torch.tanh(root + b).unsqueeze(-1) * u
        return y


def _root(target: Tensor, offset: Tensor, product: Tensor) -> Tensor:
    """Solve ``a + product tanh(a + offset) = target`` for ``a`` by halving an interval that holds it."""
    low, high = target - product.abs(), target + product.abs()
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = middle + product * torch.tanh(middle + offset) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)
