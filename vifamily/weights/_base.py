"""What every weights entry is: how a flat latent becomes the parameters of a network.

An entry (a frozen dataclass in a file of its own, ``@register("weights", name)``) chooses among the layers of a module
and makes a :class:`LayerWeights` for each. One layer's weights take a slice of the latent; they can write out the
layer's parameters, and compute the layer's output without writing them out where that is cheaper. They own the prior of
their slice and say where a fit should begin. What they estimate as points (diagonals of a structured product) are
ordinary parameters of the module.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError

__all__ = ["LayerWeights", "check_positive"]


class LayerWeights(nn.Module, abc.ABC):
    """The weights of one layer as a function of a slice of the latent.

    Axes are ``(draw, datum, ...)``. Point-estimated parameters are registered as parameters, fixed tensors as buffers.

    Attributes:
        names: Full names in the network of the parameters that it makes, ``("0.weight", "0.bias")``.
        dim: Number of latent coordinates.
        example_noise: Whether each datum can have a latent of its own.
        cheap_example_noise: Whether that costs about as much as one latent for all.
    """

    names: tuple[str, ...]
    dim: int
    example_noise: bool = False
    cheap_example_noise: bool = False

    @abc.abstractmethod
    def materialise(self, z: Tensor) -> dict[str, Tensor]:
        """Write the parameters out.

        Args:
            z: ``(..., dim)``.

        Returns:
            Full name to ``(..., *shape)``.
        """

    @abc.abstractmethod
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Compute the layer's output for every draw.

        Args:
            x: ``(draw or 1, datum, ..., in)``, as the layer takes it after the leading axis (for a convolution
                ``(draw or 1, datum, channel, height, width)``); a leading 1 means that all draws share the input.
            z: ``(draw, dim)``; ``(draw, datum, dim)`` where each datum has a latent of its own.

        Returns:
            ``(draw, datum, ..., out)``.
        """

    @abc.abstractmethod
    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the independent normal prior of the slice, ``(dim,)`` each."""

    def log_prior(self, z: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Log prior density of the slice, ``(..., dim) -> (...)``; independent normal unless an entry differs.

        Args:
            z: ``(..., dim)``.
            scale: Multiplies the standard deviations of the prior.
        """
        mean, sd = self.prior()
        density: Tensor = torch.distributions.Normal(mean, sd * scale, validate_args=False).log_prob(z)
        return density.sum(-1)

    def cross_entropy(
        self, mean: Tensor, variance: Tensor, *, independent: bool = False, scale: Tensor | float = 1.0
    ) -> Tensor | None:
        """Cross entropy of a normal law with the prior, ``E_q[-log p(z)]``, in closed form.

        Args:
            mean: ``(..., dim)``.
            variance: Marginal variances, ``(..., dim)``; enough where the precision of the prior is diagonal.
            independent: Whether the coordinates of the law are independent, which other priors need.
            scale: Multiplies the standard deviations of the prior.

        Returns:
            ``(...)``, or None where marginal variances are not enough.
        """
        prior_mean, sd = self.prior()
        sd = sd * scale
        quadratic = ((mean - prior_mean).square() + variance) / sd.square()
        return 0.5 * (quadratic + (2 * torch.pi * sd.square()).log()).sum(-1)

    def best_scale(self, mean: Tensor, variance: Tensor) -> Tensor:
        r"""Square of the ``scale`` that makes :meth:`cross_entropy` least.

        .. math:: \lambda^2 = \mathbb{E}_q[(z - m)^\top S^{-1} (z - m)] / \text{dim}

        Args:
            mean: ``(..., dim)``.
            variance: ``(..., dim)``, of independent coordinates where the prior's are not; zero for single points.

        Returns:
            ``(...)``; its mean over draws, as points, estimates that of any law.
        """
        prior_mean, sd = self.prior()
        return (((mean - prior_mean).square() + variance) / sd.square()).mean(-1)

    def check_start(self, mean: Tensor, sd: Tensor) -> None:
        """Warn where a fit that begins at these moments, ``(dim,)`` each, is known to get nowhere."""

    @abc.abstractmethod
    def initial(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation from which a fit should begin, ``(dim,)`` each."""


def check_positive(name: str, value: Any) -> None:
    """Check that an option is a positive number.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number, got {value!r}.")
