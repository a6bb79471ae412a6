"""The variational program of the paper's mixture: a sampler with a switch, written as a user would."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vifamily.families import Family
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["SwitchProgram"]


class _Positive(nn.Module):
    """A positive map of a normal number: softplus of a line and a small network.

    Args:
        width: Units of the network.
        spread: Slope of the line at the start; three is much wider than a unit normal.
        generator: Randomness of the weights.
    """

    def __init__(self, width: int, spread: float, generator: torch.Generator) -> None:
        super().__init__()
        draw = torch.randn(2, width, generator=generator, dtype=torch.float64)
        self.inner, self.offset = nn.Parameter(draw[0]), nn.Parameter(draw[1])
        self.outer = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        self.line = nn.Parameter(torch.tensor([2.0, spread], dtype=torch.float64))

    def forward(self, e: Tensor) -> Tensor:
        hidden = torch.tanh(e.unsqueeze(-1) * self.inner + self.offset)
        return nn.functional.softplus(self.line[0] + self.line[1] * e + hidden @ self.outer)


class SwitchProgram(Family):
    """The program ``z = 1[e3 > 0] R(e1) - 1[e3 <= 0] R(e2)`` with two learned positive maps R.

    It has no density. Half of its mass is on each side of zero, whatever is learned.

    Args:
        seed: Seed of the weights.
        spread: Spread of each side at the start.
        width: Units of each map.

    Example:
        >>> family = SwitchProgram()
        >>> z = family(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], dtype=torch.float64)).z
        >>> z[0, 0].item() > 0 > z[1, 0].item()
        True
    """

    capabilities = frozenset({Capability.DRAWS, Capability.REPARAMETERISED})
    noise_spec = NoiseSpec((3,))
    step_size = 0.01

    def __init__(self, seed: int = 0, *, spread: float = 3.0, width: int = 16) -> None:
        super().__init__(LatentSpec(1))
        source = torch.Generator().manual_seed(seed)
        self.right, self.left = _Positive(width, spread, source), _Positive(width, spread, source)

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise ``(draw, 3)`` to draws ``(draw, 1)``."""
        z = torch.where(noise[:, 2] > 0, self.right(noise[:, 0]), -self.left(noise[:, 1]))
        log_weight = z.new_full((z.shape[0],), -torch.tensor(float(z.shape[0])).log().item())
        return Draw(z.unsqueeze(-1), None, log_weight)
