"""A Pyro program as a function of its latents: terms of its log joint, draws of its sites."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, IncompatibleError, ModelError, VifamilyError
from vifamily.models._pyro_messengers import Collector, PointParameters, Record, foreign, run_program
from vifamily.models._pyro_structure import LatentSite, find_structure
from vifamily.models._pyro_terms import NotBatchedError, Terms, gather_terms

__all__ = ["Program"]

Mode = Literal["batched", "vmap", "loop"]
_MODES: tuple[Mode, ...] = ("batched", "vmap")


class Program(nn.Module):
    """A Pyro program run at given values of its latents.

    Draws run at once along an axis left of every plate where the program's code allows it, else under ``torch.vmap``,
    else one by one; which, is found by comparing on a few points.

    Args:
        function: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        dtype: Floating dtype of the latents and of constants in the program.
        device: Device of the latents.
        data_plate: Name of the plate that holds the data, where several could be meant.

    Attributes:
        structure: What the program is made of.
        mode: How draws are run.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        data_plate: str | None,
    ) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, dict(kwargs)
        self.dtype, self.device = dtype, device
        self.point_parameters = PointParameters()
        self.structure, self.prototype = find_structure(
            function, args, self.kwargs, self.point_parameters, dtype, data_plate
        )
        self.sites: dict[str, LatentSite] = {site.name: site for site in self.structure.latent}
        self.mode: Mode = "loop"
        self.reason = ""
        self._seed: int | None = None  # set where the program draws numbers of its own

    # -- densities -----------------------------------------------------------------------------------------------------
    def terms(self, theta: Mapping[str, Tensor], index: Tensor | None) -> Terms:
        """Evaluate the terms of the log joint.

        Args:
            theta: Latents ``(draw, *shape)``, those inside the data plate for the data of the index alone.
            index: Positions of the data, or None for what the program reads by itself (all, unless it subsamples).
        """
        with foreign(self.dtype, self._seed):
            return self._terms(theta, index, self.mode)

    def _terms(self, theta: Mapping[str, Tensor], index: Tensor | None, mode: Mode) -> Terms:
        if mode == "batched":
            nesting = self.structure.nesting
            return self._run({n: self.sites[n].aligned(v, nesting) for n, v in theta.items()}, index, _size(theta))
        if mode == "vmap":
            return self._gather(self._mapped(theta, index), index, _size(theta), next(iter(theta.values())))
        singles = [self._single({n: v[i] for n, v in theta.items()}, index) for i in range(_size(theta))]
        return Terms(*(torch.stack(part) for part in zip(*singles, strict=True)))

    def _single(self, theta: Mapping[str, Tensor], index: Tensor | None) -> Terms:
        return Terms(*(part.squeeze(0) for part in self._run(theta, index, 1)))

    def _mapped(self, theta: Mapping[str, Tensor], index: Tensor | None) -> list[Record]:
        """Sites of all draws by ``vmap``; only the program itself runs under it, not the sums over its sites."""
        met: list[Record] = []

        def single(one: dict[str, Tensor]) -> tuple[Tensor, ...]:
            met[:] = self._records(one, index)
            return tuple(torch.as_tensor(record.log_prob) for record in met)

        # randomness="same" lets programs draw numbers that they then do not use
        mapped = torch.vmap(single, randomness="same")(dict(theta))
        place = self.structure.nesting
        return [
            dataclasses.replace(record, log_prob=_draws_before(value, place))
            for record, value in zip(met, mapped, strict=True)
        ]

    def _run(self, values: Mapping[str, Tensor], index: Tensor | None, draws: int) -> Terms:
        return self._gather(self._records(values, index), index, draws, next(iter(values.values())))

    def _records(self, values: Mapping[str, Tensor], index: Tensor | None) -> list[Record]:
        found = self.structure
        collector = Collector(values, self.point_parameters, plate=found.plate, index=index)
        return run_program(self.function, collector, self.args, self.kwargs, enumerate_from=found.enumerate_from)

    def _gather(self, records: list[Record], index: Tensor | None, draws: int, like: Tensor) -> Terms:
        found = self.structure
        size, scale = 0, 1.0
        if found.plate is not None and found.num_data is not None:
            size = len(index) if index is not None else found.subsample or found.num_data
            scale = found.num_data / size
        return gather_terms(
            records, draws=draws, nesting=found.nesting, plate=found.plate, size=size, scale=scale, like=like
        )

    def whole_terms(self, theta: Mapping[str, Tensor]) -> Terms:
        """Evaluate the terms over all data, in pieces where the program reads only some at a time."""
        chunks = self.structure.chunks()
        if chunks == [None]:
            return self.terms(theta, None)
        pieces, done = [], 0
        for index in chunks:
            assert index is not None  # noqa: S101 - for the type checker
            part = self.terms(self.rows(theta, index), index)
            fresh = slice(done - int(index[0]), None)  # the last piece may repeat data of the one before
            pieces.append(Terms(part.prior, part.other, part.local[:, fresh], part.likelihood[:, fresh]))
            done = int(index[-1]) + 1
        first = pieces[0]
        local, likelihood = (torch.cat([getattr(p, name) for p in pieces], 1) for name in ("local", "likelihood"))
        return Terms(first.prior, first.other, local, likelihood)

    def rows(self, theta: Mapping[str, Tensor], index: Tensor | None) -> dict[str, Tensor]:
        """Select the data of an index in the latents inside the data plate."""
        if index is None:
            return dict(theta)
        out = {}
        for name, value in theta.items():
            axis = self.sites[name].data_axis
            out[name] = value if axis is None else value.index_select(axis + 1, index.to(value.device))
        return out

    # -- how draws are run ---------------------------------------------------------------------------------------------
    def choose_mode(self, theta: Mapping[str, Tensor]) -> None:
        """Take the fastest way of running draws that agrees with running them one by one.

        Raises:
            ModelError: If the program raises at a single draw.
            IncompatibleError: If it cannot be evaluated at all.
        """
        index = self.structure.chunks()[0]
        theta = self.rows(theta, index)
        with foreign(self.dtype, 0), torch.no_grad():
            try:
                before = torch.get_rng_state()
                expected = self._terms(theta, index, "loop")
                self._seed = None if torch.equal(before, torch.get_rng_state()) else 0
            except VifamilyError:
                raise
            except NotBatchedError as error:
                raise IncompatibleError(f"the program cannot be evaluated: {error}.") from error
            except Exception as error:
                raise ModelError(f"the Pyro program raised {type(error).__name__}: {error}") from error
            for mode in _MODES:
                try:
                    got = self._terms(theta, index, mode)
                except Exception as error:
                    self.reason = self.reason or f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                if all(_close(a, b) for a, b in zip(got, expected, strict=True)):
                    self.mode = mode
                    return
                self.reason = self.reason or "draws run at once gave another log density"

    def honours_index(self, theta: Mapping[str, Tensor]) -> bool:
        """Return whether the program reads the data at the positions its plate gives."""
        found = self.structure
        if found.plate is None or found.num_data is None:
            return False
        size = found.subsample or min(found.num_data, 3)
        index = torch.arange(size).flip(0)
        try:
            with torch.no_grad():
                reference = self.whole_terms(theta)
                got = self.terms(self.rows(theta, index), index)
        except Exception:
            return False  # most often: a plate that is not told to index its data, against data of full length
        parts = [(got.local, reference.local), (got.likelihood, reference.likelihood)]
        return all(_close(a, b[:, index]) for a, b in parts)

    # -- draws ---------------------------------------------------------------------------------------------------------
    def draw(
        self,
        fixed: Mapping[str, Tensor],
        num_draws: int,
        names: tuple[str, ...],
        *,
        index: Tensor | None = None,
        release: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Draw sites from the program, inside :func:`foreign`.

        Args:
            fixed: Latents held at values ``(draw, *shape)``.
            num_draws: Number of draws.
            names: Sites wanted.
            index: Positions in the data plate, or None.
            release: Whether observed sites are drawn anew.
            inputs: Arguments of the program to replace.

        Returns:
            Name to ``(draw, *shape)``.
        """
        args, kwargs = self._called_with(inputs)
        found = self.structure
        if self.mode == "batched":
            nesting = found.nesting
            values = {n: self.sites[n].aligned(v, nesting) for n, v in fixed.items()}
            collector = self._sampler(values, index, release=release)
            records = run_program(self.function, collector, args, kwargs, draws=(num_draws, -(nesting + 1)))
            ranks = {r.name: len(r.fn.batch_shape) for r in self.prototype}
            wanted = [r for r in records if r.name in names]
            return {r.name: _with_draws(r.value, r.fn, num_draws, nesting, ranks[r.name]) for r in wanted}
        singles = []
        for i in range(num_draws):
            collector = self._sampler({n: v[i] for n, v in fixed.items()}, index, release=release)
            records = run_program(self.function, collector, args, kwargs)
            singles.append({r.name: r.value for r in records if r.name in names})
        return {name: torch.stack([single[name] for single in singles]) for name in singles[0]}

    def sample_prior(self, num_draws: int, names: tuple[str, ...], source: torch.Generator) -> dict[str, Tensor]:
        """Draw latents from the prior, in pieces where the program reads only some data at a time."""
        out: dict[str, Tensor] = {}
        done = 0
        with foreign(self.dtype, source), torch.no_grad():
            for index in self.structure.chunks():
                fixed = {n: v for n, v in out.items() if self.sites[n].data_axis is None}
                drawn = self.draw(fixed, num_draws, tuple(self.sites), index=index)
                out = self._joined(out, drawn, done, index)
                done = 0 if index is None else int(index[-1]) + 1
        return {name: out[name].reshape(num_draws, *self.sites[name].shape) for name in names}

    def _joined(
        self, so_far: dict[str, Tensor], drawn: dict[str, Tensor], done: int, index: Tensor | None
    ) -> dict[str, Tensor]:
        if index is None or not so_far:
            return so_far | drawn
        out = dict(so_far)
        for name, value in drawn.items():
            axis = self._data_axis(name)
            if axis is not None:
                fresh = value.narrow(axis + 1, done - int(index[0]), int(index[-1]) + 1 - done)
                out[name] = torch.cat([so_far[name], fresh], axis + 1)
        return out

    def _data_axis(self, name: str) -> int | None:
        record = next(r for r in self.prototype if r.name == name)
        inside = any(f.name == self.structure.plate and f.vectorized for f in record.frames)
        return len(record.fn.batch_shape) + self.structure.plate_axis if inside else None

    def predict(
        self, theta: Mapping[str, Tensor], num_draws: int, source: torch.Generator, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Draw the observed sites anew at given latents."""
        names = self.structure.observed
        if inputs and self.structure.subsample is not None:
            raise ConfigError(
                "a program that subsamples its data cannot be run at new inputs: leave subsample_size out."
            )
        if inputs:
            theta = {n: v for n, v in theta.items() if self.sites[n].data_axis is None}
        out: dict[str, Tensor] = {}
        done = 0
        with foreign(self.dtype, source), torch.no_grad():
            for index in self.structure.chunks():
                try:
                    drawn = self.draw(
                        self.rows(theta, index), num_draws, names, index=index, release=True, inputs=inputs
                    )
                except VifamilyError:
                    raise
                except Exception as error:
                    raise ModelError(f"the Pyro program raised {type(error).__name__}: {error}") from error
                out = self._joined(out, drawn, done, index)
                done = 0 if index is None else int(index[-1]) + 1
        return out

    def observed(self) -> dict[str, Tensor]:
        """Return the observed sites' values, all data."""
        out: dict[str, Tensor] = {}
        done = 0
        with foreign(self.dtype, 0), torch.no_grad():
            for index in self.structure.chunks():
                records = run_program(self.function, self._sampler({}, index, release=False), self.args, self.kwargs)
                seen = {r.name: _whole(r).unsqueeze(0) for r in records if r.name in self.structure.observed}
                out = self._joined(out, seen, done, index)
                done = 0 if index is None else int(index[-1]) + 1
        return {name: value.squeeze(0).detach() for name, value in out.items()}

    def data_first(self, observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return observed values inside the data plate with the datum axis first."""
        axes = {name: self._data_axis(name) for name in observed}
        return {name: value.movedim(axes[name] or 0, 0) for name, value in observed.items() if axes[name] is not None}

    def _sampler(self, values: Mapping[str, Tensor], index: Tensor | None, *, release: bool) -> Collector:
        return Collector(
            values, self.point_parameters, plate=self.structure.plate, index=index, densities=False, release=release
        )

    def _called_with(self, inputs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not inputs:
            return self.args, self.kwargs
        target = self.function.forward if isinstance(self.function, nn.Module) else self.function
        bound = inspect.signature(target).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        unknown = [name for name in inputs if name not in bound.arguments]
        if unknown:
            known = ", ".join(bound.arguments)
            raise ConfigError(f"the program takes no argument called {', '.join(unknown)}; it takes {known}.")
        bound.arguments.update(inputs)
        return bound.args, bound.kwargs


def _draws_before(value: Tensor, nesting: int) -> Tensor:
    """Move the first axis, of draws, to its place left of the plates."""
    own = value.dim() - 1
    if own <= nesting:
        return value.reshape(value.shape[0], *(1,) * (nesting - own), *value.shape[1:])
    return value.squeeze(-(nesting + 1)).movedim(0, -(nesting + 1))


def _whole(record: Record) -> Tensor:
    """An observed value in the full shape of its site."""
    value: Tensor = record.value
    return value.expand(torch.broadcast_shapes(value.shape, record.fn.batch_shape + record.fn.event_shape))


def _size(theta: Mapping[str, Tensor]) -> int:
    return next(iter(theta.values())).shape[0]


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-8 if a.dtype == torch.float64 else 1e-3
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True))


def _with_draws(value: Tensor, fn: Any, num_draws: int, nesting: int, rank: int) -> Tensor:
    """From a site's value under the plate of draws to ``(draw, *shape)``, without the axes between draws and batch."""
    if value.dim() - len(fn.event_shape) < nesting + 1:  # the site does not depend on draws
        return value.expand(num_draws, *value.shape)
    shape = value.shape[1 + nesting - rank :]
    return value.expand(num_draws, *value.shape[1:]).reshape(num_draws, *shape)
