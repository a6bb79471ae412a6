"""A finite set of weighted points, each with an optional Gaussian around it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.families._base import Family, FamilyEntry
from vifamily.families._nets import check_number, check_positive, normal
from vifamily.registry import register
from vifamily.rng import draw_noise
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["Ensemble", "EnsembleFamily"]

_POINTS = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.FINITE, Capability.WEIGHTED})
_CLOUDS = _POINTS | {Capability.LOG_Q, Capability.CHEAP_LOG_Q}
_FREE = _POINTS | {Capability.PARTICLES}


@register("families", "ensemble")
@dataclasses.dataclass(frozen=True)
class Ensemble(FamilyEntry):
    """A finite ensemble of points, ``q = sum_m w_m delta(z - z_m)``, with learned weights.

    Its draws are the ``size`` points themselves, whatever the number of noise rows, with log weights ``log w_m = log
    softmax(logits)``; it uses no noise and has no density. With ``jitter`` it is a mixture of isotropic Gaussians
    around the points: each member then draws once from each of ``n`` rows of noise, giving ``n size`` draws of log
    weight ``log w_m - log n``, with the density of the mixture.

    Args:
        size: Number of members.
        jitter: Initial standard deviation around each member in units of the starting scale, learned per member; None
            for points.

    Raises:
        ConfigError: If ``size`` is not a positive integer or ``jitter`` not a positive number.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = Ensemble(size=5).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        >>> draw = family(torch.zeros(1, 0, dtype=torch.float64))
        >>> tuple(draw.z.shape), draw.log_q is None, round(float(draw.log_weight.detach().exp().sum()), 6)
        ((5, 2), True, 1.0)
    """

    size: int = 8
    jitter: float | None = None
    capabilities = _FREE

    def __post_init__(self) -> None:
        """Check the options; only an ensemble with jitter has a density."""
        check_positive("size", self.size)
        if self.jitter is not None:
            check_number("jitter", self.jitter)
            object.__setattr__(self, "capabilities", _CLOUDS)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> EnsembleFamily:
        """Build the members as draws of the standard normal law."""
        self.check_space(latent)
        return EnsembleFamily(latent, self.size, self.jitter, generator)


class EnsembleFamily(Family):
    """The module of :class:`Ensemble`: ``points`` ``(size, dim)``, ``logits`` ``(size,)``, maybe ``log_jitter``.

    Args:
        latent: What is covered.
        size: Number of members.
        jitter: Initial standard deviation around each member, or None.
        generator: Randomness of the members.
    """

    directions: Tensor

    def __init__(self, latent: LatentSpec, size: int, jitter: float | None, generator: torch.Generator) -> None:
        super().__init__(latent)
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.size, self.jitter = size, jitter
        self.capabilities = _FREE if jitter is None else _CLOUDS
        self.noise_spec = NoiseSpec((0,) if jitter is None else (latent.dim,))
        self.register_buffer(
            "directions", normal((size, latent.dim), generator, dtype=latent.dtype, device=latent.device)
        )
        self.points = nn.Parameter(self.directions.clone())
        self.logits = nn.Parameter(torch.zeros(size, **options))
        if jitter is not None:
            self.log_jitter = nn.Parameter(torch.full((size,), math.log(jitter), **options))

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Return the members, or each member moved by every row of noise."""
        log_weight = self.logits.log_softmax(-1)
        if self.jitter is None:
            return Draw(self.points, None, log_weight)
        num = noise.shape[0]
        u = (self.points + self.log_jitter.exp()[:, None] * noise[:, None, :]).flatten(0, 1)
        return Draw(u, self.log_density(u, None), (log_weight - math.log(num)).repeat(num))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density of the mixture of Gaussians around the members."""
        if self.jitter is None:
            return super().log_density(u, context)
        # the distances are formed by differences: products would lose digits for members far from the origin
        square = ((u[..., None, :] - self.points) / self.log_jitter.exp()[:, None]).square().sum(-1)
        each = -0.5 * square - self.dim * (self.log_jitter + 0.5 * math.log(2 * math.pi))
        return torch.logsumexp(each + self.logits.log_softmax(-1), dim=-1)

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the weighted members in standardised coordinates."""
        weight = self.logits.softmax(-1)
        mean = weight @ self.points
        apart = self.points - mean
        covariance = torch.einsum("k,ki,kj->ij", weight, apart, apart)
        if self.jitter is not None:
            eye = torch.eye(self.dim, dtype=mean.dtype, device=mean.device)
            covariance = covariance + (weight * (2 * self.log_jitter).exp()).sum() * eye
        return mean, covariance

    def fewest_fixed_draws(self) -> int | None:
        """Points use no noise, so that a loss on them is exact on any number of draws."""
        return 1 if self.jitter is None else None

    def particles(self) -> Tensor:
        """Members in standardised coordinates, ``(size, dim)``, for solvers that move them."""
        return self.points.detach().clone()

    @torch.no_grad()
    def set_particles(self, points: Tensor) -> None:
        """Put the members at standardised coordinates ``(size, dim)``, with equal weights."""
        self.points.copy_(points)
        self.logits.zero_()

    @torch.no_grad()
    def sample(self, num_draws: int, *, generator: torch.Generator, context: Tensor | None = None) -> Tensor:
        """Draw members by their weights, each moved by its own jitter."""
        weight = self.logits.softmax(-1).to(generator.device)
        chosen = torch.multinomial(weight, num_draws, replacement=True, generator=generator).to(self.points.device)
        u = self.points[chosen]
        if self.jitter is not None:
            noise = draw_noise(self.noise_spec, (num_draws,), generator, dtype=u.dtype, device=u.device)
            u = u + self.log_jitter.exp()[chosen, None] * noise
        return self.to_latent(u)

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Spread the members as draws of the Gaussian, with equal weights."""
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        spread = self.directions * scale if scale.dim() == 1 else self.directions @ scale.mT.to(self.directions)
        self.points.copy_(mean + spread)
        self.logits.zero_()
        if self.jitter is not None:
            sd = scale if scale.dim() == 1 else scale.square().sum(-1).sqrt()
            self.log_jitter.fill_(math.log(self.jitter) + float(sd.log().mean()))
