"""Inclusive Kullback-Leibler divergence over a simulator's joint: neural posterior estimation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.objectives._base import Objective, ValueKind
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["InclusiveKl"]


@register("objectives", "inclusive_kl")
@dataclasses.dataclass(frozen=True)
class InclusiveKl(Objective):
    r"""Inclusive KL averaged over simulated data: neural posterior estimation, the sleep phase, the forward KL of FAVI.

    .. math:: \mathbb{E}_{p(x)} \mathrm{KL}(p(\theta \mid x) \,\|\, q(\theta \mid x))
              = -\mathbb{E}_{p(\theta, x)} \log q(\theta \mid x) - \mathbb{E}_{p(x)} H[p(\theta \mid x)],
              \qquad \text{loss} = -\frac1B \sum_{i=1}^B \log q(\theta_i \mid x_i), \quad (\theta_i, x_i) \sim p .

    It needs a simulator (:class:`vifamily.models.Simulator`) and a conditional family with a density: neither a
    likelihood nor reparameterised draws. One fit serves every observation: ``vf.fit(simulator, "flow",
    "inclusive_kl")`` gives an amortised posterior, and ``posterior(x)`` the posterior of an observation. In an
    exponential family whose natural parameters the network puts out, the loss is convex in what it puts out.

    In an exponential family (``natural``) two variants have less noise or go straighter to the optimum. With
    ``natural_gradient`` the slope in the numbers that the network puts out is multiplied, datum by datum, by the
    inverse Fisher information there, :math:`F(\eta)^{-1} (\nabla A(\eta) - T(\theta))`: the flat regions of narrow laws
    far from the truth are then no longer flat. With ``rao_blackwell`` the statistics :math:`T(\theta)` of a draw give
    way to their mean given the data, :math:`E[T \mid x]`, where the simulator knows it (``mean_statistics=``).

    **Bias.** None with fresh simulations. Over a stored set the loss of the set is minimised, which a network can
    over-fit: part of the set is held out, and the state that served the held-out pairs best is returned.

    **Blind to.** Whatever the simulator does not do: at an observation that the model would hardly make, the network
    extrapolates. An average over data says little of one observation; calibrate
    (:meth:`vifamily.posterior.amortised.AmortisedPosterior.sbc`), and weigh by importance where there is a likelihood.

    **Fails when.** Simulations are few for the family: the posterior is then too narrow or too wide, which held-out
    loss and calibration show.

    Source: G. Papamakarios and I. Murray (2016), "Fast epsilon-free inference of simulation models with Bayesian
    conditional density estimation", equation 2; L. Ambrogioni et al. (2019), "Forward amortized inference".

    Args:
        simulations: Simulations to make, once; None for fresh ones at every step. Simulations that the simulator
            already carries are used instead.
        holdout: Share of the stored simulations that is held out.
        patience: Passes over the stored simulations without an improvement on the held-out ones after which the fit
            stops.
        natural_gradient: Whether to take natural gradients in what the network puts out.
        damping: Added to the diagonal of the Fisher information under ``natural_gradient``.
        rao_blackwell: Whether to take mean statistics given the data in place of those of a draw.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> InclusiveKl(simulations=None).simulations is None
        True
    """

    simulations: int | None = 10_000
    holdout: float = 0.1
    patience: int = 20
    natural_gradient: bool = False
    damping: float = 1e-3
    rao_blackwell: bool = False

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.SIMULATE})
    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q, Capability.CONDITIONAL})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    value_gradient: ClassVar[bool] = True
    inclusive: ClassVar[bool] = True
    default_draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, least in (("simulations", self.simulations, 20), ("patience", self.patience, 1)):
            if value is None and name == "simulations":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
        share = self.holdout
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ConfigError(f"holdout must be a share between 0 and 1, got {share!r}.")
        number = isinstance(self.damping, (int, float)) and not isinstance(self.damping, bool)
        if not (number and 0 <= self.damping < math.inf):
            raise ConfigError(f"damping must be a finite number from 0, got {self.damping!r}.")
        for name in ("natural_gradient", "rao_blackwell"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.natural_gradient or self.rao_blackwell:
            object.__setattr__(self, "needs_family", type(self).needs_family | {Capability.NATURAL})
            object.__setattr__(self, "value_gradient", not self.natural_gradient)
        if self.rao_blackwell:
            object.__setattr__(self, "needs_model", type(self).needs_model | {Capability.MEAN_STATISTICS})

    @property
    def linear_in_draws(self) -> bool:
        """It uses no draws of q at all."""
        return True

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: object = None
    ) -> Loss:
        """Evaluate the mean of minus the log density at simulated pairs.

        Args:
            family: A family that takes the data of a pair as its context.
            model: The simulator.
            noise: Not used.
            batch: Its data are ``(z, x)``: parameters on unconstrained space ``(pair, dim)`` and data ``(pair, ...)``.
            state: Not used.

        Raises:
            NotAvailableError: If there is no batch.
        """
        if batch is None:
            raise NotAvailableError("inclusive_kl is evaluated on simulated pairs: give them as the batch.")
        z, x = batch.data
        if not (self.natural_gradient or self.rao_blackwell):
            value = -family.log_prob(z, x).mean(-1)
            return Loss(value, value.detach())
        return self._exponential(family, model, z, x)

    def _exponential(self, family: Any, model: Any, z: Tensor, x: Tensor) -> Loss:
        """The loss of an exponential family by its natural parameters."""
        inner, raw = family.exponential, family.raw(x)
        if self.rao_blackwell:
            mean = inner.standard_mean(model.mean_statistics(z, x)).detach()
        else:
            mean = inner.standard_statistics(z)
        each = inner.law.loss(inner.law.natural(raw), mean)
        value = each.mean() + inner.log_units()
        if not self.natural_gradient:
            return Loss(value, value.detach())
        direction = inner.law.output_natural_gradient(raw, mean, self.damping)
        return Loss((direction * raw).sum(-1).mean(), value.detach())
