"""Models and families that show nothing but what was asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import NotAvailableError
from vifamily.types import Batch, Capability, Draw, NoiseSpec, Space

__all__ = ["NarrowFamily", "NarrowModel", "QuadratureFamily", "SplitFamily"]

Caps = frozenset[Capability]


class NarrowFamily:
    """A family that can do no more than it is allowed to.

    Args:
        family: The family.
        capabilities: What may be used of it.
    """

    def __init__(self, family: Any, capabilities: Caps) -> None:
        self._family, self.capabilities = family, capabilities

    @property
    def noise_spec(self) -> NoiseSpec:
        """Base noise of one draw."""
        spec: NoiseSpec = self._family.noise_spec
        return spec

    @property
    def dim(self) -> int:
        """Number of latent coordinates."""
        return int(self._family.dim)

    def _need(self, capability: Capability) -> None:
        if capability not in self.capabilities:
            raise NotAvailableError(f"used the family's {capability!s} without declaring it")

    def __call__(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise to draws."""
        draw: Draw = self._family(noise, context)
        return draw if Capability.LOG_Q in self.capabilities else dataclasses.replace(draw, log_q=None)

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density at given points."""
        self._need(Capability.LOG_Q)
        out: Tensor = self._family.log_prob(z, context, frozen=frozen)
        return out

    def entropy(self, context: Tensor | None = None) -> Tensor:
        """Closed-form entropy."""
        self._need(Capability.ENTROPY)
        out: Tensor = self._family.entropy(context)
        return out

    def moments(self) -> tuple[Tensor, Tensor]:
        """Closed-form moments."""
        self._need(Capability.GAUSSIAN)
        out: tuple[Tensor, Tensor] = self._family.moments()
        return out

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Closed-form means and variances of each coordinate."""
        self._need(Capability.GAUSSIAN)
        out: tuple[Tensor, Tensor] = self._family.marginals()
        return out


class SplitFamily(NarrowFamily):
    """A family whose first draw is written as two equal ones of half its weight.

    Args:
        family: A family whose draws carry weights.
    """

    def __init__(self, family: Any) -> None:
        super().__init__(family, family.capabilities)

    def __call__(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise to draws, one more than the family gives."""
        draw: Draw = self._family(noise, context)
        half = draw.log_weight[..., :1] - math.log(2)
        return Draw(
            torch.cat([draw.z, draw.z[..., :1, :]], -2),
            None if draw.log_q is None else torch.cat([draw.log_q, draw.log_q[..., :1]], -1),
            torch.cat([half, draw.log_weight[..., 1:], half], -1),
        )


class QuadratureFamily(NarrowFamily):
    """A family whose draws carry the weights of a quadrature rule over its noise.

    Args:
        family: A family whose draws have equal weights.
        log_weight: Log weights of the rows of noise, normalised, ``(draw,)``.
    """

    def __init__(self, family: Any, log_weight: Tensor) -> None:
        super().__init__(family, family.capabilities | {Capability.WEIGHTED})
        self._log_weight = log_weight

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of the family."""
        found: Iterator[torch.nn.Parameter] = self._family.parameters()
        return found

    def __call__(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map the nodes of the rule to draws."""
        draw: Draw = self._family(noise, context)
        return dataclasses.replace(draw, log_weight=self._log_weight)


class NarrowModel(torch.nn.Module):
    """A model that can do no more than it is allowed to.

    Args:
        model: The model.
        capabilities: What may be used of it.
        constant: Added to its log joint, and so to its log prior.
    """

    def __init__(self, model: Any, capabilities: Caps, constant: float = 0.0) -> None:
        super().__init__()
        self._model, self.capabilities, self.constant = model, capabilities, constant

    @property
    def space(self) -> Space:
        """Space of the latents."""
        space: Space = self._model.space
        return space

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return int(self._model.dim)

    @property
    def num_data(self) -> int | None:
        """Size of the data set."""
        size: int | None = self._model.num_data
        return size

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def _need(self, capability: Capability) -> None:
        if capability not in self.capabilities:
            raise NotAvailableError(f"used the model's {capability!s} without declaring it")

    def scale(self, batch: Batch | None) -> float:
        """The minibatch scale."""
        return float(self._model.scale(batch))

    def log_joint(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log joint density, cut off from the graph where no score may be used."""
        self._need(Capability.LOG_JOINT)
        out: Tensor = self._model.log_joint(z, batch) + self.constant
        return out if Capability.SCORE in self.capabilities else out.detach()

    def log_prior(self, z: Tensor) -> Tensor:
        """Log prior density."""
        self._need(Capability.PRIOR)
        out: Tensor = self._model.log_prior(z) + self.constant
        return out

    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draws from the prior."""
        self._need(Capability.PRIOR_DRAWS)
        out: Tensor = self._model.sample_prior(num_draws, generator=generator)
        return out

    def log_likelihood(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log likelihood per datum."""
        self._need(Capability.PER_DATUM)
        out: Tensor = self._model.log_likelihood(z, batch)
        return out

    @property
    def reference_draws(self) -> Tensor:
        """Reference draws."""
        self._need(Capability.REFERENCE_DRAWS)
        out: Tensor = self._model.reference_draws
        return out

    def groups_of(self, batch: Batch | None) -> tuple[Tensor, int]:
        """Group of each datum."""
        self._need(Capability.GROUPS)
        out: tuple[Tensor, int] = self._model.groups_of(batch)
        return out

    def gaussian_prior(self) -> tuple[Tensor, Tensor]:
        """Moments of a Gaussian prior."""
        self._need(Capability.GAUSSIAN_PRIOR)
        out: tuple[Tensor, Tensor] = self._model.gaussian_prior()
        return out

    def log_likelihood_each(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log likelihood of each datum under the draw beside it."""
        self._need(Capability.EXAMPLE_NOISE)
        out: Tensor = self._model.log_likelihood_each(z, batch)
        return out

    def kl_to_prior(self, family: Any) -> Tensor:
        """KL of a family to the Gaussian prior; the added constant belongs to the prior and so enters negatively."""
        self._need(Capability.GAUSSIAN_PRIOR)
        out: Tensor = self._model.kl_to_prior(family) - self.constant
        return out
