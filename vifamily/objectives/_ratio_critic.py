"""A critic that is a log ratio of densities: a quadratic form with a network beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["LogRatio"]


class LogRatio(nn.Module):
    r"""A scalar function ``g(u) = c + b^T u + u^T A u + net(u)`` of scaled points, parameters of each restart apart.

    Args:
        shift: Centre of the points, ``(dim,)``.
        scale: Their scale, ``(dim,)``.
        hidden: Widths of the hidden layers, tanh units.
        generator: Randomness of the weights.
        restarts: Leading shape of the parameters, ``()`` or ``(restart,)``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, shift: Tensor, scale: Tensor, hidden: Sequence[int], generator: torch.Generator, restarts: tuple[int, ...]
    ) -> None:
        super().__init__()
        dim = shift.shape[-1]
        self.register_buffer("shift", shift.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

        def parameter(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.to(shift).expand(*restarts, *value.shape).clone())

        self.quadratic, self.linear = parameter(torch.zeros(dim, dim)), parameter(torch.zeros(1, dim))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        sizes = [dim, *hidden, 1]
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
            made = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / math.sqrt(inputs)
            offset = torch.randn(outputs, generator=generator, dtype=torch.float64)
            last = len(self.weights) == len(hidden)
            self.weights.append(parameter(0.1 * made if last else made))
            self.biases.append(parameter(torch.zeros_like(offset) if last else offset))

    def forward(self, z: Tensor) -> Tensor:
        """Return g at points ``(..., draw, dim)``, ``(..., draw)``; with restarts, one axis of them in front."""
        u = (z - self.shift) / self.scale
        h = u
        for w, b in zip(list(self.weights)[:-1], list(self.biases)[:-1], strict=True):
            h = torch.tanh(h @ w.mT + b.unsqueeze(-2))
        out = h @ self.weights[-1].mT + self.biases[-1].unsqueeze(-2) + u @ self.linear.mT
        value: Tensor = out.squeeze(-1) + ((u @ self.quadratic) * u).sum(-1)
        return value
