"""Families and modules of the user's own, used as they stand."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, ShapeError
from vifamily.families._base import Family, FamilyEntry
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["GivenFamily", "GivenModule"]


@dataclasses.dataclass(frozen=True)
class GivenFamily(FamilyEntry):
    """A family that was already built; each build is a copy.

    Args:
        family: The family.
    """

    family: Family = dataclasses.field(repr=False)
    given = True

    def __post_init__(self) -> None:
        """Take over what the family can do."""
        object.__setattr__(self, "capabilities", self.family.capabilities)
        object.__setattr__(self, "space", self.family.latent.space)
        object.__setattr__(self, "log_q_is_bound", self.family.log_q_is_bound)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> Family:
        """Return a copy, in the wanted precision."""
        self.check_space(latent)
        if self.family.dim != latent.dim:
            raise ShapeError(f"the given family covers {self.family.dim} coordinates, but the model has {latent.dim}.")
        out = self.family.copy().to(dtype=latent.dtype, device=latent.device)
        out.latent = latent
        return out


@dataclasses.dataclass(frozen=True)
class GivenModule(FamilyEntry):
    """A module with the methods of a family, but of another class.

    It must have ``forward(noise) -> Draw``, ``noise_spec`` and ``capabilities``; with a log density among them,
    ``log_prob(z)``; with a closed-form entropy, ``entropy()``. Where it is conditional, each takes the context as a
    further argument.

    Args:
        module: The module; families built from it hold copies.

    Raises:
        ConfigError: Naming what is missing.
    """

    module: nn.Module = dataclasses.field(repr=False)
    given = True

    def __post_init__(self) -> None:
        """Check the methods."""
        name = type(self.module).__name__
        wanted = ["forward", "noise_spec", "capabilities"]
        claimed: Any = getattr(self.module, "capabilities", frozenset())
        wanted += ["log_prob"] if Capability.LOG_Q in claimed else []
        wanted += ["entropy"] if Capability.ENTROPY in claimed else []
        missing = [
            attribute
            for attribute in wanted
            if not hasattr(self.module, attribute)
            or (attribute == "forward" and type(self.module).forward is nn.Module.forward)
        ]
        if missing:
            raise ConfigError(
                f"{name} cannot be used as a family: it lacks {', '.join(missing)}. "
                "A family has forward(noise) -> Draw, noise_spec and capabilities, and log_prob(z) where it claims "
                "a log density."
            )
        if not isinstance(self.module.noise_spec, NoiseSpec):
            raise ConfigError(
                f"{name}.noise_spec must be a NoiseSpec such as NoiseSpec((2,)), "
                f"got {type(self.module.noise_spec).__name__}."
            )
        try:
            capabilities = frozenset(Capability(c) for c in claimed)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name}.capabilities must be a set of vifamily.types.Capability, got {claimed!r}."
            ) from error
        object.__setattr__(self, "capabilities", capabilities)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> ModuleFamily:
        """Build a family around a copy of the module."""
        self.check_space(latent)
        module = copy.deepcopy(self.module).to(dtype=latent.dtype, device=latent.device)
        return ModuleFamily(latent, module, self.capabilities)


class ModuleFamily(Family):
    """The family around a :class:`GivenModule`.

    Args:
        latent: What is covered.
        module: The module.
        capabilities: What it can do.
    """

    vectorised = False

    def __init__(self, latent: LatentSpec, module: Any, capabilities: frozenset[Capability]) -> None:
        super().__init__(latent)
        self.module = module
        self.capabilities = capabilities
        self.noise_spec = module.noise_spec

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Ask the module for draws, and check what comes back."""
        draw = self.module(noise) if context is None else self.module(noise, context)
        if not isinstance(draw, Draw):
            raise ShapeError(f"{type(self.module).__name__} must return a Draw, got {type(draw).__name__}.")
        leading = draw.log_weight.shape if context is None else (*draw.log_weight.shape, context.shape[0])
        if draw.log_weight.dim() != 1 or tuple(draw.z.shape) != (*leading, self.dim):
            raise ShapeError(
                f"{type(self.module).__name__} must return z of shape {(*leading, self.dim)} for log_weight of shape "
                f"{tuple(draw.log_weight.shape)}, got {tuple(draw.z.shape)}."
            )
        if draw.log_q is not None and tuple(draw.log_q.shape) != tuple(leading):
            raise ShapeError(
                f"{type(self.module).__name__} must return log_q of shape {tuple(leading)}, "
                f"got {tuple(draw.log_q.shape)}."
            )
        return draw

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Ask the module for its log density."""
        if Capability.LOG_Q not in self.capabilities:
            return super().log_density(u, context)
        out: Tensor = self.module.log_prob(u) if context is None else self.module.log_prob(u, context)
        if out.shape != u.shape[:-1]:
            raise ShapeError(
                f"{type(self.module).__name__}.log_prob must return shape {tuple(u.shape[:-1])}, "
                f"got {tuple(out.shape)}."
            )
        return out

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Ask the module for its entropy."""
        if Capability.ENTROPY not in self.capabilities:
            return super().standard_entropy(context)
        out: Tensor = self.module.entropy() if context is None else self.module.entropy(context)
        return out
