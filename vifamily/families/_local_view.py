"""A local family at one step: noise for the global and the local draws in one tensor, and the batch they are for."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vifamily.families.local import LocalFamily
from vifamily.types import Batch, Capability, Draw, NoiseSpec

__all__ = ["LocalView", "joint_noise_spec"]


def joint_noise_spec(family: LocalFamily, batch_size: int) -> NoiseSpec:
    """Return the noise of one draw of the global latents and of the local ones of a whole batch, side by side."""
    local = math.prod(family.local_noise_spec.shape)
    return NoiseSpec((math.prod(family.noise_spec.shape) + batch_size * local,))


class LocalView:
    """What an objective sees of a local family: a family whose draws carry the batch's local latents.

    Args:
        family: The family.
        batch: The data whose latents are drawn.
    """

    def __init__(self, family: LocalFamily, batch: Batch) -> None:
        self.family, self.batch = family, batch

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the family can do."""
        return self.family.capabilities

    def __call__(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map joint noise ``(draw, joint)`` to global and local draws."""
        shape = self.family.noise_spec.shape
        size = math.prod(shape)
        shared = self.family(noise[:, :size].reshape(noise.shape[0], *shape))
        local = noise[:, size:].reshape(noise.shape[0], self.batch.size, *self.family.local_noise_spec.shape)
        return self.family.draw_local(shared, local, self.batch)

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density of global points."""
        return self.family.log_prob(z, context, frozen=frozen)

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on."""
        return getattr(self.family, name)
