"""What Gaussian and Student-t families share: the law of the radius, parameters that may depend on a context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.families._base import Family, FamilyEntry
from vifamily.families._nets import check_widths, mlp
from vifamily.types import Capability, LatentSpec

__all__ = ["EllipticalEntry", "EllipticalFamily", "Radial"]

_BASIC = frozenset(
    {
        Capability.DRAWS,
        Capability.REPARAMETERISED,
        Capability.LOG_Q,
        Capability.CHEAP_LOG_Q,
        Capability.ENTROPY,
        Capability.CONDITIONAL,
    }
)


@dataclasses.dataclass(frozen=True)
class Radial:
    """A spherical law in ``p`` dimensions with identity scale matrix: standard normal, or Student-t.

    The Student-t draw is ``e sqrt(df / c)`` with ``e`` standard normal and ``c`` chi-square, the sum of squares of
    ``df`` further standard normals, so that all base noise is standard normal. Its density is ``Gamma((df + p) / 2) /
    (Gamma(df / 2) (df pi)^(p / 2)) (1 + |x|^2 / df)^(-(df + p) / 2)``.

    Attributes:
        df: Degrees of freedom, or None for the normal law.
    """

    df: int | None = None

    @property
    def extra(self) -> int:
        """Further standard normals needed for one radius."""
        return self.df or 0

    @property
    def variance(self) -> float:
        """Variance of one coordinate."""
        return 1.0 if self.df is None else self.df / (self.df - 2)

    def stretch(self, extra: Tensor) -> Tensor:
        """Map the further normals ``(..., df)`` to ``sqrt(df / chi-square)``, ``(...)``."""
        return math.sqrt(self.df or 1) / extra.square().sum(-1).sqrt()

    def log_density(self, square: Tensor, p: int) -> Tensor:
        """Log density at points of squared norm ``square`` in ``p`` dimensions."""
        if self.df is None:
            return -0.5 * square - 0.5 * p * math.log(2 * math.pi)
        half = 0.5 * (self.df + p)
        constant = math.lgamma(half) - math.lgamma(0.5 * self.df) - 0.5 * p * math.log(self.df * math.pi)
        return constant - half * torch.log1p(square / self.df)

    def entropy(self, p: int) -> float:
        """Entropy in ``p`` dimensions."""
        if self.df is None:
            return 0.5 * p * (1 + math.log(2 * math.pi))
        half = 0.5 * (self.df + p)
        constant = math.lgamma(half) - math.lgamma(0.5 * self.df) - 0.5 * p * math.log(self.df * math.pi)
        arguments = torch.tensor([half, 0.5 * self.df], dtype=torch.float64)
        upper, lower = torch.digamma(arguments).tolist()
        return float(half * (upper - lower) - constant)


class EllipticalEntry(FamilyEntry):
    """Checks and capabilities of the Gaussian entries; ``student_t`` and ``hidden`` are fields of the subclasses."""

    capabilities = _BASIC | {Capability.GAUSSIAN}
    student_t: int | None
    hidden: Sequence[int]

    def __post_init__(self) -> None:
        """Check the options; a Student-t entry does not claim to be Gaussian."""
        df: Any = self.student_t
        if df is not None:
            if isinstance(df, bool) or not isinstance(df, int) or df <= 2:
                raise ConfigError(
                    f"student_t must be an integer of degrees of freedom above 2 (for a finite variance), got {df!r}."
                )
            object.__setattr__(self, "capabilities", _BASIC)
        object.__setattr__(self, "hidden", check_widths("hidden", self.hidden))


class EllipticalFamily(Family):
    """A family with free parameters, to which a function of the context adds in a conditional version.

    Subclasses name their parameters in ``shapes`` and start them in ``start_at``.

    Args:
        latent: What is covered.
        radial: Normal or Student-t.
        shapes: Names and shapes of the parameters.
    """

    head: nn.Module | None
    """Maps a context ``(datum, context_dim)`` to what is added to the flattened parameters, ``(datum, numbers)``."""

    def __init__(self, latent: LatentSpec, radial: Radial, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(latent)
        self.radial = radial
        self.shapes = shapes
        self.head = None
        self.capabilities = _BASIC if radial.df is not None else _BASIC | {Capability.GAUSSIAN}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=latent.dtype, device=latent.device)))

    @property
    def num_values(self) -> int:
        """Numbers that describe one distribution of the family."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def add_head(self, hidden: Sequence[int], generator: torch.Generator) -> None:
        """Make the parameters depend on a context, through a linear map or a perceptron that starts near zero."""
        if self.latent.context_dim is not None:
            options: dict[str, Any] = {"dtype": self.latent.dtype, "device": self.latent.device}
            self.head = mlp(self.latent.context_dim, hidden, self.num_values, generator, last_gain=1e-2, **options)

    def values(self, context: Tensor | None) -> list[Tensor]:
        """Return the parameters, ``shape`` each, or ``(datum, *shape)`` under a context."""
        free = [getattr(self, name) for name in self.shapes]
        if self.head is None:
            self.check_context(context)
            return free
        if context is None:
            raise ShapeError(f"{type(self).__name__} is conditional: give a context.")
        added = self.head(context).split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        return [f + a.reshape(a.shape[0], *f.shape) for f, a in zip(free, added, strict=True)]

    def unconditional_values(self) -> list[Tensor]:
        """Return the parameters of an unconditional family, for moments."""
        if self.head is not None:
            raise NotAvailableError("the moments of a conditional family depend on the context: draw from it instead.")
        return self.values(None)

    def fewest_fixed_draws(self) -> int | None:
        """One pair is enough where every coordinate has a scale and noise of its own; none for a network."""
        return 2 if self.head is None else None

    def standard_marginals(self) -> tuple[Tensor, Tensor]:
        """Means and variances ``(dim,)`` in standardised coordinates; overridden where they need no covariance."""
        mean, covariance = self.standard_moments()
        return mean, covariance.diagonal()

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Means and variances ``(dim,)`` of each coordinate of ``z``, without a covariance where that is possible."""
        if self.scale.dim() != 1:
            return super().marginals()
        mean, variance = self.standard_marginals()
        return self.to_latent(mean), self.scale.square() * variance

    def marginal_sd(self, scale: Tensor) -> Tensor:
        """Standard deviations ``(dim,)`` belonging to the second argument of ``start_at``."""
        return scale if scale.dim() == 1 else scale.square().sum(-1).sqrt()
