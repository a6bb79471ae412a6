"""What every family is: an entry that builds a module, and the module itself.

An entry (a frozen dataclass in a file of its own) holds hyper-parameters and builds a :class:`Family` for a
:class:`~vifamily.types.LatentSpec`. A family maps noise to draws, and gives their log density where there is one.
Continuous families work in standardised coordinates ``u``: ``z = shift + scale u`` with a fixed affine map set once by
:meth:`Family.precondition`. Affine families are unchanged as sets of distributions by a map of their own kind; what
changes is how well an optimiser sees them.
"""

from __future__ import annotations

import abc
import copy
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vifamily.errors import IncompatibleError, NotAvailableError, ShapeError
from vifamily.rng import draw_noise
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec, Space

__all__ = ["Family", "FamilyEntry", "uniform_log_weight"]


def uniform_log_weight(log_q_or_z: Tensor, num_draws: int) -> Tensor:
    """Return ``-log num_draws`` for each draw, with the dtype and device of its first argument."""
    return log_q_or_z.new_full((num_draws,), -math.log(num_draws))


class FamilyEntry(abc.ABC):
    """Hyper-parameters of a family; builds the family once the latent space is known.

    Subclasses are frozen dataclasses marked with ``@register("families", name)``.
    """

    space: ClassVar[Space] = Space.REAL
    capabilities: ClassVar[frozenset[Capability]] = frozenset()
    """What the built families can do at least, known before building (used to list what would work)."""
    restrict_scale: ClassVar[bool] = False
    """True when only a per-coordinate rescaling leaves the family unchanged (mean field)."""
    log_q_is_bound: ClassVar[bool] = False
    """True when the log density of draws is a stochastic bound, so that it differs from ``log_prob`` at the draws."""
    given: ClassVar[bool] = False
    """True for a module of the user's own, used as it stands: neither preconditioned nor started anew."""

    @abc.abstractmethod
    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> Family:
        """Build the family.

        Args:
            latent: What must be covered.
            generator: Randomness of the initial parameters.

        Returns:
            A module whose parameters have ``latent.dtype`` on ``latent.device``.

        Raises:
            IncompatibleError: If the family cannot cover this space (wrong space, context not supported).
            ConfigError: If a hyper-parameter does not fit the space (rank above dimension).
        """

    def for_given_points(self) -> FamilyEntry:
        """Return the form of this entry that suits an objective which evaluates the density at given points only."""
        return self

    def for_pairs(self) -> FamilyEntry:
        """Return the form of this entry that suits a fit to pairs of points and contexts (amortised inference)."""
        return self

    def check_space(self, latent: LatentSpec) -> None:
        """Refuse a space the family does not live on, or a context it cannot take."""
        from vifamily.registry import entry_name

        if latent.space is not self.space:
            hint = ""
            if self.space is Space.CIRCLE and latent.space is Space.REAL:
                hint = " Angles are declared by a von Mises prior, or by their support: parameters={'theta': 'circle'}."
            elif latent.space is Space.CIRCLE:
                hint = " Angles have natural(kind='von_mises'); declared as 'real', they are numbers like others."
            raise IncompatibleError(
                f"the family {entry_name(self)!r} lives on the {self.space} space, "
                f"but the model's latents are {latent.space}.{hint}",
                missing=(str(latent.space),),
            )
        if latent.context_dim is not None and Capability.CONDITIONAL not in self.capabilities:
            raise IncompatibleError(
                f"the family {entry_name(self)!r} has no conditional version, "
                f"but a context of size {latent.context_dim} was given.",
                missing=(str(Capability.CONDITIONAL),),
            )


class Family(nn.Module, abc.ABC):
    """A variational distribution over ``z``.

    Subclasses implement :meth:`transform` (noise to standardised draws) and, where a density exists,
    :meth:`log_density`; the affine map, freezing and checks live here. A third-party family may instead implement
    ``forward`` and ``log_prob`` directly.

    Args:
        latent: What is covered.
    """

    capabilities: frozenset[Capability] = frozenset()
    noise_spec: NoiseSpec
    vectorised: bool = True
    """Whether restarts can be run through ``torch.func.vmap``; others are looped over."""
    step_size: float = 0.05
    """First step size that suits the family in its standardised coordinates."""
    pairs_step_size: float = 0.004
    """First step size that suits a fit to pairs of points and contexts (amortised inference)."""
    log_q_is_bound: bool = False
    """See :attr:`FamilyEntry.log_q_is_bound`."""

    def __init__(self, latent: LatentSpec) -> None:
        super().__init__()
        self.latent = latent
        self.spec: str | None = None
        self.guessed_covariance: Tensor | None = None
        options: dict[str, Any] = {"dtype": latent.dtype, "device": latent.device}
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(latent.dim, **options))
        # (dim,) for a per-coordinate map, (dim, dim) lower triangular for a full one
        self.register_buffer("scale", torch.ones(latent.dim, **options))

    # -- to implement ------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws in standardised coordinates, with their log density there.

        Args:
            noise: ``(draw, *noise_spec.shape)``; with a context ``(draw, datum, *noise_spec.shape)``.
            context: None or ``(datum, context_dim)``.
        """

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in standardised coordinates, ``(..., dim) -> (...)``."""
        raise NotAvailableError(f"the family {type(self).__name__} has no density: it is a sampler only.")

    def standard_entropy(self, context: Tensor | None) -> Tensor:
        """Entropy in standardised coordinates, closed form."""
        raise NotAvailableError(f"the family {type(self).__name__} has no closed-form entropy.")

    def standard_moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``(dim,)`` and covariance ``(dim, dim)`` in standardised coordinates, closed form."""
        raise NotAvailableError(f"the family {type(self).__name__} has no closed-form moments.")

    def start_at(self, mean: Tensor, scale: Tensor) -> None:
        """Set the parameters so that the family is, or is near, a Gaussian in standardised coordinates.

        Args:
            mean: ``(dim,)``.
            scale: ``(dim,)`` standard deviations, or ``(dim, dim)`` a lower-triangular factor of the covariance.
        """
        raise NotAvailableError(f"the family {type(self).__name__} cannot be started at given moments.")

    def start_from(self, z: Tensor, context: Tensor, bounded: Tensor) -> bool:
        """Set the start of a conditional family from points and their contexts; False where it has no such start.

        Args:
            z: Points, ``(pair, dim)``.
            context: Their contexts, ``(pair, context_dim)``.
            bounded: Which coordinates are logits of a number between two bounds, ``(dim,)``.
        """
        return False

    def check_context(self, context: Tensor | None) -> None:
        """Refuse a context where none was declared, and its absence where one was.

        Raises:
            IncompatibleError: If the family was built without a context and one is given.
            ShapeError: If the context is missing or is not ``(datum, context_dim)``.
        """
        declared = self.latent.context_dim
        if declared is None and context is not None:
            raise IncompatibleError(
                f"this {type(self).__name__} was built without a context, but one of shape {tuple(context.shape)} was "
                "given. Build it with context_dim= in its LatentSpec.",
                missing=(str(Capability.CONDITIONAL),),
            )
        if declared is not None and (context is None or context.dim() != 2 or context.shape[-1] != declared):
            got = "none" if context is None else tuple(context.shape)
            raise ShapeError(
                f"{type(self).__name__} is conditional: give a context of shape (datum, {declared}), got {got}."
            )

    def fewest_fixed_draws(self) -> int | None:
        """Fewest draws, in mirrored pairs, on which a loss has a bounded optimum when the draws stay fixed.

        None where no number is enough, or none is known: such a family is fitted on fresh draws only.
        """
        return None

    # -- derived -----------------------------------------------------------------------------------------------------
    @property
    def dim(self) -> int:
        """Number of latent coordinates."""
        return self.latent.dim

    def _log_scale(self) -> Tensor:
        diagonal = self.scale if self.scale.dim() == 1 else self.scale.diagonal()
        return diagonal.abs().log().sum()

    def coordinate_scale(self) -> Tensor:
        """Size of a standardised unit in each coordinate of ``z``, ``(dim,)``."""
        return self.scale if self.scale.dim() == 1 else self.scale.norm(dim=-1)

    def to_latent(self, u: Tensor) -> Tensor:
        """Map standardised coordinates to ``z``."""
        return self.shift + (u * self.scale if self.scale.dim() == 1 else u @ self.scale.T)

    def to_standard(self, z: Tensor) -> Tensor:
        """Map ``z`` to standardised coordinates."""
        centred = z - self.shift
        if self.scale.dim() == 1:
            return centred / self.scale
        flat = centred.reshape(-1, self.dim)
        solved: Tensor = torch.linalg.solve_triangular(self.scale, flat.T, upper=False)
        return solved.T.reshape(centred.shape)

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise to draws.

        Args:
            noise: ``(draw, *noise_spec.shape)``, or ``(draw, datum, *noise_spec.shape)`` with a context.
            context: None, or ``(datum, context_dim)`` for a conditional family.

        Returns:
            Draws on unconstrained space, log density, weights.
        """
        rank = (1 if context is None else 2) + len(self.noise_spec.shape)
        if noise.dim() != rank or tuple(noise.shape[1 if context is None else 2 :]) != self.noise_spec.shape:
            leading = "draw" if context is None else "draw, datum"
            event = "".join(f", {n}" for n in self.noise_spec.shape)
            raise ShapeError(
                f"{type(self).__name__} needs noise of shape ({leading}{event}), got {tuple(noise.shape)}."
            )
        draw = self.transform(noise, context)
        if self.latent.space is not Space.REAL:
            return draw
        log_q = None if draw.log_q is None else draw.log_q - self._log_scale()
        return Draw(self.to_latent(draw.z), log_q, draw.log_weight)

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density at given points.

        Args:
            z: ``(..., dim)``.
            context: As in :meth:`forward`.
            frozen: Stop the gradient to the family's parameters, not to ``z`` (sticking the landing, doubly
                reparameterised gradients).

        Returns:
            ``(...)``.

        Raises:
            NotAvailableError: If the family has no density.
            ShapeError: If the last axis of ``z`` is not ``dim``.
        """
        if z.shape[-1:] != (self.dim,):
            raise ShapeError(f"log_prob needs points of shape (..., {self.dim}), got {tuple(z.shape)}.")
        if frozen:
            detached = {"family." + name: p.detach() for name, p in self.named_parameters()}
            out: Tensor = torch.func.functional_call(_LogProb(self), detached, (z, context))
            return out
        if self.latent.space is not Space.REAL:
            return self.log_density(z, context)
        return self.log_density(self.to_standard(z), context) - self._log_scale()

    def entropy(self, context: Tensor | None = None) -> Tensor:
        """Closed-form entropy, a scalar (``(datum,)`` with a context).

        Raises:
            NotAvailableError: If there is no closed form.
        """
        return self.standard_entropy(context) + self._log_scale()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``(dim,)`` and covariance ``(dim, dim)`` of ``z``, closed form.

        Raises:
            NotAvailableError: If there is no closed form.
        """
        mean, cov = self.standard_moments()
        matrix = torch.diag(self.scale) if self.scale.dim() == 1 else self.scale
        return self.to_latent(mean), matrix @ cov @ matrix.T

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Means and variances ``(dim,)`` of each coordinate of ``z``, closed form.

        Raises:
            NotAvailableError: If there is no closed form.
        """
        mean, covariance = self.moments()
        return mean, covariance.diagonal()

    def precondition(self, shift: Tensor, scale: Tensor, covariance: Tensor | None = None) -> None:
        """Set the fixed affine map ``z = shift + scale u``; the distribution of ``u`` stays as it is.

        Args:
            shift: ``(dim,)``.
            scale: ``(dim,)`` or lower-triangular ``(dim, dim)``.
            covariance: A guess at the posterior's covariance ``(dim, dim)`` in ``z``, for
                :meth:`inverse_curvature`.
        """
        self.guessed_covariance = None
        if covariance is not None and scale.dim() == 1:
            self.guessed_covariance = (covariance / scale / scale[:, None]).to(self.shift)
        self.shift = shift.detach().to(self.shift).clone()
        # Products round by memory layout: contiguous, as a loaded map is, so that both give the same draws.
        self.scale = scale.detach().to(self.shift).clone(memory_format=torch.contiguous_format)

    def inverse_curvature(self) -> dict[str, float | Tensor] | None:
        """Roughly the inverse Hessian of the reverse KL divergence in each parameter, where the posterior is Gaussian.

        A number stands for a multiple of the identity; parameters are taken as independent of one another. Solvers
        that learn the curvature start from it. None: nothing is known.
        """
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the affine map may be per coordinate here and full in what is loaded, or the other way round
        saved = state_dict.get(prefix + "scale")
        if saved is not None and saved.dim() in (1, 2) and saved.shape[0] == self.dim:
            self.scale = torch.empty_like(saved, dtype=self.scale.dtype, device=self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def sample(self, num_draws: int, *, generator: torch.Generator, context: Tensor | None = None) -> Tensor:
        """Draw ``num_draws`` equally weighted points, ``(num_draws, [datum,] dim)``.

        Families whose draws carry weights are resampled by them.
        """
        leading = (num_draws,) if context is None else (num_draws, context.shape[0])
        noise = draw_noise(self.noise_spec, leading, generator, dtype=self.latent.dtype, device=self.latent.device)
        draw: Draw = self(noise, context)
        if Capability.WEIGHTED not in self.capabilities:
            return draw.z
        weight = draw.log_weight.exp().to(device=generator.device)
        chosen = torch.multinomial(weight, num_draws, replacement=True, generator=generator)
        return draw.z[chosen.to(draw.z.device)]

    def copy(self) -> Family:
        """Return a deep copy."""
        return copy.deepcopy(self)


class _LogProb(nn.Module):
    """Makes ``log_prob`` callable through ``torch.func.functional_call``, which only knows ``forward``."""

    def __init__(self, family: Any) -> None:
        super().__init__()
        self.family = family

    def forward(self, z: Tensor, context: Tensor | None) -> Tensor:
        out: Tensor = self.family.log_prob(z, context)
        return out
