"""A sampler network without density."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from vifamily.families._base import Family, FamilyEntry, uniform_log_weight
from vifamily.families._nets import SamplerNet, check_number, check_positive, check_widths
from vifamily.registry import register
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["Implicit", "ImplicitFamily"]

_CAPABILITIES = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.CONDITIONAL})


@register("families", "implicit")
@dataclasses.dataclass(frozen=True)
class Implicit(FamilyEntry):
    """A network that maps normal noise to draws, ``z = loc + A e + net(e)``, without a density.

    It starts wide: objectives that compare draws with the target by local information (a score, a critic) do not find
    mass that no draw is near, and a sampler that starts narrow seldom spreads.

    Args:
        hidden: Widths of the hidden layers.
        noise_dim: Size of the noise; None for the number of latent coordinates. Below that number, draws lie on a
            surface.
        spread: Initial standard deviation, in units of the starting scale.

    Raises:
        ConfigError: If a size is not a positive integer or ``spread`` not a positive number.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = Implicit(noise_dim=5).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        >>> draw = family(torch.zeros(3, 5, dtype=torch.float64))
        >>> tuple(draw.z.shape), draw.log_q is None
        ((3, 2), True)
    """

    hidden: Sequence[int] = (64, 64)
    noise_dim: int | None = None
    spread: float = 1.5
    capabilities = _CAPABILITIES

    def __post_init__(self) -> None:
        """Check the options."""
        object.__setattr__(self, "hidden", check_widths("hidden", self.hidden))
        if self.noise_dim is not None:
            check_positive("noise_dim", self.noise_dim)
        check_number("spread", self.spread)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> ImplicitFamily:
        """Build the sampler, near a linear map of its noise."""
        self.check_space(latent)
        return ImplicitFamily(latent, self, generator)


class ImplicitFamily(Family):
    """The module of :class:`Implicit`.

    Args:
        latent: What is covered.
        entry: Hyper-parameters.
        generator: Randomness of the network.
    """

    capabilities = _CAPABILITIES
    step_size = 0.01

    def __init__(self, latent: LatentSpec, entry: Implicit, generator: torch.Generator) -> None:
        super().__init__(latent)
        noise_dim = entry.noise_dim or latent.dim
        self.noise_spec = NoiseSpec((noise_dim,))
        self.spread = entry.spread
        self.net = SamplerNet(
            noise_dim,
            latent.dim,
            entry.hidden,
            latent.context_dim or 0,
            generator,
            dtype=latent.dtype,
            device=latent.device,
        )
        self.net.start(torch.zeros_like(self.shift), self.spread * torch.ones_like(self.shift))

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws."""
        self.check_context(context)
        u = self.net(noise, context)
        return Draw(u, None, uniform_log_weight(u, noise.shape[0]))

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over mean and covariance, widened by ``spread``, up to the small non-linear part."""
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        self.net.start(mean, self.spread * scale)
