"""Mixtures of any reparameterised family, drawn by strata."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, IncompatibleError, ShapeError
from vifamily.families._base import Family, FamilyEntry
from vifamily.families._nets import check_positive, mlp, normal
from vifamily.registry import Spec, build, entry_name, register
from vifamily.rng import draw_noise
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["Mixture", "MixtureFamily"]

_NEEDED = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q})


@register("families", "mixture")
@dataclasses.dataclass(frozen=True)
class Mixture(FamilyEntry):
    """A mixture ``q(z) = sum_k w_k q_k(z)`` of components of one family, each with its own parameters.

    Draws are stratified: every component draws once from each row of noise, so ``n`` rows give ``n components`` draws,
    and draws of component ``k`` have log weight ``log w_k - log n``. Expectations are then differentiable in the
    weights without a score-function term (Morningstar, Vikram, Ham, Gallagher and Dillon, AISTATS 2021), as long as the
    weights are not detached.

    In a conditional version components and weights depend on the context: a mixture density network (Bishop 1994).

    Args:
        components: Number of components.
        of: The family of the components: a spec string, or an entry.

    Raises:
        ConfigError: If ``components`` is not a positive integer, or ``of`` is not a family.
        IncompatibleError: If ``of`` has no reparameterised draws or no density, or its draws already carry weights.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = Mixture(components=3, of="full_rank").build(LatentSpec(2), generator=torch.Generator())
        >>> draw = family(torch.zeros(4, 2, dtype=torch.float64))
        >>> tuple(draw.z.shape), round(float(draw.log_weight.detach().exp().sum()), 6)
        ((12, 2), 1.0)
    """

    components: int = 3
    of: Any = "mean_field"

    def __post_init__(self) -> None:
        """Check the options and build the entry of the components."""
        check_positive("components", self.components)
        inner = build("families", self.of) if isinstance(self.of, (str, Spec)) else self.of
        if not isinstance(inner, FamilyEntry):
            raise ConfigError(f"of must be a family such as 'full_rank' or FullRank(), got {type(self.of).__name__}.")
        lacking = tuple(str(c) for c in sorted(_NEEDED - inner.capabilities))
        if lacking or Capability.WEIGHTED in inner.capabilities:
            reason = f"lacks {', '.join(lacking)}" if lacking else "has draws that carry weights themselves"
            raise IncompatibleError(
                f"a mixture cannot be made of {entry_name(inner)!r}: it {reason}. "
                "Use for example 'mean_field' or 'full_rank'.",
                missing=lacking,
            )
        object.__setattr__(self, "of", inner)
        object.__setattr__(self, "restrict_scale", inner.restrict_scale)
        object.__setattr__(self, "capabilities", _mixture_capabilities(inner.capabilities))

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> MixtureFamily:
        """Build the components, spread over a standard normal law."""
        self.check_space(latent)
        parts = [self.of.build(latent, generator=generator) for _ in range(self.components)]
        return MixtureFamily(latent, parts, generator)

    capabilities = _NEEDED | {Capability.WEIGHTED}


def _mixture_capabilities(inner: frozenset[Capability]) -> frozenset[Capability]:
    return _NEEDED | {Capability.WEIGHTED} | (inner & {Capability.CONDITIONAL, Capability.CHEAP_LOG_Q})


class MixtureFamily(Family):
    """The module of :class:`Mixture`, with ``logits`` ``(components,)`` and one family per component.

    Args:
        latent: What is covered.
        parts: The components.
        generator: Randomness of the directions in which components start apart.
    """

    directions: Tensor

    def __init__(self, latent: LatentSpec, parts: list[Family], generator: torch.Generator) -> None:
        super().__init__(latent)
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.parts = nn.ModuleList(parts)
        self.capabilities = _mixture_capabilities(parts[0].capabilities)
        self.vectorised = all(part.vectorised for part in parts)
        self.noise_spec = NoiseSpec(parts[0].noise_spec.shape, parts[0].noise_spec.law)
        self.logits = nn.Parameter(torch.zeros(len(parts), **options))
        self.weight_head: nn.Module | None = None
        if latent.context_dim is not None:
            # a mixture density network: weights depend on the context as the components do
            self.weight_head = mlp(latent.context_dim, (), len(parts), generator, last_gain=1e-2, **options)
        self.register_buffer("directions", _balanced(normal((len(parts), latent.dim), generator, **options)))
        self.start_at(torch.zeros(latent.dim, **options), torch.ones(latent.dim, **options))

    def fewest_fixed_draws(self) -> int | None:
        """What a component needs, since each sees every draw."""
        return self._families()[0].fewest_fixed_draws()

    def log_component_weight(self, context: Tensor | None = None) -> Tensor:
        """Log weights of the components, ``(components,)``, or ``(datum, components)`` under a context."""
        if self.weight_head is None:
            self.check_context(context)
            return self.logits.log_softmax(-1)
        if context is None:
            raise ShapeError("this mixture is conditional: give a context.")
        logits: Tensor = self.logits + self.weight_head(context)
        return logits.log_softmax(-1)

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map each row of noise through every component; rows come noise by noise, component by component."""
        num = noise.shape[0]
        u = torch.stack([part.transform(noise, context).z for part in self._families()], dim=1).flatten(0, 1)
        each = self.log_component_weight(context) - math.log(num)
        log_weight = each.repeat(num) if context is None else each.mT.repeat(num, 1)
        return Draw(u, self.log_density(u, context), log_weight)

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density of the mixture in standardised coordinates."""
        each = torch.stack([part.log_density(u, context) for part in self._families()], dim=-1)
        return torch.logsumexp(each + self.log_component_weight(context), dim=-1)

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance in standardised coordinates, where the components have theirs."""
        means, covariances = zip(*(part.standard_moments() for part in self._families()), strict=True)
        weight = self.log_component_weight().exp()
        mean = weight @ torch.stack(means)
        apart = torch.stack(means) - mean
        within = torch.einsum("k,kij->ij", weight, torch.stack(covariances))
        return mean, within + torch.einsum("k,ki,kj->ij", weight, apart, apart)

    @torch.no_grad()
    def sample(self, num_draws: int, *, generator: torch.Generator, context: Tensor | None = None) -> Tensor:
        """Draw ``num_draws`` independent points: a component by its weight, then a draw of it."""
        leading = (num_draws,) if context is None else (num_draws, context.shape[0])
        noise = draw_noise(self.noise_spec, leading, generator, dtype=self.latent.dtype, device=self.latent.device)
        weight = self.log_component_weight(context).exp().to(generator.device)
        chosen = torch.multinomial(weight, num_draws, replacement=True, generator=generator).to(noise.device)
        z: Tensor = self(noise, context).z.unflatten(0, (num_draws, len(self.parts)))
        if context is None:
            return z[torch.arange(num_draws, device=z.device), chosen]
        place = chosen.mT[:, None, :, None].expand(-1, 1, -1, self.dim)
        return z.gather(1, place).squeeze(1)

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over the mean and the marginal variances: half within components, half between them.

        Components start at offsets of about one standard deviation in directions that were drawn when the family was
        built.
        """
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        self.logits.zero_()
        between = math.sqrt(0.5) if len(self.parts) > 1 else 0.0
        offsets = self.directions * between
        offsets = offsets * scale if scale.dim() == 1 else offsets @ scale.mT.to(offsets)
        if scale.dim() == 2:
            # the factor mixes coordinates that were balanced one by one: restore the marginal variances
            wanted = between * scale.square().sum(-1).sqrt()
            offsets = offsets * (wanted / offsets.square().mean(0).sqrt().clamp_min(1e-12))
        for part, offset in zip(self._families(), offsets, strict=True):
            part.start_at(mean + offset, scale * math.sqrt(1 - between**2))

    def _families(self) -> list[Family]:
        return list(self.parts)  # type: ignore[arg-type]


def _balanced(directions: Tensor) -> Tensor:
    """Centre directions ``(components, dim)`` and give every coordinate a mean square of one."""
    centred = directions - directions.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp_min(1e-12)
