r"""Exponential families in natural parameters: statistics, log partition, domain, link, convexity.

.. math:: \log q(\theta; \eta) = \log h(\theta) + \eta \cdot T(\theta) - A(\eta).

The inclusive divergence at one data set, :math:`A(\eta) - \eta \cdot m` with :math:`m = E[T(\theta) \mid x]`, is convex
in :math:`\eta`; its gradient is :math:`\nabla A(\eta) - m` and its Hessian :math:`\operatorname{Cov}_\eta T`, so it is
least where moments match. Whether it is convex in what a network puts out depends on the link as well, and is declared.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor

from vifamily.errors import ConfigError
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

_LINKS = ("softplus", "identity")


@dataclasses.dataclass(frozen=True)
class ExponentialFamily(abc.ABC):
    """An exponential family over ``dim`` coordinates, with ``num_outputs`` raw numbers of a network per distribution.

    Attributes:
        dim: Number of coordinates of the variable.
    """

    dim: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            raise ConfigError(f"dim must be a positive integer, got {self.dim!r}.")
        link = getattr(self, "link", "identity")
        if link not in _LINKS:
            raise ConfigError(f"link must be one of {', '.join(_LINKS)}, got {link!r}.")

    # -- declarations --------------------------------------------------------------------------------------------------
    @property
    def space(self) -> Space:
        """The space of the variable."""
        return Space.REAL

    @property
    @abc.abstractmethod
    def num_outputs(self) -> int:
        """Raw numbers that describe one distribution."""

    @property
    def convex_in_output(self) -> bool:
        """Whether minus the log density is convex in the raw numbers, on the domain."""
        return True

    @property
    def domain(self) -> str:
        """The set of natural parameters, in words."""
        return "all real vectors"

    # -- mathematics ---------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def natural(self, output: Tensor) -> Tensor:
        """The link: raw numbers ``(..., num_outputs)`` to natural parameters ``(..., num_natural)``."""

    @abc.abstractmethod
    def statistics(self, theta: Tensor) -> Tensor:
        """Sufficient statistics, ``(..., dim) -> (..., num_natural)``."""

    @abc.abstractmethod
    def log_partition(self, eta: Tensor) -> Tensor:
        """The log partition function, ``(..., num_natural) -> (...)``; infinite outside the domain."""

    @abc.abstractmethod
    def mean(self, eta: Tensor) -> Tensor:
        """The mean of the statistics, which is the gradient of the log partition, ``(..., num_natural)``."""

    @abc.abstractmethod
    def from_mean(self, mean: Tensor) -> Tensor:
        """Moment matching: the natural parameters under which the statistics have this mean."""

    @abc.abstractmethod
    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """One draw for each row of natural parameters, ``(..., num_natural) -> (..., dim)``."""

    def log_base(self, theta: Tensor) -> Tensor:
        """The log base measure, ``(..., dim) -> (...)``."""
        return theta.new_zeros(theta.shape[:-1])

    def log_prob(self, theta: Tensor, eta: Tensor) -> Tensor:
        """Log density at ``theta`` ``(..., dim)`` under ``eta`` ``(..., num_natural)``."""
        return self.log_base(theta) + (eta * self.statistics(theta)).sum(-1) - self.log_partition(eta)

    def loss(self, eta: Tensor, mean: Tensor) -> Tensor:
        """The inclusive divergence up to a constant, ``A(eta) - eta . mean``, for mean statistics of the target.

        With ``mean`` the conditional mean of the statistics instead of one draw's, this is the Rao-Blackwellised loss.
        """
        return self.log_partition(eta) - (eta * mean).sum(-1)

    def fisher(self, eta: Tensor) -> Tensor:
        """Fisher information, the covariance of the statistics, ``(..., num_natural, num_natural)``."""
        flat = eta.reshape(-1, eta.shape[-1])
        hessian: Tensor = torch.func.vmap(torch.func.jacrev(self.mean))(flat)
        return hessian.reshape(*eta.shape, eta.shape[-1])

    def natural_gradient(self, eta: Tensor, mean: Tensor) -> Tensor:
        """The gradient of :meth:`loss` preconditioned by the inverse Fisher information, ``(..., num_natural)``."""
        gap = (self.mean(eta) - mean).unsqueeze(-1)
        solved: Tensor = torch.linalg.solve(self.fisher(eta), gap)
        return solved.squeeze(-1)


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

    def log_partition(self, eta: Tensor) -> Tensor:
        """``log 2 pi I_0(kappa)``, summed over angles."""
        _, kappa = self._plane(eta)
        each: Tensor = kappa + torch.special.i0e(kappa).log() + math.log(2 * math.pi)
        return each.sum(-1)

    def mean(self, eta: Tensor) -> Tensor:
        """``I_1 / I_0`` times the direction."""
        pairs, kappa = self._plane(eta)
        # the ratio is kappa / 2 near zero
        slope = torch.where(kappa < 1e-4, 0.5 - kappa.square() / 16, bessel_ratio(kappa) / kappa)
        return (slope.unsqueeze(-1) * pairs).flatten(-2)

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

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw, ``mu + L^-T e``."""
        first, precision = self._parts(eta)
        factor = torch.linalg.cholesky(precision)
        half = torch.linalg.solve_triangular(factor, first.unsqueeze(-1), upper=False)
        noise = _normal_like(first, generator).unsqueeze(-1)
        drawn: Tensor = torch.linalg.solve_triangular(factor.mT, half + noise, upper=True)
        return drawn.squeeze(-1)


@dataclasses.dataclass(frozen=True)
class Categorical(ExponentialFamily):
    """Independent categorical coordinates; natural parameters are the logits of all but the first category.

    ``A(eta) = log(1 + sum_k exp(eta_k))`` for each coordinate; two categories make the Bernoulli law. Coordinates count
    categories from zero, as floats.

    Attributes:
        num_categories: Categories of each coordinate.
    """

    num_categories: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_categories, bool) or not isinstance(self.num_categories, int) or self.num_categories < 2:
            raise ConfigError(f"num_categories must be an integer of at least 2, got {self.num_categories!r}.")

    @property
    def space(self) -> Space:
        """The discrete space."""
        return Space.DISCRETE

    @property
    def num_outputs(self) -> int:
        """One less than there are categories, for each coordinate."""
        return self.dim * (self.num_categories - 1)

    def natural(self, output: Tensor) -> Tensor:
        """The identity."""
        return output

    def statistics(self, theta: Tensor) -> Tensor:
        """Indicators of all categories but the first."""
        each = torch.arange(1, self.num_categories, device=theta.device, dtype=theta.dtype)
        return (theta.unsqueeze(-1) == each).to(theta).flatten(-2)

    def _logits(self, eta: Tensor) -> Tensor:
        rows = eta.unflatten(-1, (self.dim, self.num_categories - 1))
        return torch.nn.functional.pad(rows, (1, 0))

    def log_partition(self, eta: Tensor) -> Tensor:
        """``log(1 + sum exp eta)``, summed over coordinates."""
        return self._logits(eta).logsumexp(-1).sum(-1)

    def mean(self, eta: Tensor) -> Tensor:
        """Probabilities of all categories but the first."""
        return self._logits(eta).softmax(-1)[..., 1:].flatten(-2)

    def from_mean(self, mean: Tensor) -> Tensor:
        """Log odds against the first category."""
        rows = mean.unflatten(-1, (self.dim, self.num_categories - 1))
        first = 1 - rows.sum(-1, keepdim=True)
        out: Tensor = (rows.log() - first.log()).flatten(-2)
        return out

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw by Gumbel noise."""
        logits = self._logits(eta)
        unit = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16).to(logits)
        return (logits - (-unit.log()).log()).argmax(-1).to(eta)
