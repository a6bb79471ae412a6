"""What an exponential family is: statistics, log partition, domain, link, convexity."""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.types import Space

__all__ = ["ExponentialFamily"]

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

    def output_fisher(self, output: Tensor) -> Tensor:
        """Fisher information in the raw numbers, ``(..., num_outputs) -> (..., num_outputs, num_outputs)``."""
        flat = output.detach().reshape(-1, output.shape[-1])
        link = torch.func.vmap(torch.func.jacrev(self.natural))(flat)
        bend = torch.func.vmap(torch.func.jacrev(lambda raw: self.mean(self.natural(raw))))(flat)
        out: Tensor = link.mT @ bend
        return out.reshape(*output.shape, output.shape[-1])

    def output_natural_gradient(self, output: Tensor, mean: Tensor, damping: float = 0.0) -> Tensor:
        """The natural gradient of :meth:`loss` in the raw numbers, ``(F + damping I)^-1 g``, ``(..., num_outputs)``.

        Args:
            output: Raw numbers, ``(..., num_outputs)``.
            mean: Mean statistics of the target, ``(..., num_natural)``.
            damping: Added to the diagonal of the Fisher information; keeps steps short where it is nearly singular.
        """
        raw = output.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.loss(self.natural(raw), mean).sum(), raw)
        fisher = self.output_fisher(output)
        ridge = damping * torch.eye(output.shape[-1], dtype=output.dtype, device=output.device)
        solved: Tensor = torch.linalg.solve(fisher + ridge, slope.unsqueeze(-1))
        return solved.squeeze(-1)

    def standardised_mean(self, mean: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Mean statistics of ``(theta - shift) / scale``, from those of ``theta``.

        Args:
            mean: ``(..., num_natural)``.
            shift: ``(dim,)``.
            scale: ``(dim,)``.

        Raises:
            ConfigError: If the statistics of a law do not follow an affine map.
        """
        raise ConfigError(f"the statistics of {type(self).__name__} do not follow a change of units.")

    def natural_gradient(self, eta: Tensor, mean: Tensor) -> Tensor:
        """The gradient of :meth:`loss` preconditioned by the inverse Fisher information, ``(..., num_natural)``."""
        gap = (self.mean(eta) - mean).unsqueeze(-1)
        solved: Tensor = torch.linalg.solve(self.fisher(eta), gap)
        return solved.squeeze(-1)
