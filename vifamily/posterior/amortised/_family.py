"""A conditional family behind an encoder, and that family at one observation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import DataError, ShapeError
from vifamily.families import Family
from vifamily.posterior.amortised.encoders import Encoder
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["LOST", "AmortisedFamily", "ConditionedFamily"]


class AmortisedFamily(nn.Module):
    """An encoder and a conditional family: a distribution over ``z`` for each datum ``x``.

    It takes data where a conditional family takes a context, so that it is a family for objectives whose batches are
    simulated pairs.

    Args:
        encoder: From data ``(datum, *shape)`` to a context ``(datum, context_dim)``.
        family: A family built with that ``context_dim``.
    """

    def __init__(self, encoder: Encoder, family: Family) -> None:
        super().__init__()
        self.encoder, self.family = encoder, family

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the conditional family can do."""
        return self.family.capabilities

    @property
    def noise_spec(self) -> NoiseSpec:
        """The base noise of one draw."""
        return self.family.noise_spec

    @property
    def latent(self) -> LatentSpec:
        """What is covered."""
        return self.family.latent

    @property
    def dim(self) -> int:
        """Number of latent coordinates."""
        return self.family.dim

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise ``(draw, datum, *noise_spec.shape)`` to draws at data ``(datum, *shape)``."""
        draw: Draw = self.family(noise, self.encode(context))
        return draw

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density at points ``(..., datum, dim)`` given data ``(datum, *shape)``, ``(..., datum)``."""
        encoded = self.encode(context)
        return self.family.log_prob(z, encoded.detach() if frozen else encoded, frozen=frozen)

    @property
    def exponential(self) -> Any:
        """The conditional family, where it is an exponential one with natural parameters."""
        return self.family

    def raw(self, x: Tensor) -> Tensor:
        """Raw numbers of an exponential family at data ``(datum, *shape)``, ``(datum, num_outputs)``."""
        out: Tensor = self.exponential.raw(self.encode(x))
        return out

    def entropy(self, context: Tensor | None = None) -> Tensor:
        """Closed-form entropy at each datum, ``(datum,)``, where there is one."""
        return self.family.entropy(self.encode(context))

    def encode(self, x: Tensor | None) -> Tensor:
        """Encode data ``(datum, *shape)`` to contexts ``(datum, context_dim)``.

        Raises:
            ShapeError: If there are none.
        """
        if x is None:
            raise ShapeError("an amortised family is conditional: give data (datum, ...) as its context.")
        out: Tensor = self.encoder(x)
        return out

    def copy(self) -> AmortisedFamily:
        """Return a deep copy."""
        return copy.deepcopy(self)

    @torch.no_grad()
    def at(self, x: Tensor) -> ConditionedFamily:
        """Return the family at one datum ``x`` of shape ``shape`` (or ``(1, *shape)``).

        Raises:
            ShapeError: If the shape is another.
            DataError: If a number is not finite.
        """
        return ConditionedFamily(self.family, self.encoder(self.one(x)))

    def one(self, x: Tensor) -> Tensor:
        """Check one datum ``x`` of shape ``shape`` (or ``(1, *shape)``); return it as a batch ``(1, *shape)``.

        Raises:
            ShapeError: If the shape is another.
            DataError: If a number is not finite.
        """
        shape = self.encoder.shape
        if tuple(x.shape) not in (shape, (1, *shape)):
            raise ShapeError(f"an observation has the shape of one simulation, {shape}, got {tuple(x.shape)}.")
        if not bool(x.isfinite().all()):
            raise DataError("the observation has numbers that are not finite.")
        return x.to(self.encoder.shift).reshape(1, *shape)


LOST = frozenset(
    {
        Capability.CONDITIONAL,
        Capability.GAUSSIAN,
        Capability.FULL_GAUSSIAN,
        Capability.FACTORISED_GAUSSIAN,
        Capability.NATURAL,
    }
)
"""What a conditional family cannot do at one context: give its moments without draws."""


class ConditionedFamily(Family):
    """A conditional family at one context: an ordinary family.

    Args:
        family: The conditional family; the same module, not a copy.
        context: ``(1, context_dim)``.
    """

    context: Tensor

    def __init__(self, family: Family, context: Tensor) -> None:
        latent = family.latent
        plain = LatentSpec(latent.dim, latent.space, latent.num_categories, None, latent.dtype, latent.device)
        super().__init__(plain)
        self.inner = family
        self.noise_spec = family.noise_spec
        self.capabilities = family.capabilities - LOST
        self.vectorised = family.vectorised
        self.log_q_is_bound = family.log_q_is_bound
        self.shift, self.scale = family.shift, family.scale
        self.register_buffer("context", context.detach().clone())

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws at the context."""
        self.check_context(context)
        draw = self.inner.transform(noise.unsqueeze(1), self.context)
        log_q = None if draw.log_q is None else draw.log_q.squeeze(1)
        log_weight = draw.log_weight.squeeze(1) if draw.log_weight.dim() > 1 else draw.log_weight
        return Draw(draw.z.squeeze(1), log_q, log_weight)

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates at the context."""
        self.check_context(context)
        return self.inner.log_density(u.unsqueeze(-2), self.context).squeeze(-1)

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Entropy at the context, where the family has a closed form."""
        self.check_context(context)
        return self.inner.standard_entropy(self.context).squeeze(0)

    @torch.no_grad()
    def sample(self, num_draws: int, *, generator: torch.Generator, context: Tensor | None = None) -> Tensor:
        """Draw ``num_draws`` points, ``(num_draws, dim)``."""
        self.check_context(context)
        return self.inner.sample(num_draws, generator=generator, context=self.context).squeeze(1)
