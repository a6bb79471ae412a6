"""A Gaussian whose mean is drawn by a network, with a bound on its log density."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import NotAvailableError
from vifamily.families._base import Family, FamilyEntry, uniform_log_weight
from vifamily.families._nets import SamplerNet, check_positive, check_widths, normal
from vifamily.registry import register
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["SemiImplicit", "SemiImplicitFamily"]

_CAPABILITIES = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q, Capability.LOG_Q_BOUND})
_HALF = math.sqrt(0.5)


@register("families", "semi_implicit")
@dataclasses.dataclass(frozen=True)
class SemiImplicit(FamilyEntry):
    """A Gaussian mixed over a network, ``z | e ~ N(mean(e), diag(scale^2))`` with ``e`` standard normal.

    The marginal density ``q(z) = E_e q(z | e)`` is not available. A draw made from ``e_0`` carries instead
    ``log h_K(z) = log[ (1 / (K + 1)) sum_{k=0}^{K} q(z | e_k) ]`` with ``K`` further ``e_k`` taken from its own noise
    (Yin and Zhou, "Semi-implicit variational inference", ICML 2018, Section 3). **This is a bound, not the density**:
    ``E log h_K(z) >= E log q(z)``, because the sum holds the ``e_0`` that made ``z``. So an ELBO computed with it is a
    lower bound on the ELBO of the marginal ``q``, which rises to it as ``K`` grows; the entropy is underestimated. The
    entry and the family say so in ``log_q_is_bound``.

    At points that it did not draw, ``log_prob`` averages over mixing noise fixed when the family was built; there the
    error has the opposite sign in expectation (Jensen), and the average is itself a normalised density. It is not the
    bound that the draws carry, so estimators that mix the two (sticking the landing, doubly reparameterised gradients)
    are refused.

    Args:
        hidden: Widths of the hidden layers of the network.
        mixing_draws: The number ``K`` of further mixing draws per draw.
        noise_dim: Size of ``e``; None for the number of latent coordinates.

    Raises:
        ConfigError: If a size is not a positive integer.

    Example:
        >>> import torch
        >>> from vifamily.types import LatentSpec
        >>> family = SemiImplicit(mixing_draws=4).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        >>> family.noise_spec.shape, tuple(family(torch.zeros(3, 12, dtype=torch.float64)).log_q.shape)
        ((12,), (3,))
    """

    hidden: Sequence[int] = (64, 64)
    mixing_draws: int = 20
    noise_dim: int | None = None
    capabilities = _CAPABILITIES
    log_q_is_bound = True

    def __post_init__(self) -> None:
        """Check the options."""
        object.__setattr__(self, "hidden", check_widths("hidden", self.hidden))
        check_positive("mixing_draws", self.mixing_draws)
        if self.noise_dim is not None:
            check_positive("noise_dim", self.noise_dim)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> SemiImplicitFamily:
        """Build the family with half of its unit variance in the network and half in the Gaussian."""
        self.check_space(latent)
        return SemiImplicitFamily(latent, self, generator)


class SemiImplicitFamily(Family):
    """The module of :class:`SemiImplicit`.

    The noise of a draw is ``dim`` normals of the Gaussian, then ``e_0, e_1, ..., e_K``.

    Args:
        latent: What is covered.
        entry: Hyper-parameters.
        generator: Randomness of the network and of the fixed mixing noise.
    """

    capabilities = _CAPABILITIES
    log_q_is_bound = True
    step_size = 0.02
    fixed: Tensor

    def __init__(self, latent: LatentSpec, entry: SemiImplicit, generator: torch.Generator) -> None:
        super().__init__(latent)
        self.noise_dim = entry.noise_dim or latent.dim
        self.mixing_draws = entry.mixing_draws
        self.noise_spec = NoiseSpec((latent.dim + (1 + self.mixing_draws) * self.noise_dim,))
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.net = SamplerNet(
            self.noise_dim, latent.dim, entry.hidden, 0, generator, dtype=latent.dtype, device=latent.device
        )
        self.log_scale = nn.Parameter(torch.zeros(latent.dim, **options))
        fixed = normal((max(256, self.mixing_draws), self.noise_dim), generator, **options)
        self.register_buffer("fixed", fixed)
        self.start_at(torch.zeros_like(self.shift), torch.ones_like(self.shift))

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws, with the bound on their log density."""
        own, mixing = noise[..., : self.dim], noise[..., self.dim :]
        means = self.net(mixing.unflatten(-1, (1 + self.mixing_draws, self.noise_dim)))
        u = means[..., 0, :] + self.log_scale.exp() * own
        log_q = self._average(u, means)
        return Draw(u, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log of the average over the fixed mixing noise."""
        return self._average(u, self.net(self.fixed))

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log of the average over the fixed mixing noise, at given points.

        Raises:
            NotAvailableError: With ``frozen``, since this is not the bound that draws carry.
        """
        if frozen:
            raise NotAvailableError(
                "a semi-implicit family has no log density with frozen parameters at its own draws: the mixing noise "
                "that made them is gone. Use the estimator 'reparameterised'."
            )
        return super().log_prob(z, context)

    def _average(self, u: Tensor, means: Tensor) -> Tensor:
        square = ((u[..., None, :] - means) * (-self.log_scale).exp()).square().sum(-1)
        constant = self.log_scale.sum() + 0.5 * self.dim * math.log(2 * math.pi) + math.log(means.shape[-2])
        return torch.logsumexp(-0.5 * square, dim=-1) - constant

    @torch.no_grad()
    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Take over the mean and the marginal variances, half from the network, half from the Gaussian."""
        mean, scale = mean.to(self.shift), scale.to(self.shift)
        self.net.start(mean, _HALF * scale)
        sd = scale if scale.dim() == 1 else scale.square().sum(-1).sqrt()
        self.log_scale.copy_((_HALF * sd).log())
