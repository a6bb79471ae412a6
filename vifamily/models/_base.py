"""What every model is: named parameters with supports, a log joint, data of a known size.

Public methods take any leading axes, fold them into one draw axis before user code runs, and check what comes back.
Subclasses implement the underscored hooks on a flat draw axis.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, DeviceError, ModelError, NotAvailableError, ShapeError, VifamilyError
from vifamily.models._reference import checked_reference
from vifamily.rng import generator
from vifamily.supports import Layout
from vifamily.types import Batch, Capability, Space

__all__ = ["BatchSource", "Model", "check_result"]

_REFERENCE = "given_reference_draws"


class BatchSource(abc.ABC):
    """Minibatches addressed by step, so that a resumed fit sees the same data as an uninterrupted one.

    Attributes:
        dropped_per_epoch: Rows that an epoch leaves out because they do not fill a batch.
    """

    dropped_per_epoch: int = 0

    @abc.abstractmethod
    def at(self, step: int) -> Batch | None:
        """Return the batch of a step."""

    def index_at(self, step: int) -> Tensor | None:
        """Return the positions in the data of a step's batch, ``(batch_size,)``, or None where there are none."""
        return None


class WholeData(BatchSource):
    """Every step sees all data."""

    def at(self, step: int) -> Batch | None:
        """Return None, which models read as all data."""
        return None


class ShuffledIndex(BatchSource):
    """Epochs of shuffled batches of equal size; the shuffle of an epoch depends on the seed and the epoch alone.

    The rows left over at the end of an epoch are carried into no batch of that epoch; each epoch leaves out others, and
    ``dropped_per_epoch`` counts them.

    Args:
        num_data: Size of the data set.
        batch_size: Size of each batch.
        seed: Root seed.
        gather: From positions ``(batch_size,)`` to the batch's data.
    """

    def __init__(self, num_data: int, batch_size: int, seed: int, gather: Callable[[Tensor], Any]) -> None:
        self.num_data, self.batch_size, self.seed, self.gather = num_data, batch_size, seed, gather
        self.dropped_per_epoch = num_data % batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        index = self.index_at(step)
        return Batch(self.gather(index), self.batch_size, index)

    def index_at(self, step: int) -> Tensor:
        """Return the positions in the data of a step's batch, ``(batch_size,)``."""
        epoch, position = divmod(step, self.num_data // self.batch_size)
        if epoch != self._epoch:
            self._order = torch.randperm(self.num_data, generator=generator(self.seed, "batches", epoch))
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]


def check_result(what: str, out: Any, expected: tuple[int | None, ...], like: Tensor) -> None:
    """Check what user code returned: one number per draw (and datum), of the dtype and device of the points.

    Raises:
        ShapeError: If the shape is not the expected one (None stands for any size).
        DeviceError: If dtype or device are not those of ``like``.
    """
    if isinstance(out, Tensor) and out.shape == expected and out.dtype == like.dtype and out.device == like.device:
        return  # the common case, which runs at every step
    per = "one number per draw and datum" if len(expected) > 1 else "one number per draw"
    if not isinstance(out, Tensor):
        raise ShapeError(f"{what} must return a tensor, {per}, got {type(out).__name__}.")
    fits = len(out.shape) == len(expected) and all(
        e is None or s == e for s, e in zip(out.shape, expected, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"{what} must return shape {expected}, {per}, but gave {tuple(out.shape)} for {like.shape[0]} draws. "
            "A missing sum over the last axis, or (N,) against (N, 1), is the usual cause."
        )
    if out.dtype != like.dtype or out.device != like.device:
        raise DeviceError(
            f"{what} must be {like.dtype} on {like.device}, like the points it is given, but is {out.dtype} on "
            f"{out.device}. "
            "Give data, parameters and model one dtype and device (dtype=, device=)."
        )


class Model(nn.Module, abc.ABC):
    """A Bayesian problem.

    Args:
        layout: Named parameters, their supports and places in ``z``.
        num_data: Size of the data set, or None when the model does not say (then no minibatches).
        dtype: Floating dtype of the log joint.
        device: Device of the model's data.

    Attributes:
        capabilities: What the model can do.
    """

    capabilities: frozenset[Capability] = frozenset({Capability.LOG_JOINT, Capability.SCORE, Capability.SECOND_ORDER})
    space: Space = Space.REAL
    num_categories: tuple[int, ...] | None = None
    local_layout: Layout | None = None
    """Layout of one datum's local latents, for models that have them apart."""
    num_groups: int | None = None
    """Number of groups of the data, where they have some."""

    def __init__(
        self,
        layout: Layout,
        *,
        num_data: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.layout, self.dtype, self.device = layout, dtype, torch.device(device)
        self._num_data = num_data

    # -- hooks, on a flat draw axis ------------------------------------------------------------------------------------
    @abc.abstractmethod
    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        """Log joint on unconstrained space, likelihood scaled to the whole data set, ``(draw, dim) -> (draw,)``."""

    def _log_prior(self, z: Tensor) -> Tensor:
        """Log prior, Jacobian included, ``(draw, dim) -> (draw,)``."""
        raise NotAvailableError(f"the model {type(self).__name__} does not give its prior apart from its likelihood.")

    def _log_likelihood(self, z: Tensor, batch: Batch | None) -> Tensor:
        """Unscaled log likelihood per datum, ``(draw, dim) -> (draw, datum)``."""
        raise NotAvailableError(f"the model {type(self).__name__} does not give its likelihood per datum.")

    def _log_local(self, z: Tensor, local: Tensor, batch: Batch) -> Tensor:
        """Log of local prior times likelihood per datum, ``(draw, dim), (draw, datum, local_dim) -> (draw, datum)``."""
        raise NotAvailableError(f"the model {type(self).__name__} has no local latents.")

    # -- shape of the problem ------------------------------------------------------------------------------------------
    @property
    def dim(self) -> int:
        """Number of unconstrained coordinates."""
        return self.layout.dim

    @property
    def local_dim(self) -> int:
        """Number of unconstrained coordinates of one datum's local latents, 0 without any."""
        return 0 if self.local_layout is None else self.local_layout.dim

    @property
    def num_data(self) -> int | None:
        """Size of the whole data set, or None when the model does not say."""
        return self._num_data

    def scale(self, batch: Batch | None) -> float:
        """``num_data / batch.size``; 1 for all data. The only place where the minibatch scale is computed.

        Of a batch of whole groups it is the number of groups in all over that in the batch: groups are what was
        sampled, and their sizes may differ.

        Raises:
            NotAvailableError: If a batch is given and the model does not state ``num_data``.
        """
        if batch is None:
            return 1.0
        if self.num_data is None:
            raise NotAvailableError("a minibatch needs the size of the whole data set: give the model num_data=.")
        if batch.num_groups is not None and self.num_groups is not None:
            return self.num_groups / batch.num_groups
        return self.num_data / batch.size

    def groups_of(self, batch: Batch | None) -> tuple[Tensor, int]:
        """Return the group of each datum, ``(datum,)`` numbered from 0 within the batch, and the number of groups.

        Raises:
            NotAvailableError: If the model's data have no groups, or the batch cuts one.
        """
        raise NotAvailableError(
            f"the data of the model {type(self).__name__} have no groups: write it as "
            "LikelihoodModel(..., groups=ids) with one id per datum."
        )

    # -- densities -----------------------------------------------------------------------------------------------------
    def log_joint(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Log joint density on unconstrained space, up to the log evidence.

        Args:
            z: ``(..., dim)``.
            batch: The data to use, or None for all; the likelihood is scaled by :meth:`scale`.

        Returns:
            ``(...)``.

        Raises:
            ShapeError: If ``z`` or what the model returns has the wrong shape.
            ModelError: If user code raises.
        """
        return self._folded("the log joint", lambda flat: self._log_joint(flat, batch), z, ())

    def log_prior(self, z: Tensor) -> Tensor:
        """Log prior density on unconstrained space, Jacobian included, ``(..., dim) -> (...)``."""
        return self._folded("the log prior", self._log_prior, z, ())

    def log_likelihood(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Unscaled log likelihood per datum, ``(..., dim) -> (..., datum)``."""
        size = self.num_data if batch is None else batch.size
        return self._folded("the log likelihood", lambda flat: self._log_likelihood(flat, batch), z, (size,))

    def log_likelihood_each(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Unscaled log likelihood of each datum under a point of its own, ``(..., datum, dim) -> (..., datum)``.

        Where every datum may have its own draw, the sum over data is less noisy than under a draw for all.

        Raises:
            NotAvailableError: If the model would compute it no cheaper than point by point.
        """
        size = self.num_data if batch is None else batch.size
        if z.shape[-2:] != (size, self.dim):
            raise ShapeError(
                f"the log likelihood of each datum needs points of shape (..., {size}, {self.dim}), one for each, "
                f"got {tuple(z.shape)}."
            )
        flat = z.reshape(-1, *z.shape[-2:])
        out = self._log_likelihood_each(flat, batch)
        check_result("the log likelihood of each datum", out, (flat.shape[0], size), flat)
        return out.reshape(z.shape[:-1])

    def _log_likelihood_each(self, z: Tensor, batch: Batch | None) -> Tensor:
        """As :meth:`log_likelihood_each`, ``(draw, datum, dim) -> (draw, datum)``."""
        raise NotAvailableError(f"the model {type(self).__name__} takes no noise per example.")

    def gaussian_prior(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the normal prior on unconstrained space, ``(dim,)`` each.

        Raises:
            NotAvailableError: If the prior is not known to be independent normal.
        """
        raise NotAvailableError(f"the model {type(self).__name__} has no prior that is known to be normal.")

    def kl_to_prior(self, family: Any) -> Tensor:
        """Divergence of a Gaussian family from the normal prior in closed form, one number per restart.

        Args:
            family: A family with closed-form marginal moments and entropy.

        Raises:
            NotAvailableError: If the prior is not normal.
        """
        mean, own_variance = family.marginals()
        prior_mean, prior_sd = self.gaussian_prior()
        variance = prior_sd**2
        spread = (own_variance + (mean - prior_mean) ** 2) / variance
        log_det = 2 * family.entropy() - mean.shape[-1] * (1 + torch.log(variance.new_tensor(2 * torch.pi)))
        kl: Tensor = 0.5 * (spread.sum(-1) - mean.shape[-1] + variance.log().expand_as(mean).sum(-1) - log_det)
        return kl

    def log_local(self, z: Tensor, local: Tensor, batch: Batch) -> Tensor:
        """Log of local prior times likelihood per datum, ``(..., dim), (..., datum, local_dim) -> (..., datum)``."""
        flat_local = local.reshape(-1, *local.shape[-2:])
        return self._folded(
            "the local log joint", lambda flat: self._log_local(flat, flat_local, batch), z, (batch.size,)
        )

    def _folded(
        self, what: str, function: Callable[[Tensor], Tensor], z: Tensor, event: tuple[int | None, ...]
    ) -> Tensor:
        if z.shape[-1:] != (self.dim,):
            raise ShapeError(f"{what} needs points of shape (..., {self.dim}), got {tuple(z.shape)}.")
        flat = z if z.dim() == 2 else z.reshape(math.prod(z.shape[:-1]), self.dim)
        try:
            out = function(flat)
        except VifamilyError:
            raise
        except Exception as error:
            axes = isinstance(error, RuntimeError) and "size of tensor" in str(error)
            hint = " (axes are (draw, datum, ...); (N,) against (N, 1) is a usual cause)" if axes else ""
            raise ModelError(
                f"the model raised while computing {what} for z of shape {tuple(flat.shape)}{hint}: "
                f"{type(error).__name__}: {error}"
            ) from error
        check_result(what, out, (flat.shape[0], *event), flat)
        return out if z.dim() == 2 else out.reshape((*z.shape[:-1], *out.shape[1:]))

    # -- names ---------------------------------------------------------------------------------------------------------
    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map unconstrained ``(..., dim)`` to named constrained parameters ``(..., *shape)``."""
        return self.layout.constrain(z)

    def unconstrain(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Map named constrained parameters ``(..., *shape)`` to unconstrained ``(..., dim)``."""
        return self.layout.unconstrain(theta)

    # -- randomness and data -------------------------------------------------------------------------------------------
    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the prior on unconstrained space, ``(num_draws, dim)``."""
        raise NotAvailableError(f"the model {type(self).__name__} cannot draw from its prior.")

    def predictive(self, z: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw new data for each posterior draw, ``(draw, dim) -> name -> (draw, ...)``."""
        raise NotAvailableError(f"the model {type(self).__name__} cannot draw new data.")

    def observed(self) -> dict[str, Tensor]:
        """Return the observed data under the names that :meth:`predictive` uses."""
        raise NotAvailableError(f"the model {type(self).__name__} does not name its observed data.")

    def with_observed(self, data: Mapping[str, Tensor]) -> Model:
        """Return a copy of this model with other observed data, under the names that :meth:`observed` uses.

        What is not observed (inputs, sizes) stays; this model is left as it is. Draws of :meth:`predictive`, one data
        set at a time, are such data.

        Args:
            data: Name to data of the same shape; names that are left out keep their data.

        Raises:
            NotAvailableError: If the model does not know where its observed data are.
            ConfigError: If a name is not that of observed data.
            ShapeError: If a shape differs.
        """
        raise NotAvailableError(f"the model {type(self).__name__} cannot be given other data: make it anew with them.")

    def _checked_observed(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New observed data in the model's dtype on its device, names and shapes checked."""
        own = self.observed()
        out = {}
        for name, value in data.items():
            if name not in own:
                raise ConfigError(f"the model observes {', '.join(own) or 'nothing'}; there is no {name!r} to replace.")
            old = own[name]
            if not isinstance(value, Tensor) or value.shape != old.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"the new {name!r} must have the shape of the old, {tuple(old.shape)}, got {got}.")
            out[name] = value.detach().to(old.device, old.dtype)
        return out

    @property
    def reference_draws(self) -> Tensor:
        """Draws of the posterior on unconstrained space that were given with the model, ``(draw, dim)``.

        Raises:
            NotAvailableError: If none were given.
        """
        draws = self._buffers.get(_REFERENCE)
        if draws is None:
            raise NotAvailableError(
                f"the model {type(self).__name__} carries no reference draws: give it some, of a long Markov chain for "
                "example, by model.with_reference_draws(draws)."
            )
        return draws

    def with_reference_draws(self, draws: Any) -> Self:
        """Return this model with draws of its posterior, for objectives that learn from them.

        The copy shares the data and the parameters of the model; a saved posterior does not hold the draws.

        Args:
            draws: Points on unconstrained space, ``(draw, dim)``, or named constrained parameters ``(draw, *shape)``;
                tensors or arrays, at least two draws, equally weighted. They are converted to the model's dtype.

        Returns:
            A copy with the capability ``REFERENCE_DRAWS``.

        Raises:
            ShapeError: If the shape is not ``(draw, dim)``, or not that of the parameters.
            DataError: If they are not numbers, or not finite on unconstrained space.
            SupportError: If named parameters lie outside their supports, or categories do not exist.
            ConfigError: If names are missing or unknown.

        Example:
            >>> import torch, vifamily as vf
            >>> model = vf.models.Density(lambda theta: -theta["tau"], parameters={"tau": "positive"})
            >>> model.with_reference_draws({"tau": [1.0, 2.0]}).reference_draws
            tensor([[0.0000],
                    [0.6931]], dtype=torch.float64)
        """
        checked = checked_reference(draws, self.layout, self.dtype, self.device)
        other = copy.copy(self)
        # a shallow copy of a module shares its tables
        other._buffers = dict(self._buffers)
        other._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        other.register_buffer(_REFERENCE, checked, persistent=False)
        other.capabilities = self.capabilities | {Capability.REFERENCE_DRAWS}
        return other

    def without_reference_draws(self) -> Self:
        """Return this model without reference draws: itself, where it has none."""
        if _REFERENCE not in self._buffers:
            return self
        other = copy.copy(self)
        other._buffers = {name: value for name, value in self._buffers.items() if name != _REFERENCE}
        other.capabilities = self.capabilities - {Capability.REFERENCE_DRAWS}
        return other

    def start(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Return starting points on unconstrained space, ``(num_draws, dim)``: the prior, or uniform on (-2, 2)."""
        if Capability.PRIOR_DRAWS in self.capabilities:
            return self.sample_prior(num_draws, generator=generator).to(self.device, self.dtype)
        unit = torch.rand(num_draws, self.dim, generator=generator, dtype=torch.float64)
        return (4 * unit - 2).to(self.device, self.dtype)

    def initial_gaussian(self, *, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviations ``(dim,)`` where a fit should begin, or None to look for them.

        For models whose own start is better than a mode or a prior draw, as that of a network is.
        """
        return None

    def check_start(self, mean: Tensor, sd: Tensor) -> None:
        """Warn where a fit that begins at these moments, ``(dim,)`` each, is known to get nowhere.

        It is asked about starts from outside: a given point, or the prior.
        """

    @property
    def own_batch_size(self) -> int | None:
        """Size of the batches in which the data arrive; None where all data can be had at once."""
        return None

    def by_likelihood(self) -> Model:
        """Return this model for objectives that evaluate its log joint; itself, except for simulators."""
        return self

    def for_batches(self, batch_size: int | None) -> Model:
        """Return the model to use with minibatches of this size: itself, or a form with its local latents apart."""
        return self

    def batches(self, batch_size: int | None, *, seed: int) -> BatchSource:
        """Return the source of minibatches; None means all data at every step."""
        if batch_size is None:
            return WholeData()
        raise NotAvailableError(
            f"minibatches need a model in likelihood form with num_data; {type(self).__name__} is not. "
            "Write it as LikelihoodModel(log_prior, log_likelihood, data=...), or leave batch_size out."
        )

    def batch_at(self, index: Tensor) -> Batch:
        """Return the data at given positions as a batch.

        Raises:
            NotAvailableError: If the model's data have no positions.
        """
        raise NotAvailableError(f"the data of the model {type(self).__name__} cannot be asked for by position.")

    def moved(self, *, device: torch.device, dtype: torch.dtype) -> Model:
        """Return a copy whose data and parameters have another device or floating dtype.

        What a user's function holds in its closure stays as it is; a result of another dtype or device is refused when
        it arrives.
        """
        other = copy.deepcopy(self).to(device=device, dtype=dtype)
        other.device, other.dtype = device, dtype
        return other

    def point_parameters(self) -> Iterable[nn.Parameter]:
        """Return the point-estimated parameters of the model (the group ``model``)."""
        return self.parameters()
