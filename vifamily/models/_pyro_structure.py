"""What a Pyro program is made of, found by running it: latent sites, data, plates; and clear refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, DataError, IncompatibleError, ModelError, SupportError, VifamilyError
from vifamily.models._pyro_messengers import Collector, PointParameters, Record, foreign, is_factor, run_program
from vifamily.numerics.constraint_kinds import plain_of
from vifamily.supports import Layout, Site, support_from

__all__ = ["LatentSite", "Structure", "find_structure", "layout_of_sites"]


@dataclasses.dataclass(frozen=True)
class LatentSite:
    """A continuous latent site.

    Attributes:
        name: Its name.
        shape: Its whole constrained shape, all data included.
        batch_rank: How many of its axes are batch axes.
        support: Its support.
        data_axis: Which axis of its shape is the data plate, or None outside it.
    """

    name: str
    shape: tuple[int, ...]
    batch_rank: int
    support: Any
    data_axis: int | None

    def aligned(self, value: Tensor, nesting: int) -> Tensor:
        """Insert axes of length one between draws and plates, ``(draw, *shape) -> (draw, 1 …, *shape)``."""
        missing = nesting - self.batch_rank
        return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:]) if missing else value


@dataclasses.dataclass(frozen=True)
class Structure:
    """A program's structure.

    Attributes:
        latent: Continuous latent sites, in order.
        discrete: Names of discrete latent sites, to be summed out.
        observed: Names of observed sites.
        nesting: Axes that plates and batches take.
        plate: Name of the data plate, or None.
        plate_axis: Its axis, counted from the end of the batch axes.
        num_data: Its size.
        subsample: Number of data that the program reads at a time, where it reads fewer than all.
        per_datum: Whether every observed site lies inside the data plate.
    """

    latent: tuple[LatentSite, ...]
    discrete: tuple[str, ...]
    observed: tuple[str, ...]
    nesting: int
    plate: str | None
    plate_axis: int
    num_data: int | None
    subsample: int | None
    per_datum: bool

    @property
    def enumerate_from(self) -> int | None:
        """First axis free for enumeration, or None without discrete latents."""
        return -(self.nesting + 2) if self.discrete else None

    def chunks(self) -> list[Tensor | None]:
        """Return indices that together read all data; the last one may overlap the one before."""
        if self.subsample is None or self.num_data is None:
            return [None]
        starts = range(0, self.num_data, self.subsample)
        return [torch.arange(self.subsample) + min(start, self.num_data - self.subsample) for start in starts]


def find_structure(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    parameters: PointParameters,
    dtype: torch.dtype,
    data_plate: str | None,
) -> tuple[Structure, list[Record]]:
    """Run the program twice from its prior and read off its structure.

    Returns:
        The structure, and the sites of the first run.

    Raises:
        ModelError: If the program raises, or its sites change from run to run.
        IncompatibleError: If it has what cannot be handled (discrete latents that cannot be summed out, …).
        SupportError: If a support depends on other latents, or has no map to unconstrained space.
        DataError: If observed data are not finite or lie outside their support.
    """
    runs = [_prototype(program, args, kwargs, parameters, dtype, seed) for seed in (0, 1)]
    records, collector = runs[0]
    _check_static(records, runs[1][0])
    data = [r for r in records if r.observed and not is_factor(r.message)]
    for record in data:
        _check_observed(record)
    plate, subsample, size = _data_plate(collector.plates, records, data, data_plate)
    frames = [f for r in records for f in r.frames if f.vectorized]
    nesting = max([-f.dim for f in frames] + [len(r.fn.batch_shape) for r in records], default=0)
    axis = next((f.dim for f in frames if f.name == plate), 0)
    latent, discrete = [], []
    for record in (r for r in records if not r.observed):
        if record.fn.support is not None and record.fn.support.is_discrete:
            _check_enumerable(record)
            discrete.append(record.name)
        else:
            latent.append(_latent_site(record, plate, axis, size))
    if not latent:
        raise IncompatibleError("the program has no continuous latent site: there is nothing to infer.")
    inside = [any(f.name == plate for f in r.frames) for r in data]
    found = Structure(
        tuple(latent), tuple(discrete), tuple(r.name for r in data), nesting, plate, axis, size, subsample,
        per_datum=plate is not None and bool(data) and all(inside),
    )  # fmt: skip
    return found, records


def layout_of_sites(sites: tuple[LatentSite, ...], *, per_datum: bool = False) -> Layout:
    """Build the layout of some sites; ``per_datum`` leaves the axis of the data plate out."""
    out = []
    for site in sites:
        shape = site.shape
        if per_datum and site.data_axis is not None:
            shape = shape[: site.data_axis] + shape[site.data_axis + 1 :]
        out.append(Site(site.name, shape, site.support))
    return Layout(out)


def _prototype(
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    parameters: PointParameters,
    dtype: torch.dtype,
    seed: int,
) -> tuple[list[Record], Collector]:
    collector = Collector({}, parameters, densities=False)
    try:
        with foreign(dtype, seed), torch.no_grad():
            return run_program(program, collector, args, kwargs), collector
    except VifamilyError:
        raise
    except Exception as error:
        raise ModelError(f"the Pyro program raised {type(error).__name__} when run from its prior: {error}") from error


def _check_static(first: list[Record], second: list[Record]) -> None:
    def shapes(records: list[Record]) -> dict[str, tuple[Any, ...]]:
        return {r.name: (r.observed, tuple(r.fn.batch_shape), tuple(r.fn.event_shape)) for r in records}

    a, b = shapes(first), shapes(second)
    if a != b:
        differ = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        raise IncompatibleError(
            f"the program's sites change from run to run ({', '.join(differ)}). Only programs with the same sites and "
            "shapes in every run can be used; a plate that is looped over must not be subsampled."
        )
    for one, two in zip(first, second, strict=True):
        if not one.observed and not _same_support(one, two):
            raise SupportError(
                f"the support of site {one.name!r} depends on other latents. Draw it on a fixed support, then rescale: "
                "for Uniform(0, x), draw u from Uniform(0, 1) and use x * u."
            )


def _same_support(one: Record, two: Record) -> bool:
    if one.fn.support.is_discrete:
        return True
    try:
        return plain_of(one.fn.support) == plain_of(two.fn.support)
    except SupportError as error:
        raise SupportError(f"the latent site {one.name!r}: {error}") from error


def _check_observed(record: Record) -> None:
    value = record.value
    if not isinstance(value, Tensor):
        raise DataError(f"the observed site {record.name!r} must hold a tensor, got {type(value).__name__}.")
    if value.numel() == 0:
        raise DataError(f"the observed site {record.name!r} is empty.")
    mask = record.message["mask"]
    if mask is not None:
        return  # values behind a mask are not read
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"the observed site {record.name!r} holds NaN or infinite values: remove, impute or mask them.")
    try:
        valid = bool(record.fn.support.check(value).all())
    except (NotImplementedError, AttributeError):
        return  # a distribution that does not say what it takes
    except RuntimeError as error:
        raise DataError(f"the observed site {record.name!r} has shape {tuple(value.shape)}: {error}") from error
    if not valid:
        raise DataError(f"the observed site {record.name!r} holds values outside the support {record.fn.support}.")


def _check_enumerable(record: Record) -> None:
    if not record.fn.has_enumerate_support:
        raise IncompatibleError(
            f"the discrete latent {record.name!r} ~ {type(record.fn).__name__} has no finite support to sum over. "
            "Sum it out by hand, or replace it by a continuous latent."
        )


def _data_plate(
    plates: Mapping[str, tuple[int, int, bool]], records: list[Record], data: list[Record], asked: str | None
) -> tuple[str | None, int | None, int | None]:
    """Name, size of a subsample (or None) and size of the data plate."""
    vectorised = {f.name for r in records for f in r.frames if f.vectorized}
    partial = [name for name, (size, taken, _) in plates.items() if taken < size]
    if len(partial) > 1:
        raise IncompatibleError(f"only one plate may be subsampled, the program has {', '.join(partial)}.")
    if asked is not None and asked not in vectorised:
        known = ", ".join(sorted(vectorised)) or "none"
        raise ConfigError(f"data_plate={asked!r} is not a plate of the program; its plates: {known}.")
    if partial and asked not in (None, partial[0]):
        raise ConfigError(f"the subsampled plate {partial[0]!r} is the data plate; data_plate={asked!r} was given.")
    if partial and partial[0] not in vectorised:
        raise IncompatibleError(f"the plate {partial[0]!r} is looped over and subsampled: write it with `with`.")
    if partial and plates[partial[0]][2]:
        raise IncompatibleError(
            f"the plate {partial[0]!r} is given subsample= by hand, so it reads only those data. Use subsample_size=."
        )
    common = set.intersection(*({f.name for f in r.frames if f.vectorized} for r in data)) if data else set()
    chosen = partial[0] if partial else asked or (common.pop() if len(common) == 1 else None)
    if chosen is None:
        return None, None, None
    size, taken, _ = plates[chosen]
    return chosen, taken if taken < size else None, size


def _latent_site(record: Record, plate: str | None, axis: int, size: int | None) -> LatentSite:
    batch_rank = len(record.fn.batch_shape)
    shape = list(record.value.shape)
    inside = any(f.name == plate and f.vectorized for f in record.frames)
    data_axis = batch_rank + axis if inside else None
    if data_axis is not None and size is not None:
        shape[data_axis] = size
    return LatentSite(record.name, tuple(shape), batch_rank, support_from(record.fn.support), data_axis)
