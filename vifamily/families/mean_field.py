"""The factorised Gaussian, or a product of independent Student-t laws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vifamily.families._base import uniform_log_weight
from vifamily.families._elliptical import EllipticalEntry, EllipticalFamily, Radial
from vifamily.registry import register
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["MeanField", "MeanFieldFamily"]


@register("families", "mean_field")
@dataclasses.dataclass(frozen=True)
class MeanField(EllipticalEntry):
    """Independent normal coordinates, ``q(z) = prod_i N(z_i; loc_i, scale_i^2)``.

    With ``student_t=df`` each coordinate has a Student-t law of its own radius, ``q(z) = prod_i t_df(z_i; loc_i,
    scale_i)``: the coordinates stay independent, which a multivariate t with a shared radius would not be.

    Args:
        student_t: Degrees of freedom, an integer above 2, or None for the normal law.
        hidden: Widths of the network from a context to the parameters in the conditional version; empty for a linear
            map.

    Raises:
        ConfigError: If ``student_t`` is not an integer above 2.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> generator = torch.Generator().manual_seed(0)
        >>> family = MeanField().build(LatentSpec(2), generator=generator)
        >>> family.start_at(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]))
        >>> mean, covariance = family.moments()
        >>> mean.tolist(), [round(v, 6) for v in covariance.diagonal().tolist()]
        ([1.0, 2.0], [0.25, 9.0])
    """

    capabilities = EllipticalEntry.capabilities | {Capability.FACTORISED_GAUSSIAN}
    student_t: int | None = None
    hidden: Sequence[int] = ()
    restrict_scale = True

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> MeanFieldFamily:
        """Build the family at the standard normal (or t) law."""
        self.check_space(latent)
        family = MeanFieldFamily(latent, Radial(self.student_t))
        family.add_head(self.hidden, generator)
        return family


class MeanFieldFamily(EllipticalFamily):
    """The module of :class:`MeanField`, with parameters ``loc`` and ``log_scale``, ``(dim,)`` each.

    Args:
        latent: What is covered.
        radial: Normal or Student-t.
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, latent: LatentSpec, radial: Radial) -> None:
        super().__init__(latent, radial, {"loc": (latent.dim,), "log_scale": (latent.dim,)})
        self.noise_spec = NoiseSpec((latent.dim * (1 + radial.extra),))
        if radial.df is None:
            self.capabilities = self.capabilities | {Capability.FACTORISED_GAUSSIAN}

    def inverse_curvature(self) -> dict[str, float | Tensor] | None:
        """The means depend on one another as the posterior's do; in log sds the bound's curvature is 2."""
        if self.head is not None:
            return None
        return {"loc": 1.0 if self.guessed_covariance is None else self.guessed_covariance, "log_scale": 0.5}

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws, ``u = loc + scale e``."""
        loc, log_scale = self.values(context)
        base = noise[..., : self.dim]
        if self.radial.df is not None:
            base = base * self.radial.stretch(noise[..., self.dim :].unflatten(-1, (self.dim, self.radial.df)))
        log_q = self.radial.log_density(base.square(), 1).sum(-1) - log_scale.sum(-1)
        return Draw(loc + log_scale.exp() * base, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates."""
        loc, log_scale = self.values(context)
        base = (u - loc) * (-log_scale).exp()
        return self.radial.log_density(base.square(), 1).sum(-1) - log_scale.sum(-1)

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Entropy, ``sum_i log scale_i`` plus that of the standard law."""
        _, log_scale = self.values(context)
        return log_scale.sum(-1) + self.dim * self.radial.entropy(1)

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance in standardised coordinates."""
        loc, variance = self.standard_marginals()
        return loc, torch.diag(variance)

    def standard_marginals(self) -> tuple[Tensor, Tensor]:
        """Means and variances in standardised coordinates."""
        loc, log_scale = self.unconditional_values()
        return loc, (2 * log_scale).exp() * self.radial.variance

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over the mean and the marginal standard deviations."""
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        self.loc.copy_(mean)
        self.log_scale.copy_(self.marginal_sd(scale).log() - 0.5 * math.log(self.radial.variance))
