"""A Pyro program as a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vifamily.errors import (
    ConfigError,
    DataError,
    DeviceError,
    IncompatibleError,
    ModelError,
    NotAvailableError,
    ShapeError,
)
from vifamily.models._base import BatchSource, Model, ShuffledIndex, WholeData
from vifamily.models._calls import check_callable, check_count, check_device, check_dtype
from vifamily.registry import register
from vifamily.rng import check_seed, generator
from vifamily.types import Batch, Capability

if TYPE_CHECKING:
    from vifamily.models._pyro_program import Program
    from vifamily.models._pyro_terms import Terms

__all__ = ["PyroModel"]


@register("models", "pyro")
class PyroModel(Model):
    r"""A Pyro program: its continuous latent sites, with their names, shapes and supports, are the parameters.

    The log joint is Pyro's own, with the log Jacobians of the maps to unconstrained space added. Discrete latents are
    summed out in parallel, :math:`\sum_k p(x, k, \theta)`, where Pyro can enumerate them. Draws run at once along an
    axis left of all plates where the program's code allows it, otherwise under ``torch.vmap``, otherwise one by one;
    ``notes`` says which.

    The plate that holds the observed sites is the data plate: its size is ``num_data``, and the likelihood per datum
    runs along it. Minibatches are offered where the program reads its data at the positions that the plate gives
    (``with pyro.plate("data", n) as i: … x[i]``, with or without ``subsample_size``). Latent sites inside it are local
    latents in the form that :meth:`for_batches` returns.

    Args:
        fn: The program, a function or a ``PyroModule``.
        *args: Its arguments. Floating tensors among them are converted to ``dtype``, so are numbers written in the
            program; ``notes`` says when tensors were.
        dtype: Floating dtype of latents and log joint.
        device: Where latents live.
        data_plate: Name of the data plate, where several could be meant.
        **kwargs: Its keyword arguments. A program with arguments called ``dtype``, ``device`` or ``data_plate`` must be
            wrapped in ``functools.partial`` first.

    Attributes:
        notes: How the program is run, in sentences.

    Raises:
        ModelError: If the program raises.
        IncompatibleError: If its sites change from run to run, or a discrete latent cannot be summed out.
        SupportError: If a support depends on other latents, or has no map to unconstrained space.
        DataError: If observed data are not finite, empty, or outside their support.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def program(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, tau), obs=y)
        >>> model = PyroModel(program, torch.tensor([1.0, 2.0, 4.0]))
        >>> model.layout, model.num_data
        (Layout(mu: real, tau: positive), 3)
        >>> model.log_joint(torch.zeros(2, 2, dtype=torch.float64)).shape
        torch.Size([2])
    """

    program: Program

    def __init__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        data_plate: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Pyro takes half a second to import: only those who use it wait
        from vifamily.models._pyro_program import Program
        from vifamily.models._pyro_structure import layout_of_sites

        check_callable(fn, "fn", "with Pyro primitives")
        check_dtype(dtype), check_device(device)
        notes: list[str] = []
        args = tuple(_converted(a, dtype, torch.device(device), notes) for a in args)
        kwargs = {k: _converted(v, dtype, torch.device(device), notes) for k, v in kwargs.items()}
        program = Program(fn, args, kwargs, dtype=dtype, device=torch.device(device), data_plate=data_plate)
        super().__init__(layout_of_sites(program.structure.latent), dtype=dtype, device=device)
        self.program, self.notes = program, list(dict.fromkeys(notes))
        self._num_data, self._data_plate = program.structure.num_data, data_plate
        self._data: dict[str, Tensor] | None = None
        self._probe()

    def _probe(self) -> None:
        found, program = self.program.structure, self.program
        unit = torch.rand(3, self.dim, generator=generator(0, "probe"), dtype=torch.float64)
        z = (2 * unit - 1).to(self.device, self.dtype)
        theta = self.layout.constrain(z)
        program.choose_mode(theta)
        honours = program.honours_index(theta)
        if found.subsample is not None and not honours:
            raise IncompatibleError(
                f"the plate {found.plate!r} is subsampled, but the program does not read its data at the positions it "
                f"gives. Write `with pyro.plate({found.plate!r}, …) as i:` and use data[i]."
            )
        out = {Capability.LOG_JOINT, Capability.SCORE, Capability.SECOND_ORDER, Capability.PRIOR_DRAWS}
        separate = self._prior_is_separate()
        if separate:
            out.add(Capability.PRIOR)
        if separate and found.per_datum:
            out.add(Capability.PER_DATUM)
        if found.observed:
            out.add(Capability.PREDICTIVE)
        if honours and self._enumerates_inside():
            out.add(Capability.SUBSAMPLE)
        if any(True for _ in self.parameters()):
            out.add(Capability.POINT_PARAMETERS)
        self.capabilities = frozenset(out)
        self._tell(honours=honours)
        with torch.no_grad():
            if bool(self.log_joint(z).isnan().all()):
                raise DataError(
                    "the log joint is NaN wherever it was tried; NaN in the program's inputs is the usual cause."
                )

    def _tell(self, *, honours: bool) -> None:
        found, mode, why = self.program.structure, self.program.mode, self.program.reason
        if mode == "vmap":
            self.notes.append(f"draws run under vmap: the program's code does not take an axis of draws ({why})")
        if mode == "loop":
            self.notes.append(f"draws run one by one, which is slow: neither an axis of draws nor vmap works ({why})")
        if found.discrete:
            self.notes.append(f"discrete latents are summed out: {', '.join(found.discrete)}")
        if found.plate is not None and not honours:
            self.notes.append(
                f"no minibatches: the program does not read its data at the positions that plate {found.plate!r} gives"
            )

    def _enumerated_plates(self) -> list[bool]:
        found = self.program.structure
        sites = [r for r in self.program.prototype if r.name in found.discrete]
        return [any(f.name == found.plate for f in r.frames) for r in sites]

    def _enumerates_inside(self) -> bool:
        return all(self._enumerated_plates())

    def _prior_is_separate(self) -> bool:
        """Whether every discrete latent belongs to a datum, so that summing it out leaves the prior as it is."""
        found = self.program.structure
        if not self._enumerates_inside():
            return False
        # a continuous latent inside the data plate may depend on the discrete one beside it
        return not (found.discrete and any(site.data_axis is not None for site in found.latent))

    # -- densities -----------------------------------------------------------------------------------------------------
    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        if self.local_layout is not None:
            raise NotAvailableError("this model has its local latents apart: its log joint needs them (log_local).")
        theta, log_jacobian = self.layout.constrain_with_jacobian(z)
        terms = self._terms(theta, batch)
        inside = (terms.local + terms.likelihood).sum(-1)
        return terms.prior + terms.other + self.scale(batch) * inside + log_jacobian

    def _terms(self, theta: Mapping[str, Tensor], batch: Batch | None) -> Terms:
        if batch is None:
            return self.program.whole_terms(theta)
        index = _index_of(batch)
        return self.program.terms(self.program.rows(theta, index), index)

    def _log_prior(self, z: Tensor) -> Tensor:
        theta, log_jacobian = self.layout.constrain_with_jacobian(z)
        if self.local_layout is not None:
            # what lies outside the plate does not see the local latents, so any few data and values will do
            index = torch.arange(self.program.structure.subsample or 1)
            few = self._with_local(theta, z.new_zeros(z.shape[0], len(index), self.local_dim))[0]
            terms = self.program.terms(few, index)
            return terms.prior + terms.other + log_jacobian
        if Capability.PRIOR not in self.capabilities:
            return super()._log_prior(z)
        terms = self.program.whole_terms(theta)
        prior = terms.prior + terms.local.sum(-1) + log_jacobian
        # factors outside the data plate have no datum: with a likelihood per datum they count as prior
        return prior + terms.other if Capability.PER_DATUM in self.capabilities else prior

    def _log_likelihood(self, z: Tensor, batch: Batch | None) -> Tensor:
        if Capability.PER_DATUM not in self.capabilities:
            raise NotAvailableError(
                "this program gives no likelihood per datum: that needs one plate around all observed sites (named by "
                "data_plate=), and discrete latents, if any, inside it without local latents beside them."
            )
        return self._terms(self.layout.constrain(z), batch).likelihood

    def _log_local(self, z: Tensor, local: Tensor, batch: Batch) -> Tensor:
        if self.local_layout is None:
            return super()._log_local(z, local, batch)
        theta, log_jacobian = self._with_local(self.layout.constrain(z), local)
        terms = self.program.terms(theta, _index_of(batch))
        return terms.local + terms.likelihood + log_jacobian

    def _with_local(self, theta: Mapping[str, Tensor], local: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Add local latents ``(draw, datum, local_dim)`` to the global ones, with their log Jacobian."""
        assert self.local_layout is not None  # noqa: S101 - callers have checked
        named, log_jacobian = self.local_layout.constrain_with_jacobian(local)
        out = dict(theta)
        for name, value in named.items():
            out[name] = value.movedim(1, 1 + (self.program.sites[name].data_axis or 0))
        return out, log_jacobian

    # -- minibatches ---------------------------------------------------------------------------------------------------
    def for_batches(self, batch_size: int | None) -> Model:
        """Return the form to use with minibatches: latents inside the data plate become local latents.

        Without a batch size, or without such latents, it is the model itself.
        """
        from vifamily.models._pyro_structure import layout_of_sites

        inside = tuple(s for s in self.program.structure.latent if s.data_axis is not None)
        apart = self.local_layout is not None or Capability.SUBSAMPLE not in self.capabilities
        if batch_size is None or not inside or apart:
            return self
        # draws of all latents are none of the global ones alone
        out = copy.copy(self.without_reference_draws())
        out.layout = layout_of_sites(tuple(s for s in self.program.structure.latent if s.data_axis is None))
        out.local_layout = layout_of_sites(inside, per_datum=True)
        removed = {Capability.PER_DATUM}
        out.capabilities = frozenset((out.capabilities - removed) | {Capability.LOCAL, Capability.PRIOR})
        out.notes = [*self.notes, f"local latents of each datum: {', '.join(s.name for s in inside)}"]
        return out

    def batches(self, batch_size: int | None, *, seed: int) -> BatchSource:
        """Return the source of minibatches; each holds the observed sites' values, datum axis first."""
        if batch_size is None:
            return WholeData()
        found = self.program.structure
        if Capability.SUBSAMPLE not in self.capabilities or self.num_data is None:
            why = self.notes[-1] if self.notes else "it has no plate around its data"
            raise NotAvailableError(f"this program gives no minibatches: {why}. Leave batch_size out.")
        if check_count(batch_size, "batch_size") > self.num_data:
            raise ConfigError(f"batch_size must not exceed the {self.num_data} data, got {batch_size}.")
        if found.subsample not in (None, batch_size):
            raise ConfigError(
                f"the program reads {found.subsample} data at a time (subsample_size), so batch_size must be that, got "
                f"{batch_size}. Leave subsample_size out of the program to choose freely."
            )
        return ShuffledIndex(self.num_data, batch_size, check_seed(seed), self._rows_of_data)

    def batch_at(self, index: Tensor) -> Batch:
        """Return the observed values at given positions of the data plate as a batch."""
        return Batch(self._rows_of_data(index), len(index), index)

    def _rows_of_data(self, index: Tensor) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.program.data_first(self._observed()).items()}

    def moved(self, *, device: torch.device, dtype: torch.dtype) -> PyroModel:
        """Return a copy whose latents, arguments and parameters have another device or floating dtype."""
        other = copy.deepcopy(self).to(device=device, dtype=dtype)
        other.device, other.dtype, other._data = device, dtype, None
        program = other.program
        program.device, program.dtype = device, dtype
        program.args = tuple(_moved(value, dtype, device) for value in program.args)
        program.kwargs = {key: _moved(value, dtype, device) for key, value in program.kwargs.items()}
        return other

    # -- randomness ----------------------------------------------------------------------------------------------------
    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the program's prior, on unconstrained space, ``(num_draws, dim)``."""
        check_count(num_draws, "num_draws")
        kept: list[Tensor] = []
        for _ in range(20):
            drawn = self.program.sample_prior(num_draws, self.layout.names, generator)
            z = self.layout.unconstrain(drawn) if drawn else torch.zeros(num_draws, 0, dtype=self.dtype)
            # a draw that rounds to the edge of its support has no finite coordinates: take another
            kept.append(z[torch.isfinite(z).all(-1)])
            if sum(map(len, kept)) >= num_draws:
                return torch.cat(kept)[:num_draws].to(self.device, self.dtype)
        raise ModelError("draws from the program's prior lie at the edge of their support; its scales may be extreme.")

    def predictive(self, z: Tensor, *, generator: torch.Generator, **new_inputs: Any) -> dict[str, Tensor]:
        """Draw the observed sites anew for each posterior draw.

        Args:
            z: ``(draw, dim)``.
            generator: Source of randomness.
            **new_inputs: Arguments of the program to replace, for data at other inputs (``x=x_new, y=None``); latents
                inside the data plate, which belong to the old data, are then drawn from their prior.

        Returns:
            Name of the observed site to ``(draw, *shape)``.
        """
        if Capability.PREDICTIVE not in self.capabilities:
            return super().predictive(z, generator=generator)
        if z.dim() != 2 or z.shape[-1] != self.dim:
            raise ShapeError(f"points must have shape (draw, {self.dim}), got {tuple(z.shape)}.")
        inputs = {k: _converted(v, self.dtype, self.device, []) for k, v in new_inputs.items()}
        return self.program.predict(self.layout.constrain(z.detach()), len(z), generator, inputs)

    def observed(self) -> dict[str, Tensor]:
        """Return the observed sites' values, all data."""
        return dict(self._observed())

    def with_observed(self, data: Mapping[str, Tensor]) -> PyroModel:
        """Return the same program with other observed data (see :meth:`Model.with_observed`).

        The data must be arguments of the program, each found once among them by its value.

        Raises:
            NotAvailableError: If observed data are not an argument of the program, or are so more than once.
        """
        new, own = self._checked_observed(data), self._observed()
        found = dict.fromkeys(new, 0)

        def swap(value: Any) -> Any:
            if isinstance(value, Tensor):
                for name, fresh in new.items():
                    if value.shape == own[name].shape and torch.equal(value.to(own[name]), own[name]):
                        found[name] += 1
                        return fresh.to(value)
            if type(value) in (tuple, list):
                return type(value)(swap(v) for v in value)
            return {k: swap(v) for k, v in value.items()} if type(value) is dict else value

        args, kwargs = [swap(a) for a in self.program.args], {k: swap(v) for k, v in self.program.kwargs.items()}
        for name, count in found.items():
            if count != 1:
                raise NotAvailableError(
                    f"the data of {name!r} are {'no argument' if not count else f'{count} arguments'} of the program, "
                    f"so they cannot be replaced: pass them as one, program(..., {name}), and observe obs={name}."
                )
        return PyroModel(
            self.program.function, *args, dtype=self.dtype, device=self.device, data_plate=self._data_plate, **kwargs
        )

    def _observed(self) -> dict[str, Tensor]:
        if self._data is None:
            self._data = self.program.observed()
        return self._data


def _index_of(batch: Batch) -> Tensor:
    if batch.index is None:
        raise NotAvailableError("a Pyro program reads its data by position: the batch must carry its index.")
    return batch.index


def _moved(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Tensors on another device and, where floating, in another dtype; inside tuples, lists and dicts too."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(v, dtype, device) for v in value)
    if type(value) is dict:
        return {k: _moved(v, dtype, device) for k, v in value.items()}
    return value


def _converted(value: Any, dtype: torch.dtype, device: torch.device, notes: list[str]) -> Any:
    """Floating tensors in the model's dtype, inside tuples, lists and dicts too."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if value.device != device:
            raise DeviceError(f"an argument of the program lives on {value.device}, the model on {device} (device=).")
        if value.is_floating_point() and value.dtype != dtype:
            notes.append(f"arguments of the program were converted from {value.dtype} to {dtype}")
            return value.to(dtype)
        return value
    if type(value) in (tuple, list):
        return type(value)(_converted(v, dtype, device, notes) for v in value)
    if type(value) is dict:
        return {k: _converted(v, dtype, device, notes) for k, v in value.items()}
    return value
