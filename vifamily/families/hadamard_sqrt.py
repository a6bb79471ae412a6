"""The Gaussian whose covariance has a Walsh-Hadamard square root: full rank at the price of a few diagonals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.families._base import uniform_log_weight
from vifamily.families._elliptical import EllipticalEntry, EllipticalFamily, Radial
from vifamily.numerics.hadamard import dyadic_convolution, split_powers_of_two
from vifamily.registry import register
from vifamily.types import Draw, LatentSpec, NoiseSpec

__all__ = ["HadamardSqrt", "HadamardSqrtFamily"]

_LARGEST_FITTED = 1024
"""Coordinates up to which a start takes correlations over: above, a dense covariance is too dear."""
_FIT_STEPS = 300


def hadamard(x: Tensor) -> Tensor:
    """Transform the last axis, by the compiled kernel where it was asked for."""
    # naming its operation to torch takes a tenth of a second, which no fit with another family should wait for
    from vifamily.numerics.hadamard_kernel import hadamard as transform

    return transform(x)


@register("families", "hadamard_sqrt")
@dataclasses.dataclass(frozen=True)
class HadamardSqrt(EllipticalEntry):
    r"""A normal law of full rank whose square root is a product of diagonals and Walsh-Hadamard transforms.

    .. math:: z = m + L e, \qquad L = S \bar H T \bar H U, \qquad e \sim N(0, I),

    with positive diagonals S, T and U and the orthonormal transform :math:`\bar H`. A draw, its log density, the
    entropy (the sum of the logs of the three diagonals) and the marginal variances cost a few transforms each,
    :math:`O(P \log P)` for P coordinates, and the covariance has 3 P parameters. With T = 1 it is mean field, which it
    thus contains. The inner product :math:`\bar H T \bar H` has the entry :math:`\gamma_{i \oplus j}` with
    :math:`\gamma = P^{-1/2} \bar H t`: correlations follow the exclusive or of the indices, not what is near what, so
    a posterior with a few strong correlations may suit ``low_rank`` better.

    A number of coordinates that is no power of two is cut into blocks that are, its binary expansion; blocks are
    independent of each other. T and U have geometric mean one in each block: their scale is that of S.

    Args:
        block: Largest block, a power of two; None for no bound. Smaller blocks keep correlations local and cost less.
        student_t: Degrees of freedom, an integer above 2, or None for the normal law.
        hidden: Widths of the network from a context to the parameters in the conditional version; empty for a linear
            map.

    Raises:
        ConfigError: If ``block`` is no power of two, or ``student_t`` not an integer above 2.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = HadamardSqrt().build(LatentSpec(6), generator=torch.Generator().manual_seed(0))
        >>> family.blocks, sum(p.numel() for p in family.parameters())
        ((4, 2), 24)
    """

    block: int | None = None
    student_t: int | None = None
    hidden: Sequence[int] = ()
    restrict_scale = True

    def __post_init__(self) -> None:
        """Check the block and the shared options."""
        block = self.block
        whole = isinstance(block, int) and not isinstance(block, bool)
        if block is not None and (not whole or block < 1 or block & (block - 1)):
            raise ConfigError(f"block must be a power of two or None, got {block!r}.")
        super().__post_init__()

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> HadamardSqrtFamily:
        """Build the family at the standard law."""
        self.check_space(latent)
        family = HadamardSqrtFamily(latent, Radial(self.student_t), split_powers_of_two(latent.dim, self.block))
        family.add_head(self.hidden, generator)
        return family


class HadamardSqrtFamily(EllipticalFamily):
    """The module of :class:`HadamardSqrt`: ``loc``, ``log_outer``, ``log_middle`` and ``log_inner``, each ``(dim,)``.

    Args:
        latent: What is covered.
        radial: Normal or Student-t.
        blocks: Sizes of the blocks, powers of two that add up to the dimension.
    """

    loc: Tensor
    log_outer: Tensor
    log_middle: Tensor
    log_inner: Tensor

    def __init__(self, latent: LatentSpec, radial: Radial, blocks: tuple[int, ...]) -> None:
        dim = latent.dim
        names = ("loc", "log_outer", "log_middle", "log_inner")
        super().__init__(latent, radial, dict.fromkeys(names, (dim,)))
        self.blocks = blocks
        # neighbours of one size are transformed together
        self._runs = [(size, len(list(group))) for size, group in itertools.groupby(blocks)]
        self.noise_spec = NoiseSpec((dim + radial.extra,))
        self.start_at(torch.zeros_like(self.loc), torch.ones_like(self.loc))

    def fewest_fixed_draws(self) -> int | None:
        """More pairs than a block has coordinates: on fewer, a row of the factor grows along what no draw shows."""
        return 2 * self.blocks[0] + 2 if self.head is None else None

    def inverse_curvature(self) -> dict[str, float | Tensor] | None:
        """As of a mean field, of which the log scale has curvature 2."""
        if self.head is not None:
            return None
        return {"loc": 1.0, "log_outer": 0.5, "log_middle": 0.5, "log_inner": 0.5}

    # -- block by block ------------------------------------------------------------------------------------------------
    def _cut(self, x: Tensor) -> list[Tensor]:
        """Cut the last axis into ``(..., blocks of one size, size)``."""
        parts = x.split([size * count for size, count in self._runs], dim=-1)
        return [part.unflatten(-1, (count, size)) for part, (size, count) in zip(parts, self._runs, strict=True)]

    def _transform(self, x: Tensor) -> Tensor:
        return torch.cat([hadamard(part).flatten(-2) for part in self._cut(x)], dim=-1)

    def _centred(self, log_diagonal: Tensor) -> Tensor:
        parts = [(part - part.mean(-1, keepdim=True)).flatten(-2) for part in self._cut(log_diagonal)]
        return torch.cat(parts, dim=-1)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Location and the logs of S, T and U; those of T and U have mean zero in each block."""
        loc, log_outer, log_middle, log_inner = self.values(context)
        return loc, log_outer, self._centred(log_middle), self._centred(log_inner)

    def _mixed(self, x: Tensor, log_middle: Tensor) -> Tensor:
        """``H T H x``."""
        return self._transform(log_middle.exp() * self._transform(x))

    def _variances(self, log_outer: Tensor, log_middle: Tensor, log_inner: Tensor) -> Tensor:
        r"""Diagonal of ``L L^T``, :math:`s^2 (\gamma^2 \circledast u^2)`, in a few transforms."""
        pairs = zip(self._cut(log_middle.exp()), self._cut((2 * log_inner).exp()), strict=True)
        parts = [dyadic_convolution(hadamard(t).square() / t.shape[-1], u2).flatten(-2) for t, u2 in pairs]
        return (2 * log_outer).exp() * torch.cat(parts, dim=-1)

    # -- the law -------------------------------------------------------------------------------------------------------
    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws, ``u = loc + S H T H U e``."""
        loc, log_outer, log_middle, log_inner = self._parts(context)
        base = noise[..., : self.dim]
        if self.radial.df is not None:
            base = base * self.radial.stretch(noise[..., self.dim :])[..., None]
        u = loc + log_outer.exp() * self._mixed(log_inner.exp() * base, log_middle)
        log_q = self.radial.log_density(base.square().sum(-1), self.dim) - log_outer.sum(-1)
        return Draw(u, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates, through ``e = U^-1 H T^-1 H S^-1 (u - loc)``."""
        loc, log_outer, log_middle, log_inner = self._parts(context)
        base = (-log_inner).exp() * self._mixed((u - loc) * (-log_outer).exp(), -log_middle)
        return self.radial.log_density(base.square().sum(-1), self.dim) - log_outer.sum(-1)

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Entropy, ``log |S|`` plus that of the standard law; ``log |T|`` and ``log |U|`` are zero."""
        return self.values(context)[1].sum(-1) + self.radial.entropy(self.dim)

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance in standardised coordinates; the covariance is dense, ``O(dim^2 log dim)``."""
        self.unconditional_values()
        loc, log_outer, log_middle, log_inner = self._parts(None)
        factor = self._dense(log_outer, log_middle, log_inner)
        return loc, self.radial.variance * factor @ factor.mT

    def standard_marginals(self) -> tuple[Tensor, Tensor]:
        """Means and variances in standardised coordinates, in ``O(dim log dim)``."""
        self.unconditional_values()
        loc, *logs = self._parts(None)
        return loc, self.radial.variance * self._variances(*logs)

    def _dense(self, log_outer: Tensor, log_middle: Tensor, log_inner: Tensor) -> Tensor:
        eye = torch.eye(self.dim, dtype=log_outer.dtype, device=log_outer.device)
        # the product between the diagonals is symmetric, so that its rows are its columns
        return log_outer.exp()[:, None] * self._mixed(eye, log_middle) * log_inner.exp()

    # -- starting ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over the mean and the marginal variances exactly, and the correlations as far as the family holds them.

        Correlations are fitted in Kullback-Leibler divergence, in closed form and without draws.
        """
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        sd = self.marginal_sd(scale)
        self._reset(mean)
        if scale.dim() == 2:
            self._fit_to(scale / sd[:, None])
        logs = self.log_outer, self._centred(self.log_middle), self._centred(self.log_inner)
        self.log_outer.add_(sd.log() - 0.5 * (self.radial.variance * self._variances(*logs)).log())

    @torch.no_grad()
    def precondition(self, shift: Tensor, scale: Tensor, covariance: Tensor | None = None) -> None:
        """Set the fixed affine map, and go to the member nearest to the guess at the covariance."""
        super().precondition(shift, scale, covariance)
        if self.guessed_covariance is None or self.head is not None:
            return
        factor, failed = torch.linalg.cholesky_ex(self.guessed_covariance)
        if not bool(failed):
            self._reset(torch.zeros_like(self.loc))
            self._fit_to(factor)
            self.log_outer.sub_(0.5 * math.log(self.radial.variance))

    def _reset(self, mean: Tensor) -> None:
        self.loc.copy_(mean)
        for log_diagonal in (self.log_outer, self.log_middle, self.log_inner):
            log_diagonal.zero_()

    def _fit_to(self, factor: Tensor) -> None:
        """Minimise ``KL(N(0, L L^T) || N(0, F F^T))`` over the three diagonals, from mean field."""
        if not 1 < self.dim <= _LARGEST_FITTED:
            return
        logs = [t.detach().clone().requires_grad_() for t in (self.log_outer, self.log_middle, self.log_inner)]
        optimiser = torch.optim.LBFGS(logs, max_iter=_FIT_STEPS, line_search_fn="strong_wolfe")

        def divergence() -> Tensor:
            optimiser.zero_grad()
            outer, middle, inner = logs
            own = self._dense(outer, self._centred(middle), self._centred(inner))
            whitened = torch.linalg.solve_triangular(factor, own, upper=False)
            value: Tensor = 0.5 * whitened.square().sum() - outer.sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(divergence)
        if all(bool(torch.isfinite(t).all()) for t in logs):
            for log_diagonal, found in zip((self.log_outer, self.log_middle, self.log_inner), logs, strict=True):
                log_diagonal.copy_(found.detach())
