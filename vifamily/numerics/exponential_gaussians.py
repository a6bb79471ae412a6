"""Normal laws as exponential families in natural parameters."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vifamily.numerics.exponential_family import ExponentialFamily

__all__ = ["DiagonalGaussian", "FixedScaleGaussian", "FullGaussian"]


@dataclasses.dataclass(frozen=True)
class FixedScaleGaussian(ExponentialFamily):
    """Independent normal coordinates with a fixed standard deviation; the raw numbers are the means.

    Minus the log density is a squared error, convex in the mean. Statistics ``theta``, natural parameters
    ``mean / sd^2``, log partition ``sd^2 |eta|^2 / 2``.

    Attributes:
        sd: The standard deviation.
    """

    sd: float = 1.0

    @property
    def num_outputs(self) -> int:
        """One for each coordinate."""
        return self.dim

    def natural(self, output: Tensor) -> Tensor:
        """``mean / sd^2``."""
        return output / self.sd**2

    def statistics(self, theta: Tensor) -> Tensor:
        """The coordinates."""
        return theta

    def log_base(self, theta: Tensor) -> Tensor:
        """The density at mean zero."""
        constant = self.dim * (0.5 * math.log(2 * math.pi) + math.log(self.sd))
        return -0.5 * (theta / self.sd).square().sum(-1) - constant

    def log_partition(self, eta: Tensor) -> Tensor:
        """``sd^2 |eta|^2 / 2``."""
        return 0.5 * self.sd**2 * eta.square().sum(-1)

    def mean(self, eta: Tensor) -> Tensor:
        """The means."""
        return self.sd**2 * eta

    def from_mean(self, mean: Tensor) -> Tensor:
        """``mean / sd^2``."""
        return mean / self.sd**2

    def standardised_mean(self, mean: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Means in other units."""
        return (mean - shift) / scale

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw normal coordinates."""
        return self.mean(eta) + self.sd * _normal_like(eta, generator)


def _normal_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=generator.device).to(like)


def _positive(raw: Tensor, link: str) -> Tensor:
    return torch.nn.functional.softplus(raw) if link == "softplus" else raw


@dataclasses.dataclass(frozen=True)
class DiagonalGaussian(ExponentialFamily):
    r"""Independent normal coordinates: statistics ``(theta, theta^2)``, natural parameters ``(mu P, -P / 2)``.

    .. math:: A(\eta) = \sum_i \frac{\eta_{1i}^2}{4 (-\eta_{2i})} - \tfrac12 \log(-2 \eta_{2i}) + \tfrac12 \log 2\pi.

    The raw numbers are ``(mu P, raw P)``. With the link ``softplus`` every raw number is allowed and no region is
    without a gradient, but minus the log density is no longer convex in them; with ``identity`` it is, on the half
    space ``P > 0``, outside which the log partition is infinite.

    Attributes:
        link: ``softplus`` or ``identity``, from the second half of the raw numbers to the precision.
    """

    link: str = "softplus"

    @property
    def num_outputs(self) -> int:
        """Two for each coordinate."""
        return 2 * self.dim

    @property
    def convex_in_output(self) -> bool:
        """With the identity only."""
        return self.link == "identity"

    @property
    def domain(self) -> str:
        """The second half negative."""
        return "the second half of the natural parameters is negative"

    def natural(self, output: Tensor) -> Tensor:
        """``(mu P, -P / 2)``."""
        first, raw = output.split(self.dim, dim=-1)
        return torch.cat([first, -0.5 * _positive(raw, self.link)], dim=-1)

    def statistics(self, theta: Tensor) -> Tensor:
        """Coordinates and their squares."""
        return torch.cat([theta, theta.square()], dim=-1)

    def log_partition(self, eta: Tensor) -> Tensor:
        """See the class."""
        first, second = eta.split(self.dim, dim=-1)
        precision = -2 * second
        inside = precision > 0
        safe = torch.where(inside, precision, torch.ones_like(precision))
        each = 0.5 * first.square() / safe - 0.5 * safe.log() + 0.5 * math.log(2 * math.pi)
        return torch.where(inside, each, torch.full_like(each, math.inf)).sum(-1)

    def mean(self, eta: Tensor) -> Tensor:
        """First and second moments."""
        first, second = eta.split(self.dim, dim=-1)
        variance = -0.5 / second
        mu = first * variance
        return torch.cat([mu, mu.square() + variance], dim=-1)

    def from_mean(self, mean: Tensor) -> Tensor:
        """From first and second moments."""
        mu, second = mean.split(self.dim, dim=-1)
        precision = 1 / (second - mu.square())
        return torch.cat([mu * precision, -0.5 * precision], dim=-1)

    def standardised_mean(self, mean: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """First and second moments in other units."""
        first, second = mean.split(self.dim, dim=-1)
        return torch.cat([(first - shift) / scale, (second - 2 * shift * first + shift**2) / scale**2], dim=-1)

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw normal coordinates."""
        first, second = eta.split(self.dim, dim=-1)
        variance = -0.5 / second
        drawn: Tensor = first * variance + variance.sqrt() * _normal_like(first, generator)
        return drawn


@dataclasses.dataclass(frozen=True)
class FullGaussian(ExponentialFamily):
    r"""Normal laws with any covariance; the raw numbers are ``(b, L)``, ``L`` the lower factor of the precision.

    .. math:: -\log q = \tfrac12 \|L^\top \theta - b\|^2 - \sum_i \log L_{ii} + \tfrac{d}{2} \log 2\pi,

    jointly convex in ``(L, b)`` where ``L_ii > 0``: with the link ``identity``. With ``softplus`` on the diagonal every
    raw number is allowed and convexity is lost. Statistics are ``(theta, theta theta^T)``, natural parameters
    ``(P mu, -P / 2)`` with all entries of the matrix.

    Attributes:
        link: ``softplus`` or ``identity``, from raw numbers to the diagonal of ``L``.
    """

    link: str = "softplus"

    @property
    def num_outputs(self) -> int:
        """``dim`` numbers of ``b``, ``dim (dim + 1) / 2`` of ``L``, the diagonal first."""
        return self.dim + self.dim * (self.dim + 1) // 2

    @property
    def convex_in_output(self) -> bool:
        """With the identity only; in ``(L, b)``."""
        return self.link == "identity"

    @property
    def domain(self) -> str:
        """A negative definite matrix."""
        return "the matrix among the natural parameters is negative definite"

    def factor(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Raw numbers to ``b`` ``(..., dim)`` and ``L`` ``(..., dim, dim)``."""
        b, raw, below = output.split([self.dim, self.dim, self.dim * (self.dim - 1) // 2], dim=-1)
        lower = torch.diag_embed(_positive(raw, self.link))
        if self.dim > 1:
            rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=output.device)
            place = torch.zeros(below.shape[-1], self.dim * self.dim, dtype=output.dtype, device=output.device)
            place[torch.arange(below.shape[-1]), rows * self.dim + columns] = 1.0
            lower = lower + (below @ place).unflatten(-1, (self.dim, self.dim))
        return b, lower

    def natural(self, output: Tensor) -> Tensor:
        """``(L b, -L L^T / 2)``."""
        b, lower = self.factor(output)
        first = (lower @ b.unsqueeze(-1)).squeeze(-1)
        return torch.cat([first, (-0.5 * lower @ lower.mT).flatten(-2)], dim=-1)

    def _parts(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        first, matrix = eta.split([self.dim, self.dim**2], dim=-1)
        square = matrix.unflatten(-1, (self.dim, self.dim))
        return first, -(square + square.mT)

    def statistics(self, theta: Tensor) -> Tensor:
        """Coordinates and their products."""
        return torch.cat([theta, (theta.unsqueeze(-1) * theta.unsqueeze(-2)).flatten(-2)], dim=-1)

    def log_partition(self, eta: Tensor) -> Tensor:
        """``eta_1 . P^-1 eta_1 / 2 - log |P| / 2 + dim log(2 pi) / 2``; infinite where P is not positive definite."""
        first, precision = self._parts(eta)
        factor, failed = torch.linalg.cholesky_ex(precision)
        solved = torch.linalg.solve_triangular(factor, first.unsqueeze(-1), upper=False).squeeze(-1)
        each = 0.5 * solved.square().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        out = each + 0.5 * self.dim * math.log(2 * math.pi)
        return torch.where(failed == 0, out, torch.full_like(out, math.inf))

    def mean(self, eta: Tensor) -> Tensor:
        """First and second moments."""
        first, precision = self._parts(eta)
        covariance = torch.linalg.inv(precision)
        mu = (covariance @ first.unsqueeze(-1)).squeeze(-1)
        return torch.cat([mu, (covariance + mu.unsqueeze(-1) * mu.unsqueeze(-2)).flatten(-2)], dim=-1)

    def from_mean(self, mean: Tensor) -> Tensor:
        """From first and second moments."""
        mu, matrix = mean.split([self.dim, self.dim**2], dim=-1)
        second = matrix.unflatten(-1, (self.dim, self.dim))
        precision = torch.linalg.inv(second - mu.unsqueeze(-1) * mu.unsqueeze(-2))
        first = (precision @ mu.unsqueeze(-1)).squeeze(-1)
        return torch.cat([first, -0.5 * precision.flatten(-2)], dim=-1)

    def standardised_mean(self, mean: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """First and second moments in other units."""
        first, matrix = mean.split([self.dim, self.dim**2], dim=-1)
        second = matrix.unflatten(-1, (self.dim, self.dim))
        cross = first.unsqueeze(-1) * shift
        moved = (second - cross - cross.mT + shift.unsqueeze(-1) * shift) / (scale.unsqueeze(-1) * scale)
        return torch.cat([(first - shift) / scale, moved.flatten(-2)], dim=-1)

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw, ``mu + L^-T e``."""
        first, precision = self._parts(eta)
        factor = torch.linalg.cholesky(precision)
        half = torch.linalg.solve_triangular(factor, first.unsqueeze(-1), upper=False)
        noise = _normal_like(first, generator).unsqueeze(-1)
        drawn: Tensor = torch.linalg.solve_triangular(factor.mT, half + noise, upper=True)
        return drawn.squeeze(-1)
