"""Low-rank adapters as latents."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vifamily.errors import ConfigError
from vifamily.registry import register
from vifamily.weights._base import LayerWeights, check_positive
from vifamily.weights._entry import WeightsEntry

__all__ = ["Lora", "LoraLayer"]


class LoraLayer(LayerWeights):
    """A linear layer with a frozen weight and a latent low-rank change of it.

    Args:
        module: The layer; its bias stays with it.
        name: Its full name.
        rank: Rank of the change.
        scale: Multiplies the change, over the rank.
    """

    example_noise = True
    module: nn.Linear
    base: Tensor
    prior_sd: Tensor
    start_sd: Tensor

    def __init__(self, module: nn.Linear, name: str, rank: int, scale: float) -> None:
        super().__init__()
        wide, out = module.in_features, module.out_features
        self.module, self.rank, self.factor = module, rank, scale / rank
        self.names = (f"{name}.weight" if name else "weight",)
        self.site_shapes = {
            ".".join(filter(None, (name, "lora_A"))): (rank, wide),
            ".".join(filter(None, (name, "lora_B"))): (out, rank),
        }
        self.dim = rank * (wide + out)
        like = module.weight.detach()
        self.register_buffer("base", like.clone())
        sizes = torch.tensor([rank * wide, out * rank], device=like.device)
        self.register_buffer("prior_sd", like.new_tensor([wide**-0.5, 1.0]).repeat_interleave(sizes))
        self.register_buffer("start_sd", self.prior_sd * like.new_tensor(1e-2))

    def _factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        out, wide = self.base.shape
        a, b = z.split([self.rank * wide, out * self.rank], -1)
        return a.reshape(*z.shape[:-1], self.rank, wide), b.reshape(*z.shape[:-1], out, self.rank)

    def materialise(self, z: Tensor) -> dict[str, Tensor]:
        """Write out the changed weight, ``(..., dim) -> name -> (..., out, in)``."""
        a, b = self._factors(z)
        return {self.names[0]: self.base + self.factor * b @ a}

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute the output for every draw; the change is never written out."""
        a, b = self._factors(z)
        a, b = (a.unsqueeze(1), b.unsqueeze(1)) if z.dim() == 2 else (a, b)
        rows = x.reshape(*x.shape[:2], -1, x.shape[-1])
        frozen = functional.linear(rows, self.base, self.module.bias)  # once for all draws where they share the input
        change = (rows @ a.transpose(-1, -2)) @ b.transpose(-1, -2)
        return (frozen + self.factor * change).reshape(z.shape[0], *x.shape[1:-1], self.base.shape[0])

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior, ``(dim,)`` each."""
        return torch.zeros_like(self.prior_sd), self.prior_sd

    def initial(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Begin without a change: the second factor has mean zero, the first is uniform with the prior's variance."""
        (out, wide), rank = self.base.shape, self.rank
        noise = 2 * torch.rand(rank * wide, generator=generator, dtype=torch.float64) - 1
        start = noise.to(self.base) * math.sqrt(3 / wide)
        return torch.cat([start, start.new_zeros(out * rank)]), self.start_sd


@register("weights", "lora")
@dataclasses.dataclass(frozen=True)
class Lora(WeightsEntry):
    r"""Linear layers keep their weights; a low-rank change of each is latent.

    .. math:: W = W_0 + \frac{s}{r} B A, \qquad
              A_{kj} \sim \mathrm{N}(0, 1/\text{fan-in}), \quad B_{ik} \sim \mathrm{N}(0, 1)

    ``W_0`` is frozen; biases stay what ``rest=`` makes of them. A fit begins with uniform ``A`` of the prior's
    variance, ``B`` zero, and a hundredth of the prior standard deviations. The posterior is the same under a rotation
    of the two factors into each other, so single coordinates mean little: look at outputs.

    Args:
        include: Patterns on parameter or layer names, separated by commas.
        exclude: Patterns of what stays as it is.
        rank: Rank of the change.
        scale: Multiplies the change.

    Raises:
        ConfigError: If rank or scale are not positive.

    Source: Hu et al. (2022), "LoRA: low-rank adaptation of large language models", section 4.1.

    Example:
        >>> import torch
        >>> made = Lora(rank=2).build(torch.nn.Linear(8, 3), generator=torch.Generator())
        >>> made.layout.names, made.dim, made.report.point
        (('lora_A', 'lora_B'), 22, 3)
    """

    rank: int = 4
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the patterns and the numbers."""
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank must be a positive integer, got {self.rank!r}.")
        check_positive("scale", self.scale)

    def layer(self, module: nn.Module, name: str, *, generator: torch.Generator) -> LayerWeights | str:
        """Make the adapter of a linear layer."""
        if type(module) is not nn.Linear:
            return "not a linear layer"
        if not self.picks(name, "weight"):
            return "its weight is not chosen"
        return LoraLayer(module, name, self.rank, self.scale)
