r"""Exponential families in natural parameters: statistics, log partition, domain, link, convexity.

.. math:: \log q(\theta; \eta) = \log h(\theta) + \eta \cdot T(\theta) - A(\eta).

The inclusive divergence at one data set, :math:`A(\eta) - \eta \cdot m` with :math:`m = E[T(\theta) \mid x]`, is convex
in :math:`\eta`; its gradient is :math:`\nabla A(\eta) - m` and its Hessian :math:`\operatorname{Cov}_\eta T`, so it is
least where moments match. Whether it is convex in what a network puts out depends on the link as well, and is declared.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.exponential_family import ExponentialFamily
from vifamily.numerics.exponential_gaussians import DiagonalGaussian, FixedScaleGaussian, FullGaussian
from vifamily.types import Space

__all__ = [
    "Categorical",
    "DiagonalGaussian",
    "ExponentialFamily",
    "FixedScaleGaussian",
    "FullGaussian",
    "VonMises",
    "bessel_ratio",
]

_NEAR_ZERO = 1e-3
"""Squared length of natural parameters of an angle below which series are exact to rounding, derivatives as well."""


def bessel_ratio(kappa: Tensor) -> Tensor:
    """``I_1(kappa) / I_0(kappa)``, the mean resultant length of a von Mises law; stable for any ``kappa >= 0``.

    Example:
        >>> bessel_ratio(torch.tensor([0.0, 1e8], dtype=torch.float64)).numpy().round(6)
        array([0., 1.])
    """
    ratio: Tensor = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    return ratio


@dataclasses.dataclass(frozen=True)
class VonMises(ExponentialFamily):
    r"""Independent von Mises laws of ``dim`` angles: statistics ``(cos, sin)``, natural parameters all of the plane.

    .. math:: A(\eta) = \log 2\pi I_0(\|\eta\|), \qquad \nabla A = \frac{I_1}{I_0}(\|\eta\|)\, \eta / \|\eta\|.

    Natural parameters are ordered ``(eta_1, eta_2)`` angle by angle. The identity is the link.

    Example:
        >>> law = VonMises()
        >>> round(float(law.log_partition(torch.zeros(2, dtype=torch.float64)).exp() / math.pi), 6)
        2.0
    """

    @property
    def space(self) -> Space:
        """The circle."""
        return Space.CIRCLE

    @property
    def num_outputs(self) -> int:
        """Two for each angle."""
        return 2 * self.dim

    def natural(self, output: Tensor) -> Tensor:
        """The identity."""
        return output

    def statistics(self, theta: Tensor) -> Tensor:
        """Cosine and sine of each angle."""
        out: Tensor = torch.stack([theta.cos(), theta.sin()], dim=-1).flatten(-2)
        return out

    def _plane(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        pairs = eta.unflatten(-1, (self.dim, 2))
        # the norm has no gradient at zero, where everything here is smooth in its square
        tiny = torch.finfo(eta.dtype).tiny
        return pairs, (pairs.square().sum(-1) + tiny).sqrt()

    def _near_zero(self, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared lengths, which of them are near zero, and lengths that are never so."""
        square = eta.unflatten(-1, (self.dim, 2)).square().sum(-1)
        near = square < _NEAR_ZERO
        return square, near, torch.where(near, torch.ones_like(square), square).sqrt()

    def log_partition(self, eta: Tensor) -> Tensor:
        """``log 2 pi I_0(kappa)``, summed over angles."""
        # in the square of kappa, so that all derivatives are right where kappa is zero
        square, near, kappa = self._near_zero(eta)
        series = square / 4 - square**2 / 64 + square**3 / 576 - 11 * square**4 / 49152
        far = kappa + torch.special.i0e(kappa).log()
        each: Tensor = torch.where(near, series, far) + math.log(2 * math.pi)
        return each.sum(-1)

    def mean(self, eta: Tensor) -> Tensor:
        """``I_1 / I_0`` times the direction."""
        square, near, kappa = self._near_zero(eta)
        series = 0.5 - square / 16 + square**2 / 96 - 11 * square**3 / 6144 + 19 * square**4 / 61440
        slope = torch.where(near, series, bessel_ratio(kappa) / kappa)
        out: Tensor = (slope.unsqueeze(-1) * eta.unflatten(-1, (self.dim, 2))).flatten(-2)
        return out

    def from_mean(self, mean: Tensor) -> Tensor:
        """Invert ``I_1 / I_0`` by Newton's method, each step kept inside a bracket of the root."""
        pairs = mean.unflatten(-1, (self.dim, 2))
        length = pairs.norm(dim=-1).clamp(max=1 - 1e-12)
        kappa = length * (2 - length.square()) / (1 - length.square())  # Banerjee et al. (2005), equation 4.4
        for _ in range(50):
            ratio = bessel_ratio(kappa)
            slope = 1 - ratio.square() - torch.where(kappa > 0, ratio / kappa.clamp_min(1e-300), 0.5)
            kappa = (kappa - (ratio - length) / slope.clamp_min(1e-12)).clamp(min=0.5 * kappa, max=2 * kappa + 1)
        direction = pairs / length.clamp_min(torch.finfo(mean.dtype).tiny).unsqueeze(-1)
        out: Tensor = (kappa.unsqueeze(-1) * direction).flatten(-2)
        return out

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw by rejection from a wrapped Cauchy law (Best and Fisher 1979)."""
        pairs, kappa = self._plane(eta)
        centre = torch.atan2(pairs[..., 1], pairs[..., 0])
        tau = 1 + (1 + 4 * kappa.square()).sqrt()
        rho = (tau - (2 * tau).sqrt()) / (2 * kappa)
        # for small kappa the formula loses its digits: r = 1 / kappa there
        r = torch.where(kappa < 1e-4, 1 / kappa + kappa, (1 + rho.square()) / (2 * rho))
        angle, open_ = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
        for _ in range(200):
            u = torch.rand((3, *kappa.shape), generator=generator, dtype=torch.float64).to(kappa)
            z = torch.cos(math.pi * u[0])
            f = ((1 + r * z) / (r + z)).clamp(-1, 1)
            c = kappa * (r - f)
            good = (c * (2 - c) > u[1]) | ((c / u[1]).log() + 1 - c >= 0)
            found = torch.sign(u[2] - 0.5) * torch.acos(f)
            angle = torch.where(open_ & good, found, angle)
            open_ = open_ & ~good
            if not bool(open_.any()):
                break
        total = centre + angle
        return torch.remainder(total + math.pi, 2 * math.pi) - math.pi


@dataclasses.dataclass(frozen=True)
class Categorical(ExponentialFamily):
    """Independent categorical coordinates; natural parameters are the logits of all but the first category.

    ``A(eta) = log(1 + sum_k exp(eta_k))`` for each coordinate; two categories make the Bernoulli law. Coordinates count
    categories from zero, as floats.

    Attributes:
        num_categories: Categories of each coordinate: one number for all, or one for each.

    Example:
        >>> law = Categorical(2, (2, 3))
        >>> law.num_outputs, law.mean(torch.zeros(3)).numpy().round(4).tolist()
        (3, [0.5, 0.33329999446868896, 0.33329999446868896])
    """

    num_categories: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.num_categories
        each = (given,) * self.dim if isinstance(given, int) else given
        fits = isinstance(each, tuple) and len(each) == self.dim
        if not fits or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in each):
            raise ConfigError(
                f"num_categories must be an integer of at least 2, or one for each of {self.dim} coordinates, got "
                f"{given!r}."
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Categories of each coordinate."""
        given = self.num_categories
        return (given,) * self.dim if isinstance(given, int) else given

    @property
    def space(self) -> Space:
        """The discrete space."""
        return Space.DISCRETE

    @property
    def num_outputs(self) -> int:
        """One less than there are categories, for each coordinate."""
        return sum(self.counts) - self.dim

    def natural(self, output: Tensor) -> Tensor:
        """The identity."""
        return output

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Coordinate and category that each natural parameter belongs to."""
        rows = [i for i, n in enumerate(self.counts) for _ in range(1, n)]
        columns = [k for n in self.counts for k in range(1, n)]
        return torch.tensor(rows, device=device), torch.tensor(columns, device=device)

    def statistics(self, theta: Tensor) -> Tensor:
        """Indicators of all categories but the first."""
        rows, columns = self._places(theta.device)
        return (theta[..., rows] == columns.to(theta)).to(theta)

    def log_base(self, theta: Tensor) -> Tensor:
        """Zero at the categories, minus infinity elsewhere."""
        most = torch.tensor(self.counts, device=theta.device).to(theta) - 1
        inside = ((theta == theta.round()) & (theta >= 0) & (theta <= most)).all(-1)
        return torch.where(inside, 0.0, -math.inf).to(theta)

    def log_odds(self, eta: Tensor) -> Tensor:
        """Logits of every category, ``(..., dim, categories)``; minus infinity where a coordinate has fewer."""
        rows, columns = self._places(eta.device)
        place = torch.ones(self.dim, max(self.counts), dtype=torch.long, device=eta.device)
        place[:, 0] = 0
        place[rows, columns] = torch.arange(2, 2 + len(rows), device=eta.device)
        first = torch.zeros_like(eta[..., :1])
        return torch.cat([first, torch.full_like(first, -math.inf), eta], dim=-1)[..., place]

    def log_partition(self, eta: Tensor) -> Tensor:
        """``log(1 + sum exp eta)``, summed over coordinates."""
        return self.log_odds(eta).logsumexp(-1).sum(-1)

    def mean(self, eta: Tensor) -> Tensor:
        """Probabilities of all categories but the first."""
        rows, columns = self._places(eta.device)
        return self.log_odds(eta).softmax(-1)[..., rows, columns]

    def from_mean(self, mean: Tensor) -> Tensor:
        """Log odds against the first category."""
        rows, _ = self._places(mean.device)
        others = torch.zeros_like(mean[..., :1]).expand(*mean.shape[:-1], self.dim)
        first = 1 - others.index_add(-1, rows, mean)
        return mean.log() - first[..., rows].log()

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw by Gumbel noise."""
        logits = self.log_odds(eta)
        unit = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16).to(logits)
        return (logits - (-unit.log()).log()).argmax(-1).to(eta)
