"""The nouns as types: capabilities, noise, draws, batches, losses.

Axes are always ``(restart, draw, datum, ...event)``, in that order; the restart axis is there only when several
fits run at once. ``z`` is unconstrained, ``theta`` constrained.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "Batch",
    "Capability",
    "Draw",
    "FamilyLike",
    "GameState",
    "LatentSpec",
    "Loss",
    "ModelLike",
    "NoiseSpec",
    "Space",
]


class Space(enum.StrEnum):
    """The space a latent vector lives on."""

    REAL = "real"
    CIRCLE = "circle"
    SIMPLEX = "simplex"
    DISCRETE = "discrete"


class Capability(enum.StrEnum):
    """What a model or a family can do; objectives name what they need."""

    # models
    LOG_JOINT = "log joint"
    PRIOR = "log prior apart from the likelihood"
    PER_DATUM = "log likelihood per datum"
    SCORE = "differentiable log joint"
    SECOND_ORDER = "twice differentiable log joint"
    SUBSAMPLE = "minibatches"
    PRIOR_DRAWS = "draws from the prior"
    PREDICTIVE = "draws from the predictive"
    SIMULATE = "joint simulation"
    REFERENCE_DRAWS = "reference draws"
    LOCAL = "local latents"
    GAUSSIAN_PRIOR = "Gaussian prior on unconstrained space"
    POINT_PARAMETERS = "point-estimated parameters"
    GROUPS = "data in groups (groups=)"
    EXAMPLE_NOISE = "noise per example"
    CHEAP_EXAMPLE_NOISE = "cheap noise per example"
    MEAN_STATISTICS = "mean statistics given the data (mean_statistics=)"
    # families
    DRAWS = "draws"
    REPARAMETERISED = "reparameterised draws"
    LOG_Q = "log density"
    ENTROPY = "closed-form entropy"
    GAUSSIAN = "closed-form Gaussian moments"
    FULL_GAUSSIAN = "any mean and covariance"
    FACTORISED_GAUSSIAN = "any means and variances of independent normal coordinates"
    CONDITIONAL = "conditional on a context"
    FINITE = "finite ensemble of points"
    ENUMERATED = "weights that carry the gradient"
    PARTICLES = "particles"
    CHEAP_LOG_Q = "cheap log density at given points"
    WEIGHTED = "draws that carry unequal weights"
    LOG_Q_BOUND = "draws with a bound in place of their log density"
    NATURAL = "natural parameters of an exponential family"


@dataclasses.dataclass(frozen=True, slots=True)
class NoiseSpec:
    """The base noise of one draw of a family.

    Attributes:
        shape: Event shape of the noise of one draw; ``(0,)`` for families that use none.
        law: The base law, ``"normal"`` (standard normal) or ``"uniform"`` (on the unit interval).
    """

    shape: tuple[int, ...]
    law: Literal["normal", "uniform"] = "normal"


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """Draws of a family, with their log density and their weights.

    Attributes:
        z: Unconstrained draws, ``(..., draw, dim)``; a conditional family gives ``(..., draw, datum, dim)``.
        log_q: Log density of the draws, ``(..., draw)``, or None for a family without density.
        log_weight: Log weights over the draw axis, normalised: ``logsumexp(log_weight, -1) = 0``. Uniform for
            ordinary draws; member weights for ensembles, component weights for stratified mixtures, probabilities
            for enumerated families. ``(..., draw, datum)`` where a conditional mixture's weights depend on the datum.
        local: Draws of the local latents of the data in the batch, ``(..., draw, datum, local_dim)``, or None.
        local_log_q: Their log density given the global draw, ``(..., draw, datum)``, or None.
    """

    z: Tensor
    log_q: Tensor | None
    log_weight: Tensor
    local: Tensor | None = None
    local_log_q: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Some of the data of a model.

    Attributes:
        data: What the model's likelihood receives: a tensor, or a tuple or mapping of tensors with the datum axis
            first.
        size: Number of data in the batch.
        index: Positions of the data in the whole data set, ``(size,)``, or None where positions are unknown (streams).
        group: Group of each datum, ``(size,)``, numbered from 0 within the batch, or None unless the batch is made of
            whole groups.
        num_groups: Number of groups in the batch, or None.
    """

    data: Any
    size: int
    index: Tensor | None = None
    group: Tensor | None = None
    num_groups: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """What an objective returns; always minimised.

    Attributes:
        surrogate: Differentiated (summed over restarts); its value need not be the loss.
        value: The reported loss, detached; one number per restart.
        terms: Named parts of the value, detached, one number per restart each.
        state: What the objective carries to the next step (a Markov chain, a running scale), or None.
    """

    surrogate: Tensor
    value: Tensor
    terms: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    state: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class GameState:
    """The state of an objective that is a game: a critic, on which the fit ascends.

    Attributes:
        critic: A module with everything of the second player; its parameters get their gradients from the surrogate.
        seed: Root of whatever randomness the objective needs beyond the noise of the family (probes of a trace).
        step: Number of evaluations so far; with the seed it addresses that randomness.
    """

    critic: nn.Module
    seed: int
    step: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class LatentSpec:
    """What a family must cover, and how its numbers are stored.

    Attributes:
        dim: Number of latent coordinates.
        space: The space they live on.
        num_categories: For a discrete space, the number of categories of each coordinate.
        context_dim: Size of the context vector for conditional families, or None.
        dtype: Floating dtype of parameters and draws.
        device: Device of parameters and draws.
    """

    dim: int
    space: Space = Space.REAL
    num_categories: tuple[int, ...] | None = None
    context_dim: int | None = None
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")


@runtime_checkable
class FamilyLike(Protocol):
    """What an objective may ask of a family (see :class:`vifamily.families.Family`)."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the family can do."""

    @property
    def noise_spec(self) -> NoiseSpec:
        """The base noise of one draw."""

    def __call__(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise ``(draw, *noise_spec.shape)`` to draws."""

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density at given points; ``frozen`` stops the gradient to the family's parameters."""

    def entropy(self, context: Tensor | None = None) -> Tensor:
        """Closed-form entropy, where there is one."""


@runtime_checkable
class ModelLike(Protocol):
    """What an objective may ask of a model (see :class:`vifamily.models.Model`)."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the model can do."""

    @property
    def num_data(self) -> int | None:
        """Size of the whole data set, or None when the model does not say."""

    @property
    def reference_draws(self) -> Tensor:
        """Draws of the posterior given with the model, ``(draw, dim)``."""

    def log_joint(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log joint density on unconstrained space, ``(..., dim) -> (...)``."""

    def log_prior(self, z: Tensor) -> Tensor:
        """Log prior density on unconstrained space, Jacobian included, ``(..., dim) -> (...)``."""

    def log_likelihood(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log likelihood per datum, unscaled, ``(..., draw, dim) -> (..., draw, datum)``."""

    def log_likelihood_each(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log likelihood of each datum under a draw of its own, ``(..., draw, datum, dim) -> (..., draw, datum)``."""

    def kl_to_prior(self, family: Any) -> Tensor:
        """KL divergence of a family with Gaussian marginals to a Gaussian prior, ``(...)``."""

    def log_local(self, z: Tensor, local: Tensor, batch: Batch) -> Tensor:
        """Log of local prior times likelihood per datum, ``(..., draw, datum)``."""

    def scale(self, batch: Batch | None) -> float:
        """The one number that makes a minibatch sum unbiased: units of sampling in all over those in the batch."""
