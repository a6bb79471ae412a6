"""Independent categorical coordinates, enumerated where their joint states are few."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError
from vifamily.families._base import Family, FamilyEntry, uniform_log_weight
from vifamily.families._nets import check_positive, normal
from vifamily.registry import register
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec, Space

__all__ = ["Categorical", "CategoricalFamily"]

_CAPABILITIES = frozenset({Capability.DRAWS, Capability.LOG_Q, Capability.CHEAP_LOG_Q, Capability.ENTROPY})


@register("families", "categorical")
@dataclasses.dataclass(frozen=True)
class Categorical(FamilyEntry):
    """Independent categorical coordinates, ``q(z) = prod_i p_i(z_i)``, for discrete latents coded ``0, 1, ...``.

    With at most ``max_states`` joint states, its draws are all states, with log weight ``log q(z)`` and no noise:
    expectations are exact and differentiable, since the weights carry the gradient. Otherwise draws come from uniform
    noise by the inverse distribution function; they are not reparameterised, and their log density is differentiable
    (score function).

    Args:
        max_states: Largest number of joint states that is enumerated.

    Raises:
        ConfigError: If ``max_states`` is not an integer of at least 0; on building, if the latent space does not state
            its categories.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec, Space
        >>> latent = LatentSpec(2, space=Space.DISCRETE, num_categories=(2, 3))
        >>> family = Categorical().build(latent, generator=torch.Generator().manual_seed(0))
        >>> draw = family(torch.zeros(1, 0, dtype=torch.float64))
        >>> tuple(draw.z.shape), round(float(draw.log_weight.detach().exp().sum()), 6)
        ((6, 2), 1.0)
    """

    max_states: int = 1024
    space = Space.DISCRETE
    capabilities = _CAPABILITIES

    def __post_init__(self) -> None:
        """Check the options."""
        check_positive("max_states", self.max_states, least=0)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> CategoricalFamily:
        """Build the family near the uniform law."""
        self.check_space(latent)
        if (
            latent.num_categories is None
            or len(latent.num_categories) != latent.dim
            or min(latent.num_categories, default=1) < 1
        ):
            raise ConfigError(
                f"a categorical family needs the number of categories of each of its {latent.dim} coordinates, "
                f"got num_categories={latent.num_categories!r}."
            )
        return CategoricalFamily(latent, latent.num_categories, self.max_states, generator)


class CategoricalFamily(Family):
    """The module of :class:`Categorical`, with ``logits`` ``(dim, largest number of categories)``.

    Args:
        latent: What is covered.
        categories: Number of categories of each coordinate.
        max_states: Largest number of joint states that is enumerated.
        generator: Randomness of the initial logits.
    """

    possible: Tensor
    states: Tensor

    def __init__(
        self, latent: LatentSpec, categories: tuple[int, ...], max_states: int, generator: torch.Generator
    ) -> None:
        super().__init__(latent)
        width = max(categories, default=1)
        counts = torch.tensor(categories, device=latent.device).reshape(-1, 1)
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.logits = nn.Parameter(
            normal((latent.dim, width), generator, std=0.01, dtype=latent.dtype, device=latent.device)
        )
        self.register_buffer("possible", torch.arange(width, device=latent.device) < counts, persistent=False)
        self.enumerated = math.prod(categories) <= max_states
        exact = {Capability.ENUMERATED, Capability.WEIGHTED}
        self.capabilities = _CAPABILITIES | exact if self.enumerated else _CAPABILITIES
        self.noise_spec = NoiseSpec((0,)) if self.enumerated else NoiseSpec((latent.dim,), "uniform")
        axes = [torch.arange(n, **options) for n in categories] if self.enumerated else []
        states = torch.cartesian_prod(*axes).reshape(-1, latent.dim) if axes else torch.zeros(0, latent.dim, **options)
        self.register_buffer("states", states, persistent=False)

    def fewest_fixed_draws(self) -> int | None:
        """All states are weighted without any noise, or, where they are too many, no gradient flows through draws."""
        return 0 if self.enumerated else None

    def log_probabilities(self) -> Tensor:
        """Log probability of every category, ``(dim, categories)``; minus infinity where a coordinate has fewer."""
        return self.logits.masked_fill(~self.possible, -math.inf).log_softmax(-1)

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Return all states, or draws by the inverse distribution function."""
        if self.enumerated:
            log_q = self.log_density(self.states, None)
            return Draw(self.states, log_q, log_q)
        cumulative = self.log_probabilities().detach().exp().cumsum(-1)
        z = (noise[..., None] >= cumulative).sum(-1)
        z = torch.minimum(z, self.possible.sum(-1) - 1).to(noise.dtype)
        log_q = self.log_density(z, None)
        return Draw(z, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log probability, minus infinity at points that are no states."""
        # the comparison carries a category axis, so that coordinates of unequal sizes need no special case
        width = self.possible.shape[-1]
        hit = (u[..., None] == torch.arange(width, dtype=u.dtype, device=u.device)) & self.possible
        finite = self.log_probabilities().masked_fill(~self.possible, 0.0)
        log_p = torch.where(hit, finite, torch.zeros_like(finite)).sum(-1)
        return torch.where(hit.any(-1), log_p, -math.inf).sum(-1)

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Entropy, the sum of those of the coordinates."""
        log_p = self.log_probabilities()
        finite = log_p.masked_fill(~self.possible, 0.0)
        return -(log_p.exp() * finite).sum()

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the coded categories."""
        p = self.log_probabilities().exp()
        code = torch.arange(p.shape[-1], dtype=p.dtype, device=p.device)
        mean = p @ code
        return mean, torch.diag(p @ code.square() - mean.square())
