"""A model given by its prior and its likelihood per datum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily import rng
from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.models._base import BatchSource, Model, check_result
from vifamily.models._calls import call_seeded, check_callable, check_count, check_device, check_dtype, prior_draws
from vifamily.models._data import data_source
from vifamily.models._groups import Groups
from vifamily.models.density import layout_of
from vifamily.registry import register
from vifamily.supports import Layout
from vifamily.types import Batch, Capability, Space

__all__ = ["LikelihoodModel"]

_SMOOTH = frozenset({Capability.SCORE, Capability.SECOND_ORDER})


@register("models", "likelihood")
class LikelihoodModel(Model):
    r"""A prior and a likelihood per datum, with data that are read whole or in minibatches.

    .. math:: \log p(z) = \log p(\theta) + \log |\det \partial\theta/\partial z|
              + \frac{N}{|B|} \sum_{i \in B} \log p(x_i \mid \theta).

    With ``local=`` each datum has latents of its own, given the others:
    :math:`\log p(x_i, \lambda_i \mid \theta)` is what ``log_local`` returns.

    Args:
        log_prior: Log prior of the constrained parameters, ``theta -> (draw,)``, where ``theta`` is a dict of
            ``(draw, *shape)``, or ``z`` of ``(draw, dim)`` with ``dim=``. A pair ``(mean, sd)`` of numbers or
            ``(dim,)`` tensors is the independent normal prior, where every support is real. None where every latent is
            local.
        log_likelihood: Log likelihood of each datum, ``(theta, data) -> (draw, datum)``.
        data: A tensor, a tuple or dict of tensors with the datum axis first, a torch ``Dataset`` read by position, or a
            ``DataLoader``, which makes its own minibatches.
        parameters: Name to support, or to ``(shape, support)``.
        dim: Number of coordinates, for a prior and likelihood of ``z`` itself.
        num_data: Size of the whole data set; needed where the data do not know it (a stream).
        local: Latents of each datum, like ``parameters``.
        log_local: Log of local prior times likelihood, ``(theta, local, data) -> (draw, datum)``, where ``local`` is a
            dict of ``(draw, datum, *shape)``; their log Jacobian is added by the model.
        groups: An integer or text for each datum; data that share one belong together (an annotator, a session, a
            document). Minibatches are then made of whole groups, of ``batch_size`` data on average, and an objective
            with ``unit="group"`` treats each group as one observation.
        sample_prior: ``sample_prior(num_draws, generator)`` gives named parameters or points ``(num_draws, dim)``.
        simulate: ``simulate(theta, generator)`` gives new data, a dict of ``(draw, ...)`` or one tensor (called ``y``).
        dtype: Floating dtype; data must have it already.
        device: Where data and points live.
        name: A name for reports.

    Raises:
        ConfigError: If arguments are missing or contradict one another.
        DataError: If data are empty, not finite, or disagree in length.
        DeviceError: If data have another dtype or device than the model.
        ShapeError: If prior or likelihood do not give one number per draw (and datum).
        ModelError: If they raise.

    Example:
        >>> import torch
        >>> y = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
        >>> def log_likelihood(theta, y):
        ...     return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2
        >>> model = LikelihoodModel((0.0, 10.0), log_likelihood, data=y, parameters={"mu": "real"})
        >>> model.num_data, model.log_likelihood(torch.zeros(2, 1, dtype=torch.float64)).shape
        (3, torch.Size([2, 3]))
    """

    def __init__(
        self,
        log_prior: Callable[[Any], Tensor] | tuple[Any, Any] | None,
        log_likelihood: Callable[[Any, Any], Tensor] | None = None,
        *,
        data: Any,
        parameters: Mapping[str, Any] | None = None,
        dim: int | None = None,
        num_data: int | None = None,
        local: Mapping[str, Any] | None = None,
        log_local: Callable[[Any, Any, Any], Tensor] | None = None,
        groups: Any = None,
        sample_prior: Callable[..., Any] | None = None,
        simulate: Callable[..., Any] | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        name: str | None = None,
    ) -> None:
        _check_functions(log_prior, log_likelihood, local, log_local)
        layout = Layout([]) if log_prior is None else layout_of(dim, parameters)
        if log_prior is None and (dim is not None or parameters):
            raise ConfigError("parameters need a log_prior; leave them out where every latent is local.")
        super().__init__(layout, dtype=check_dtype(dtype), device=check_device(device))
        self.source = data_source(data, num_data, self.dtype, self.device)
        self._num_data = self.source.num_data
        self._groups = self._read_groups(groups)
        self.name, self._named = name, dim is None
        self.num_categories = layout.num_categories if layout.sites else None
        self.space = layout.space if layout.sites else Space.REAL
        self.local_layout = None if local is None else Layout.of(local)
        self.local_function, self.likelihood_function = log_local, log_likelihood
        self._normal = _normal_prior(log_prior, layout, self) if isinstance(log_prior, tuple) else None
        self.prior_function = log_prior if callable(log_prior) else None
        self._sample_prior, self._simulate = sample_prior, simulate
        self.capabilities = self._declared()
        self._probe()

    def _declared(self) -> frozenset[Capability]:
        out = {Capability.LOG_JOINT, Capability.PRIOR, Capability.SUBSAMPLE}
        out |= {Capability.LOCAL} if self.local_layout is not None else {Capability.PER_DATUM}
        out |= set() if self.space is Space.DISCRETE else _SMOOTH
        if self._normal is not None:
            out |= {Capability.GAUSSIAN_PRIOR, Capability.PRIOR_DRAWS}
        if self._sample_prior is not None:
            check_callable(self._sample_prior, "sample_prior", "sample_prior(num_draws, generator)")
            out.add(Capability.PRIOR_DRAWS)
        if self._simulate is not None:
            check_callable(self._simulate, "simulate", "simulate(theta, generator)")
            out.add(Capability.PREDICTIVE)
        if any(True for _ in self.parameters()):
            out.add(Capability.POINT_PARAMETERS)
        if self._groups is not None:
            out.add(Capability.GROUPS)
        return frozenset(out)

    def _read_groups(self, groups: Any) -> Groups | None:
        if groups is None:
            return None
        if self.source.own_batch_size is not None:
            raise ConfigError(
                "a DataLoader makes its own batches, which may cut a group: with groups= give data that can be read by "
                "position, tensors or a Dataset."
            )
        found = Groups(groups, self.source.num_data, self.device)
        self.num_groups = found.count
        return found

    def _probe(self) -> None:
        """Evaluate once on a few data, with another number of draws than of data, so that wrong axes cannot hide."""
        data = self.source.sample()
        size = (
            len(next(iter(data.values())))
            if isinstance(data, dict)
            else len(data[0] if isinstance(data, tuple) else data)
        )
        z = torch.zeros(size + 1, self.dim, dtype=self.dtype, device=self.device)
        batch = Batch(data, size)
        with torch.no_grad(), rng.scoped(0):
            self.log_prior(z)
            if self.local_layout is not None:
                self.log_local(z, z.new_zeros(size + 1, size, self.local_dim), batch)
            else:
                self.log_likelihood(z, batch)

    # -- densities -----------------------------------------------------------------------------------------------------
    def _theta(self, z: Tensor) -> Any:
        return self.layout.constrain(z) if self._named else z

    def _prior(self, theta: Any, z: Tensor) -> Tensor:
        if self._normal is not None:
            mean, sd = self._normal
            normal: Tensor = torch.distributions.Normal(mean, sd, validate_args=False).log_prob(z)
            return normal.sum(-1)
        if self.prior_function is None:
            return z.new_zeros(z.shape[0])
        out = self.prior_function(theta)
        check_result("log_prior", out, (z.shape[0],), z)  # before a sum that would broadcast a scalar
        return out

    def _likelihood(self, theta: Any, z: Tensor, batch: Batch | None) -> Tensor:
        if self.likelihood_function is None or self.local_layout is not None:
            raise NotAvailableError("this model has local latents: its likelihood needs them (log_local).")
        data = self.source.whole() if batch is None else batch.data
        out = self.likelihood_function(theta, data)
        check_result("log_likelihood", out, (z.shape[0], self._num_data if batch is None else batch.size), z)
        return out

    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        theta, log_jacobian = self.layout.constrain_with_jacobian(z) if self._named else (z, None)
        prior = self._prior(theta, z)
        prior = prior if log_jacobian is None else prior + log_jacobian
        return prior + self.scale(batch) * self._likelihood(theta, z, batch).sum(-1)

    def _log_prior(self, z: Tensor) -> Tensor:
        if not self._named:
            return self._prior(z, z)
        theta, log_jacobian = self.layout.constrain_with_jacobian(z)
        return self._prior(theta, z) + log_jacobian

    def _log_likelihood(self, z: Tensor, batch: Batch | None) -> Tensor:
        return self._likelihood(self._theta(z), z, batch)

    def _log_local(self, z: Tensor, local: Tensor, batch: Batch) -> Tensor:
        if self.local_layout is None or self.local_function is None:
            return super()._log_local(z, local, batch)
        named, log_jacobian = self.local_layout.constrain_with_jacobian(local)
        out = self.local_function(self._theta(z), named, batch.data)
        check_result("log_local", out, (z.shape[0], batch.size), z)
        return out + log_jacobian

    def gaussian_prior(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the normal prior on unconstrained space, ``(dim,)`` each."""
        if self._normal is None:
            raise NotAvailableError("the prior is not known to be normal: give log_prior=(mean, sd).")
        return self._normal

    def moved(self, *, device: torch.device, dtype: torch.dtype) -> Model:
        """Return a copy whose data and parameters have another device or floating dtype."""
        other: Any = super().moved(device=device, dtype=dtype)
        other.source.moved(dtype, device)
        if other._groups is not None:
            other._groups.moved(device)
        if self._normal is not None:
            mean, sd = self._normal
            other._normal = mean.to(device, dtype), sd.to(device, dtype)
        moved: Model = other
        return moved

    # -- randomness and data -------------------------------------------------------------------------------------------
    @property
    def own_batch_size(self) -> int | None:
        """Batch size of the DataLoader, where the data are one."""
        return self.source.own_batch_size

    def batches(self, batch_size: int | None, *, seed: int) -> BatchSource:
        """Return the source of minibatches: shuffled (whole groups, where the data have some), or a DataLoader's."""
        whole = self.source.batches(batch_size, seed=seed)
        if self._groups is None or batch_size is None:
            return whole
        return self._groups.batches(batch_size, seed=seed, gather=self.source.rows)

    def batch_at(self, index: Tensor) -> Batch:
        """Return the data at given positions as a batch."""
        rows = self.source.rows(index)
        return Batch(rows, len(index), index) if self._groups is None else self._groups.batch(rows, index)

    def groups_of(self, batch: Batch | None) -> tuple[Tensor, int]:
        """Return the group of each datum, numbered from 0 within the batch, and their number."""
        if self._groups is None:
            return super().groups_of(batch)
        if batch is None:
            return self._groups.number, self._groups.count
        if batch.group is None or batch.num_groups is None:
            raise NotAvailableError(
                "this batch cuts a group or does not say which groups it holds: take batches from the model's own "
                "batches(), or positions that make up whole groups."
            )
        return batch.group, batch.num_groups

    @property
    def group_names(self) -> tuple[Any, ...]:
        """The ids of the groups, sorted; empty without groups."""
        return () if self._groups is None else self._groups.names

    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the prior on unconstrained space, ``(num_draws, dim)``."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        if self._sample_prior is not None:
            return prior_draws(self.layout, self._sample_prior, num_draws, generator, like)
        if self._normal is None:
            return super().sample_prior(num_draws, generator=generator)
        shape = (check_count(num_draws, "num_draws"), self.dim)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return self._normal[0] + self._normal[1] * noise.to(like)

    def predictive(self, z: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw new data for each posterior draw, ``(draw, dim) -> name -> (draw, ...)``."""
        if self._simulate is None:
            return super().predictive(z, generator=generator)
        drawn = call_seeded("simulate", self._simulate, self._theta(z), generator=generator)
        out = dict(drawn) if isinstance(drawn, Mapping) else {"y": drawn}
        for key, value in out.items():
            if not isinstance(value, Tensor) or value.shape[:1] != z.shape[:1]:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"simulate must give {key!r} with {z.shape[0]} draws along its first axis, got {got}.")
        return out

    def observed(self) -> dict[str, Tensor]:
        """Return the data: by name where they have names, otherwise the last (or only) tensor as ``y``."""
        data = self.source.whole()
        if isinstance(data, Mapping):
            return {str(key): value for key, value in data.items()}
        return {"y": data[-1] if isinstance(data, tuple) else data}

    def with_observed(self, data: Mapping[str, Tensor]) -> LikelihoodModel:
        """Return a copy with other observed data (see :meth:`Model.with_observed`).

        Where data have names, all of them can be replaced; of a tuple it is the last tensor, called ``y``, and a single
        tensor is ``y`` itself.
        """
        new = self._checked_observed(data)
        whole = self.source.whole()
        if isinstance(whole, Mapping):
            named = {str(key): key for key in whole}
            joined: Any = {**whole, **{named[name]: value for name, value in new.items()}}
        elif isinstance(whole, tuple):
            joined = (*whole[:-1], new.get("y", whole[-1]))
        else:
            joined = new.get("y", whole)
        other = copy.deepcopy(self)
        other.source = data_source(joined, None, self.dtype, self.device)
        return other


def _check_functions(prior: Any, likelihood: Any, local: Any, log_local: Any) -> None:
    if (local is None) != (log_local is None):
        raise ConfigError("local latents need both local= (names with supports) and log_local= (their log density).")
    if local is None:
        check_callable(likelihood, "log_likelihood", "log_likelihood(theta, data), one number per draw and datum")
    else:
        check_callable(log_local, "log_local", "log_local(theta, local, data), one number per draw and datum")
    if prior is None and local is None:
        raise ConfigError("log_prior must be a function of the parameters or a pair (mean, sd), got None.")
    if prior is not None and not (isinstance(prior, tuple) and len(prior) == 2):
        check_callable(prior, "log_prior", "of the parameters, or a pair (mean, sd)")


def _normal_prior(pair: tuple[Any, Any], layout: Layout, model: Model) -> tuple[Tensor, Tensor]:
    if any(site.plain["kind"] != "real" for site in layout.sites):
        raise ConfigError(
            "a prior (mean, sd) needs parameters whose supports are all real; write log_prior as a function."
        )
    try:
        mean, sd = (torch.as_tensor(v, dtype=model.dtype, device=model.device).expand(model.dim).clone() for v in pair)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"a prior (mean, sd) takes numbers or tensors of shape ({model.dim},): {error}") from error
    if not bool(torch.isfinite(mean).all() and torch.isfinite(sd).all() and (sd > 0).all()):
        raise ConfigError("a prior (mean, sd) needs finite means and positive finite standard deviations.")
    return mean, sd
