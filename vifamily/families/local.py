"""A global family together with a family for the local latents of the data in a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, DataError, IncompatibleError, ShapeError
from vifamily.families._base import Family, FamilyEntry
from vifamily.families._elliptical import EllipticalFamily
from vifamily.families._nets import Table
from vifamily.types import Batch, Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["LocalFamily"]

_LOCAL_NEEDS = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q, Capability.CONDITIONAL})


class LocalFamily(Family):
    """``q(z) prod_n q(local_n | datum n)``: a global family, and one law per datum.

    As a family it is the global one. :meth:`draw_local` adds the local draws of a batch. The law of a datum's latents
    comes either from a table with one row of free parameters per datum, found by ``batch.index``, or from an encoder, a
    network from the batch's data to a context (amortised inference).

    Build it with :meth:`from_entries`.

    Args:
        shared: The family of the global latents.
        per_datum: A conditional family over one datum's latents.
        encoder: Network from a batch's data to ``(datum, context_dim)``, or None for a table.
    """

    def __init__(self, shared: Family, per_datum: Family, encoder: nn.Module | None) -> None:
        super().__init__(shared.latent)
        self.shared, self.per_datum, self.encoder = shared, per_datum, encoder
        self.capabilities = shared.capabilities | {Capability.LOCAL}
        self.noise_spec = shared.noise_spec
        self.vectorised = False

    @classmethod
    def from_entries(
        cls,
        shared: Family,
        entry: FamilyEntry,
        local_dim: int,
        *,
        generator: torch.Generator,
        num_data: int | None = None,
        encoder: nn.Module | None = None,
        context_dim: int | None = None,
    ) -> LocalFamily:
        """Build the local part beside a global family.

        Args:
            shared: The family of the global latents.
            entry: Entry of the local family; with a table, a Gaussian one.
            local_dim: Number of unconstrained local coordinates of one datum.
            generator: Randomness of the initial parameters.
            num_data: Size of the data set, for a table.
            encoder: Network from a batch's data to a context ``(datum, context_dim)``; None for a table.
            context_dim: Size of that context.

        Returns:
            The joint family.

        Raises:
            IncompatibleError: If the entry has no conditional version with a density and reparameterised draws.
            ConfigError: If neither a table nor an encoder can be made of the arguments.
        """
        lacking = tuple(str(c) for c in sorted(_LOCAL_NEEDS - entry.capabilities))
        if lacking or Capability.WEIGHTED in entry.capabilities:
            raise IncompatibleError(
                f"local latents need a conditional family with unweighted draws; {type(entry).__name__} "
                f"lacks {', '.join(lacking) or 'unweighted draws'}. Use for example 'mean_field'.",
                missing=lacking,
            )
        latent = dataclasses.replace(shared.latent, dim=local_dim, num_categories=None, context_dim=None)
        if encoder is not None:
            if context_dim is None:
                raise ConfigError("an encoder needs context_dim=, the size of what it returns per datum.")
            conditional = dataclasses.replace(latent, context_dim=context_dim)
            return cls(shared, entry.build(conditional, generator=generator), encoder)
        if num_data is None:
            raise ConfigError("local latents need num_data= (free parameters per datum) or an encoder=.")
        return cls(shared, _tabled(entry, latent, num_data, generator), None)

    @property
    def local_noise_spec(self) -> NoiseSpec:
        """Base noise of one datum's latents in one draw."""
        return self.per_datum.noise_spec

    def draw_local(self, draw: Draw, local_noise: Tensor, batch: Batch) -> Draw:
        """Add the local draws of a batch to global draws.

        Args:
            draw: Global draws.
            local_noise: ``(draw, datum, *local_noise_spec.shape)``.
            batch: The data whose latents are drawn.

        Returns:
            The same draws with ``local`` ``(draw, datum, local_dim)`` and ``local_log_q`` ``(draw, datum)``.

        Raises:
            DataError: If there is a table and the batch does not know the positions of its data.
            ShapeError: If the noise has another number of data than the batch, or the encoder's result does not fit.
        """
        if local_noise.shape[:2] != (draw.z.shape[0], batch.size):
            raise ShapeError(
                f"local noise must start with (draw, datum) = ({draw.z.shape[0]}, {batch.size}), "
                f"got {tuple(local_noise.shape)}."
            )
        local = self.per_datum(local_noise, self._context(batch))
        return dataclasses.replace(draw, local=local.z, local_log_q=local.log_q)

    def local_log_prob(self, local: Tensor, batch: Batch, *, frozen: bool = False) -> Tensor:
        """Log density of local points of a batch, ``(..., datum, local_dim) -> (..., datum)``."""
        return self.per_datum.log_prob(local, self._context(batch), frozen=frozen)

    def _context(self, batch: Batch) -> Tensor:
        if self.encoder is None:
            if batch.index is None:
                raise DataError(
                    "the batch does not know the positions of its data, which a table of local parameters needs. "
                    "Use a data set with positions, or give an encoder."
                )
            return batch.index
        context = self.encoder(batch.data)
        expected = (batch.size, self.per_datum.latent.context_dim)
        if not isinstance(context, Tensor) or tuple(context.shape) != expected:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ShapeError(f"the encoder must return (datum, context_dim) = {expected}, got {got}.")
        return context

    # -- the global family ----------------------------------------------------------------------------------------
    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to global draws in standardised coordinates."""
        return self.shared.transform(noise, context)

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise to global draws."""
        draw: Draw = self.shared(noise, context)
        return draw

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density of global points."""
        return self.shared.log_prob(z, context, frozen=frozen)

    def entropy(self, context: Tensor | None = None) -> Tensor:
        """Closed-form entropy of the global part."""
        return self.shared.entropy(context)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Closed-form moments of the global part."""
        return self.shared.moments()

    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Start the global part."""
        self.shared.start_at(mean, scale)

    def precondition(self, shift: Tensor, scale: Tensor, covariance: Tensor | None = None) -> None:
        """Set the affine map of the global part."""
        self.shared.precondition(shift, scale)
        super().precondition(shift, scale)

    def sample(self, num_draws: int, *, generator: torch.Generator, context: Tensor | None = None) -> Tensor:
        """Draw global points."""
        return self.shared.sample(num_draws, generator=generator, context=context)


def _tabled(entry: FamilyEntry, latent: LatentSpec, num_data: int, generator: torch.Generator) -> Family:
    """Build a Gaussian family whose context is the position of a datum in a table of parameters."""
    family: Any = entry.build(latent, generator=generator)
    if not isinstance(family, EllipticalFamily):
        raise ConfigError(
            f"a table of local parameters is made for Gaussian families, not {type(entry).__name__}: "
            "use 'mean_field', 'full_rank' or 'low_rank', or give an encoder."
        )
    family.head = Table(num_data, family.num_values, dtype=latent.dtype, device=latent.device)
    return family
