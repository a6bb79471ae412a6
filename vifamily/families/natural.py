"""Exponential families whose natural parameters are free, or put out by a network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError
from vifamily.families._base import Family, FamilyEntry, uniform_log_weight
from vifamily.families._nets import check_widths, mlp
from vifamily.numerics.exponential_families import (
    Categorical,
    DiagonalGaussian,
    ExponentialFamily,
    FullGaussian,
    VonMises,
)
from vifamily.numerics.spline_density import SplineDensity
from vifamily.registry import register
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec, Space

__all__ = ["Natural", "NaturalFamily"]

_KINDS = ("diagonal", "full", "von_mises", "categorical", "spline")
_LINKS = ("softplus", "identity")
_BASIC = frozenset(
    {Capability.DRAWS, Capability.LOG_Q, Capability.CHEAP_LOG_Q, Capability.CONDITIONAL, Capability.NATURAL}
)
_GRID = 4001


@register("families", "natural")
@dataclasses.dataclass(frozen=True)
class Natural(FamilyEntry):
    r"""An exponential family in natural parameters, ``log q = log h + eta . T - A(eta)``, for inclusive objectives.

    The raw numbers that the parameters hold, or that a network puts out in the conditional version, become natural
    parameters by a link. In them the inclusive divergence is convex where the link allows (see
    ``family.convex_in_output``), so that a wide network under ``inclusive_kl`` has no local optima to be caught in.

    Kinds: ``diagonal`` normal laws with raw numbers ``(mean times precision, raw precision)``; ``full`` normal laws
    with ``(b, L)``, ``L`` the lower factor of the precision; ``von_mises`` laws of angles, for models on the circle;
    ``categorical`` laws of discrete parameters, with logits against the first category (Bernoulli laws for two).
    ``spline`` densities of independent coordinates of any shape on a fixed basis
    (:class:`~vifamily.numerics.spline_density.SplineDensity`), convex and with as many modes as there are splines for.
    The mathematics is in :mod:`vifamily.numerics.exponential_families`.

    Args:
        kind: One of the kinds above.
        link: From raw numbers to what must be positive: ``softplus``, defined everywhere, or ``identity``, convex on
            its domain and infinite outside. A law of angles needs none.
        hidden: Widths of the network from a context to the raw numbers; empty for a linear map.
        basis: Splines of each coordinate, for ``spline``.
        degree: Their degree.

    Raises:
        ConfigError: If an option is unknown.

    Source: D. McNamara, J. Loper and J. Regier (2024), "Globally convergent variational inference", section 3.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = Natural(kind="full").build(LatentSpec(2), generator=torch.Generator())
        >>> [round(v, 4) for v in family.moments()[1].flatten().tolist()], family.convex_in_output
        ([1.0, 0.0, 0.0, 1.0], False)
    """

    kind: str = "diagonal"
    link: str = "softplus"
    hidden: Sequence[int] = ()
    basis: int = 16
    degree: int = 2
    capabilities = _BASIC | {Capability.REPARAMETERISED}

    def __post_init__(self) -> None:
        """Check the options."""
        for name, value, known in (("kind", self.kind, _KINDS), ("link", self.link, _LINKS)):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r} of a natural family: choose one of {', '.join(known)}.")
        object.__setattr__(self, "hidden", check_widths("hidden", self.hidden))
        if self.kind == "von_mises":
            object.__setattr__(self, "capabilities", _BASIC)
            object.__setattr__(self, "space", Space.CIRCLE)
        if self.kind == "categorical":
            object.__setattr__(self, "capabilities", _BASIC)
            object.__setattr__(self, "space", Space.DISCRETE)
        if self.kind == "spline":
            SplineDensity(1, self.basis, self.degree)
        if self.kind == "diagonal":
            object.__setattr__(self, "restrict_scale", True)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> NaturalFamily:
        """Build the family at the standard normal law, or near the uniform law of angles."""
        self.check_space(latent)
        law: ExponentialFamily
        if self.kind == "von_mises":
            law = VonMises(latent.dim)
        elif self.kind == "categorical":
            if latent.num_categories is None:
                raise ConfigError("a categorical law needs the number of categories of each coordinate.")
            law = Categorical(latent.dim, latent.num_categories)
        elif self.kind == "spline":
            law = SplineDensity(latent.dim, self.basis, self.degree)
        elif self.kind == "full":
            law = FullGaussian(latent.dim, self.link)
        else:
            law = DiagonalGaussian(latent.dim, self.link)
        return NaturalFamily(latent, law, self.hidden, generator)


class NaturalFamily(Family):
    """The module of :class:`Natural`: the raw numbers ``output`` ``(num_outputs,)``.

    Args:
        latent: What is covered.
        law: The exponential family.
        hidden: Widths of the network from a context.
        generator: Randomness of the network.
    """

    def __init__(
        self, latent: LatentSpec, law: ExponentialFamily, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__(latent)
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.law = law
        self.normal = isinstance(law, (DiagonalGaussian, FullGaussian))
        self.capabilities = _BASIC | {Capability.REPARAMETERISED} if latent.space is Space.REAL else _BASIC
        self.noise_spec = NoiseSpec((latent.dim,), "normal" if self.normal else "uniform")
        self.output = nn.Parameter(self._start(**options))
        self.head: nn.Module | None = None
        if latent.context_dim is not None:
            self.head = mlp(latent.context_dim, hidden, law.num_outputs, generator, last_gain=1e-2, **options)

    def _start(self, **options: Any) -> Tensor:
        out = torch.zeros(self.law.num_outputs, **options)
        if self.normal:
            # a precision of one, the inverse of softplus at one
            one = 1.0 if self.convex_in_output else math.log(math.e - 1)
            out[self.dim : 2 * self.dim] = one
        return out

    @property
    def convex_in_output(self) -> bool:
        """Whether minus the log density is convex in the raw numbers that a network puts out."""
        return self.law.convex_in_output

    def raw(self, context: Tensor | None) -> Tensor:
        """Raw numbers, ``(num_outputs,)``, or ``(datum, num_outputs)`` under a context."""
        self.check_context(context)
        if self.head is None:
            return self.output
        out: Tensor = self.output + self.head(context)
        return out

    def standard_statistics(self, z: Tensor) -> Tensor:
        """Sufficient statistics of points in standardised coordinates, ``(..., dim) -> (..., num_natural)``."""
        return self.law.statistics(z if self.latent.space is not Space.REAL else self.to_standard(z))

    def log_units(self) -> Tensor:
        """Log of the size of a standardised unit, by which log densities in ``z`` are lower."""
        return self._log_scale() if self.latent.space is Space.REAL else self.scale.new_zeros(())

    def standard_mean(self, mean: Tensor) -> Tensor:
        """Mean statistics in standardised coordinates, from those of ``z``, ``(..., num_natural)``."""
        if self.latent.space is not Space.REAL:
            return mean
        return self.law.standardised_mean(mean, self.shift, self.scale)

    def natural_parameters(self, context: Tensor | None = None) -> Tensor:
        """Natural parameters in standardised coordinates, ``([datum,] num_natural)``."""
        return self.law.natural(self.raw(context))

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws: normal noise by the factor of the covariance, uniform noise by quantiles of angles."""
        raw = self.raw(context)
        if isinstance(self.law, VonMises):
            u = _angle_quantile(noise, self.law.natural(raw).detach())
        elif isinstance(self.law, SplineDensity):
            u = self.law.quantile(noise, self.law.natural(raw))
        elif isinstance(self.law, Categorical):
            u = _category_quantile(noise, self.law.log_odds(self.law.natural(raw)).detach())
        elif isinstance(self.law, FullGaussian):
            b, lower = self.law.factor(raw)
            solved = torch.linalg.solve_triangular(lower.mT, (b + noise).unsqueeze(-1), upper=True)
            u = solved.squeeze(-1)
        else:
            first, second = self.law.natural(raw).split(self.dim, dim=-1)
            variance = -0.5 / second
            u = first * variance + variance.sqrt() * noise
        log_q = self.log_density(u, context)
        return Draw(u, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates."""
        raw = self.raw(context)
        if isinstance(self.law, FullGaussian):
            # by the factor, which needs no second decomposition
            b, lower = self.law.factor(raw)
            diagonal = lower.diagonal(dim1=-2, dim2=-1)
            square = ((lower.mT @ u.unsqueeze(-1)).squeeze(-1) - b).square().sum(-1)
            inside = (diagonal > 0).all(-1)
            logs = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).log().sum(-1)
            out = logs - 0.5 * square - 0.5 * self.dim * math.log(2 * math.pi)
            return torch.where(inside, out, torch.full_like(out, -math.inf))
        return self.law.log_prob(u, self.law.natural(raw))

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance in standardised coordinates of an unconditional normal law."""
        if not self.normal or self.head is not None:
            return super().standard_moments()
        mean = self.law.mean(self.natural_parameters())
        if isinstance(self.law, FullGaussian):
            first, second = mean.split([self.dim, self.dim**2], dim=-1)
            return first, second.unflatten(-1, (self.dim, self.dim)) - first[:, None] * first
        first, second = mean.split(self.dim, dim=-1)
        return first, torch.diag(second - first.square())

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over the mean and the (marginal) variances of a normal law."""
        if self.latent.space is not Space.REAL:
            super().start_at(mean, scale)
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        covariance = torch.diag(scale.square()) if scale.dim() == 1 else scale @ scale.mT
        if isinstance(self.law, SplineDensity):
            self.output.copy_(self.law.near_normal(mean, covariance.diagonal().sqrt()))
            return
        if not isinstance(self.law, FullGaussian):
            precision = 1 / covariance.diagonal()
            self.output.copy_(torch.cat([mean * precision, self._inverse_link(precision)]))
            return
        lower = torch.linalg.cholesky(torch.linalg.inv(covariance))
        rows, columns = torch.tril_indices(self.dim, self.dim, -1)
        diagonal = self._inverse_link(lower.diagonal())
        self.output.copy_(torch.cat([lower.mT @ mean, diagonal, lower[rows, columns]]))

    def _inverse_link(self, value: Tensor) -> Tensor:
        return value if self.convex_in_output else value + torch.log(-torch.expm1(-value))


def _category_quantile(uniform: Tensor, logits: Tensor) -> Tensor:
    """Categories by the inverse distribution function.

    Args:
        uniform: ``(draw, [datum,] dim)``.
        logits: ``([datum,] dim, categories)``.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    last = logits.isfinite().sum(-1) - 1
    found = (uniform.double().unsqueeze(-1) >= cumulative).sum(-1)
    return torch.minimum(found, last.expand_as(found)).to(uniform)


def _angle_quantile(uniform: Tensor, eta: Tensor) -> Tensor:
    """Angles in ``(-pi, pi]`` whose distribution function, from half a turn before the mode, is ``uniform``.

    Args:
        uniform: ``(draw, [datum,] dim)``.
        eta: ``([datum,] 2 dim)``.
    """
    pairs = eta.unflatten(-1, (-1, 2)).double()
    kappa = pairs.norm(dim=-1)
    centre = torch.atan2(pairs[..., 1], pairs[..., 0])
    # the grid covers what holds the mass: twelve standard deviations, or the whole circle
    half = (12 / kappa.clamp_min(1e-12).sqrt()).clamp_max(math.pi)
    t = torch.linspace(-1, 1, _GRID, dtype=torch.float64, device=eta.device)
    density = torch.exp(kappa.unsqueeze(-1) * (torch.cos(half.unsqueeze(-1) * t) - 1))
    total = torch.cumulative_trapezoid(density, t, dim=-1)
    table = torch.nn.functional.pad(total, (1, 0)) / total[..., -1:]
    moved = uniform.double().movedim(0, -1).contiguous()
    upper = torch.searchsorted(table, moved).clamp(1, _GRID - 1)
    low, high = table.gather(-1, upper - 1), table.gather(-1, upper)
    share = ((moved - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    step = 2.0 / (_GRID - 1)
    position = -1 + step * (upper - 1 + share)
    angle = centre.unsqueeze(-1) + half.unsqueeze(-1) * position
    return (torch.remainder(angle + math.pi, 2 * math.pi) - math.pi).movedim(-1, 0).to(uniform)
