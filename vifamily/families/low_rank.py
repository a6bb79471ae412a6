"""The Gaussian with a diagonal plus low-rank covariance, or the Student-t with such a scale matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.families._base import uniform_log_weight
from vifamily.families._elliptical import EllipticalEntry, EllipticalFamily, Radial
from vifamily.families._nets import check_positive, normal
from vifamily.registry import register
from vifamily.types import Draw, LatentSpec, NoiseSpec

__all__ = ["LowRank", "LowRankFamily"]

_FACTOR_NORM = 0.3
_FACTOR_STEPS = 30
_MOST_PAIRS = 256


@register("families", "low_rank")
@dataclasses.dataclass(frozen=True)
class LowRank(EllipticalEntry):
    """A normal law with covariance ``D (I + W W^T) D``, ``D`` diagonal and ``W`` of ``rank`` columns.

    The density uses the Woodbury identity and the matrix determinant lemma on the ``rank x rank`` matrix ``I + W^T W``,
    so a draw and its log density cost ``O(dim rank + rank^3)``. ``W`` starts away from zero, where its gradient would
    vanish. With ``student_t=df`` the law is the multivariate Student-t with that scale matrix, one radius for all
    coordinates.

    Args:
        rank: Columns of the factor, at most the dimension.
        student_t: Degrees of freedom, an integer above 2, or None for the normal law.
        hidden: Widths of the network from a context to the parameters in the conditional version; empty for a linear
            map.

    Raises:
        ConfigError: If ``rank`` is not a positive integer, or ``student_t`` not an integer above 2; on building, if
            ``rank`` exceeds the dimension.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = LowRank(rank=1).build(LatentSpec(3), generator=torch.Generator().manual_seed(0))
        >>> family.noise_spec.shape, tuple(family.factor.shape)
        ((4,), (3, 1))
    """

    rank: int = 2
    student_t: int | None = None
    hidden: Sequence[int] = ()
    restrict_scale = True

    def __post_init__(self) -> None:
        """Check the rank and the shared options."""
        check_positive("rank", self.rank)
        super().__post_init__()

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> LowRankFamily:
        """Build the family at unit marginal scales with a small random factor."""
        self.check_space(latent)
        if self.rank > latent.dim:
            raise ConfigError(
                f"rank={self.rank} exceeds the {latent.dim} latent coordinates: use a smaller rank, or 'full_rank'."
            )
        family = LowRankFamily(latent, Radial(self.student_t), self.rank, generator)
        family.add_head(self.hidden, generator)
        return family


class LowRankFamily(EllipticalFamily):
    """The module of :class:`LowRank`: ``loc``, ``log_diagonal`` ``(dim,)`` and ``factor`` ``(dim, rank)``.

    Args:
        latent: What is covered.
        radial: Normal or Student-t.
        rank: Columns of the factor.
        generator: Randomness of the initial factor.
    """

    loc: Tensor
    log_diagonal: Tensor
    factor: Tensor

    def __init__(self, latent: LatentSpec, radial: Radial, rank: int, generator: torch.Generator) -> None:
        dim = latent.dim
        super().__init__(latent, radial, {"loc": (dim,), "log_diagonal": (dim,), "factor": (dim, rank)})
        self.rank = rank
        self.noise_spec = NoiseSpec((dim + rank + radial.extra,))
        std = _FACTOR_NORM / math.sqrt(dim)
        with torch.no_grad():
            self.factor.copy_(normal((dim, rank), generator, std=std, dtype=latent.dtype, device=latent.device))
        self.start_at(torch.zeros_like(self.loc), torch.ones_like(self.loc))

    def fewest_fixed_draws(self) -> int | None:
        """More pairs than coordinates, or 256 where that is less.

        On fewer pairs than columns, a column and the diagonal cancel at every draw and grow at no cost. On not many
        more the optimum is bounded, but so far from that of the expectation that a descent does not come back from it.
        """
        pairs = max(min(self.dim, _MOST_PAIRS), self.rank + 1)
        return 2 * pairs + 2 if self.head is None else None

    def _inner(self, factor: Tensor) -> Tensor:
        """Cholesky factor of ``I + W^T W``."""
        eye = torch.eye(self.rank, dtype=factor.dtype, device=factor.device)
        inner: Tensor = torch.linalg.cholesky(eye + factor.mT @ factor)
        return inner

    def _log_density(self, r: Tensor, log_diagonal: Tensor, factor: Tensor) -> Tensor:
        """Log density where ``r = D^-1 (u - loc)``."""
        inner = self._inner(factor)
        half_log_det = log_diagonal.sum(-1) + inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        projected = r @ factor if factor.dim() == 2 else torch.einsum("nik,...ni->...nk", factor, r)
        if factor.dim() == 2:
            flat = projected.reshape(-1, self.rank).mT
            removed = torch.linalg.solve_triangular(inner, flat, upper=False).square().sum(-2)
        else:
            flat = projected.reshape(-1, *projected.shape[-2:]).permute(1, 2, 0)
            removed = torch.linalg.solve_triangular(inner, flat, upper=False).square().sum(-2).mT
        square = r.square().sum(-1) - removed.reshape(projected.shape[:-1])
        return self.radial.log_density(square, self.dim) - half_log_det

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws, ``u = loc + D (e + W f)``."""
        loc, log_diagonal, factor = self.values(context)
        own, shared = noise[..., : self.dim], noise[..., self.dim : self.dim + self.rank]
        mixed = shared @ factor.mT if factor.dim() == 2 else torch.einsum("nik,...nk->...ni", factor, shared)
        r = own + mixed
        if self.radial.df is not None:
            r = r * self.radial.stretch(noise[..., self.dim + self.rank :])[..., None]
        log_q = self._log_density(r, log_diagonal, factor)
        return Draw(loc + log_diagonal.exp() * r, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates."""
        loc, log_diagonal, factor = self.values(context)
        return self._log_density((u - loc) * (-log_diagonal).exp(), log_diagonal, factor)

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Entropy, ``log |D| + log |I + W^T W| / 2`` plus that of the standard law."""
        _, log_diagonal, factor = self.values(context)
        half_log_det = log_diagonal.sum(-1) + self._inner(factor).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return half_log_det + self.radial.entropy(self.dim)

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance in standardised coordinates."""
        loc, log_diagonal, factor = self.unconditional_values()
        diagonal = log_diagonal.exp()
        wide = diagonal[:, None] * factor
        return loc, self.radial.variance * (torch.diag(diagonal.square()) + wide @ wide.mT)

    def standard_marginals(self) -> tuple[Tensor, Tensor]:
        """Means and variances in standardised coordinates."""
        loc, log_diagonal, factor = self.unconditional_values()
        return loc, self.radial.variance * (2 * log_diagonal).exp() * (1 + factor.square().sum(-1))

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over the mean and the marginal variances exactly, and the correlations as far as the rank allows.

        Correlations are fitted by iterated principal factors; columns that are not needed keep a small random part, so
        that their gradient is not zero.
        """
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        sd = self.marginal_sd(scale)
        self.loc.copy_(mean)
        factor = self.factor * (_FACTOR_NORM / self.factor.square().sum(0).sqrt().clamp_min(1e-12))
        if scale.dim() == 2 and self.dim > 1:
            factor = factor + self._principal_factors((scale @ scale.mT / (sd[:, None] * sd)).to(factor))
        self.factor.copy_(factor)
        ratio = (1 + factor.square().sum(-1)) * self.radial.variance
        self.log_diagonal.copy_(sd.to(ratio).log() - 0.5 * ratio.log())

    def _principal_factors(self, correlation: Tensor) -> Tensor:
        """Fit ``correlation = Psi + F F^T`` and return ``Psi^(-1/2) F``."""
        eye = torch.eye(self.dim, dtype=correlation.dtype, device=correlation.device)
        own = 1 / torch.linalg.inv(correlation + 1e-9 * eye).diagonal()
        loading = torch.zeros_like(correlation[:, : self.rank])
        for _ in range(_FACTOR_STEPS):
            own = own.clamp(1e-6, 1.0)
            values, vectors = torch.linalg.eigh(correlation - torch.diag(own))
            loading = vectors[:, -self.rank :] * values[-self.rank :].clamp_min(0).sqrt()
            own = 1 - loading.square().sum(-1)
        own = own.clamp(1e-6, 1.0)
        out: Tensor = loading / own.sqrt()[:, None]
        return out
