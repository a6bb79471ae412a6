"""The Gaussian with a full covariance, or the multivariate Student-t."""

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

__all__ = ["FullRank", "FullRankFamily", "strict_lower", "whiten"]


@register("families", "full_rank")
@dataclasses.dataclass(frozen=True)
class FullRank(EllipticalEntry):
    """A normal law with any covariance, ``N(z; loc, L L^T)``, ``L = diag(exp(log_diagonal)) (I + strictly lower)``.

    Rows of the factor share the scale of their coordinate, so a change of units of a coordinate changes one number.
    With ``student_t=df`` the law is the multivariate Student-t with scale matrix ``L L^T``: one radius for all
    coordinates, so any affine map of it is again of the family.

    Args:
        student_t: Degrees of freedom, an integer above 2, or None for the normal law.
        hidden: Widths of the network from a context to the parameters in the conditional version; empty for a linear
            map.

    Raises:
        ConfigError: If ``student_t`` is not an integer above 2.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = FullRank().build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        >>> family.start_at(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
        >>> [[round(v, 6) for v in row] for row in family.moments()[1].tolist()]
        [[1.0, 0.5], [0.5, 4.25]]
    """

    capabilities = EllipticalEntry.capabilities | {Capability.FULL_GAUSSIAN}
    student_t: int | None = None
    hidden: Sequence[int] = ()

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> FullRankFamily:
        """Build the family at the standard normal (or t) law."""
        self.check_space(latent)
        family = FullRankFamily(latent, Radial(self.student_t))
        family.add_head(self.hidden, generator)
        return family


def strict_lower(values: Tensor, position: Tensor) -> Tensor:
    """Arrange ``(..., dim (dim - 1) / 2)`` numbers as strictly lower triangular matrices.

    Args:
        values: The numbers, row by row.
        position: ``(dim, dim)``, the place of each entry in ``values``, or its length for entries that are zero.
    """
    padded = torch.nn.functional.pad(values, (0, 1))
    return padded[..., position]


def whiten(lower: Tensor, r: Tensor) -> Tensor:
    """Solve ``(I + lower) x = r`` for ``r`` ``(..., [datum,] dim)``, ``lower`` ``([datum,] dim, dim)``."""
    # the diagonal of `lower` is taken to be one and never read
    if lower.dim() == 2:
        flat = r.reshape(-1, r.shape[-1])
        solved: Tensor = torch.linalg.solve_triangular(lower, flat.mT, upper=False, unitriangular=True)
        return solved.mT.reshape(r.shape)
    flat = r.expand(*r.shape[:-2], lower.shape[0], r.shape[-1]).reshape(-1, lower.shape[0], r.shape[-1])
    solved = torch.linalg.solve_triangular(lower, flat.permute(1, 2, 0), upper=False, unitriangular=True)
    return solved.permute(2, 0, 1).reshape(*r.shape[:-2], lower.shape[0], r.shape[-1])


class FullRankFamily(EllipticalFamily):
    """The module of :class:`FullRank`: ``loc``, ``log_diagonal`` ``(dim,)`` and ``lower`` ``(dim (dim - 1) / 2,)``.

    Args:
        latent: What is covered.
        radial: Normal or Student-t.
    """

    loc: Tensor
    log_diagonal: Tensor
    lower: Tensor
    position: Tensor

    def __init__(self, latent: LatentSpec, radial: Radial) -> None:
        dim = latent.dim
        size = dim * (dim - 1) // 2
        super().__init__(latent, radial, {"loc": (dim,), "log_diagonal": (dim,), "lower": (size,)})
        self.noise_spec = NoiseSpec((dim + radial.extra,))
        if radial.df is None:
            self.capabilities = self.capabilities | {Capability.FULL_GAUSSIAN}
        rows, columns = torch.tril_indices(dim, dim, -1)
        position = torch.full((dim, dim), size, dtype=torch.long)
        position[rows, columns] = torch.arange(size)
        self.register_buffer("position", position.to(latent.device), persistent=False)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_diagonal, lower = self.values(context)
        return loc, log_diagonal, strict_lower(lower, self.position)

    def fewest_fixed_draws(self) -> int | None:
        """More pairs than coordinates: on fewer, a row of the factor grows at no cost along what no draw shows."""
        return 2 * self.dim + 2 if self.head is None else None

    def inverse_curvature(self) -> dict[str, float | Tensor] | None:
        """In whitened coordinates all is independent; in the log diagonal the bound's curvature is 2."""
        return None if self.head is not None else {"loc": 1.0, "log_diagonal": 0.5, "lower": 1.0}

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws, ``u = loc + L e``."""
        loc, log_diagonal, lower = self._parts(context)
        base = noise[..., : self.dim]
        if self.radial.df is not None:
            base = base * self.radial.stretch(noise[..., self.dim :])[..., None]
        mixed = base @ lower.mT if lower.dim() == 2 else torch.einsum("nij,...nj->...ni", lower, base)
        log_q = self.radial.log_density(base.square().sum(-1), self.dim) - log_diagonal.sum(-1)
        return Draw(loc + log_diagonal.exp() * (base + mixed), log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates."""
        loc, log_diagonal, lower = self._parts(context)
        base = whiten(lower, (u - loc) * (-log_diagonal).exp())
        return self.radial.log_density(base.square().sum(-1), self.dim) - log_diagonal.sum(-1)

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Entropy, ``log |L|`` plus that of the standard law."""
        return self.values(context)[1].sum(-1) + self.radial.entropy(self.dim)

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance in standardised coordinates."""
        loc, log_diagonal, lower = self.unconditional_values()
        eye = torch.eye(self.dim, dtype=loc.dtype, device=loc.device)
        factor = log_diagonal.exp()[:, None] * (strict_lower(lower, self.position) + eye)
        return loc, self.radial.variance * factor @ factor.mT

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over the mean and the covariance."""
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        diagonal = scale if scale.dim() == 1 else scale.diagonal()
        self.loc.copy_(mean)
        self.log_diagonal.copy_(diagonal.abs().log() - 0.5 * math.log(self.radial.variance))
        self.lower.zero_()
        if scale.dim() == 2:
            # a factor with negative diagonal entries has the same covariance as one with those columns flipped
            unit = scale * diagonal.sign() / diagonal.abs()[:, None]
            rows, columns = torch.tril_indices(self.dim, self.dim, -1)
            self.lower.copy_(unit[rows, columns])
