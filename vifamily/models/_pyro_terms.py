"""From the sites of a run to the terms of a log joint: per draw, and per datum inside the data plate."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from opt_einsum import get_symbol, shared_intermediates  # type: ignore[import-untyped]
from torch import Tensor

from vifamily.errors import IncompatibleError
from vifamily.models._pyro import LogRing, contract_to_tensor
from vifamily.models._pyro_messengers import Record

__all__ = ["NotBatchedError", "Terms", "gather_terms"]

_DRAW = get_symbol(0)
_PLATE = 1  # symbols of plates are get_symbol(_PLATE + 2 * position), those of enumerated sites the numbers between


class NotBatchedError(Exception):
    """A site's log density does not line up with the axis of draws."""


class Terms(NamedTuple):
    """Parts of a log joint; inside the data plate unscaled, one number per datum.

    Attributes:
        prior: Latent sites outside the data plate, ``(draw,)``.
        other: Observed sites and factors outside the data plate, ``(draw,)``.
        local: Latent sites inside the data plate, ``(draw, datum)``.
        likelihood: Observed sites (and enumerated ones, summed out) inside the data plate, ``(draw, datum)``.
    """

    prior: Tensor
    other: Tensor
    local: Tensor
    likelihood: Tensor


def gather_terms(
    records: list[Record],
    *,
    draws: int,
    nesting: int,
    plate: str | None,
    size: int,
    scale: float,
    like: Tensor,
) -> Terms:
    """Sum log densities of sites over everything but draws and data.

    Args:
        records: Sites with log densities.
        draws: Size of the axis of draws, which is axis ``-(nesting + 1)``; 1 for a single draw without that axis.
        nesting: Axes that plates may take.
        plate: Name of the data plate, or None.
        size: Number of data in this run.
        scale: Scale that the plate's subsampling has put on sites inside it, taken out here.
        like: A tensor of the dtype and device wanted.
    """
    total = [like.new_zeros(draws), like.new_zeros(draws), like.new_zeros(draws, size), like.new_zeros(draws, size)]
    enumerated = []
    for record in records:
        frame = next((f for f in record.frames if f.name == plate and f.vectorized), None)
        value = _aligned(record, draws, nesting)
        if frame is not None and scale != 1.0:
            value = value / scale
        if value.dim() > nesting + 1:
            enumerated.append((record, value, frame is not None))
            continue
        kind = 1 if record.observed else 0
        if frame is None:
            total[kind] = total[kind] + value.reshape(value.shape[0], -1).sum(-1)
        else:
            moved = value.movedim(frame.dim, 1)
            total[2 + kind] = total[2 + kind] + moved.reshape(*moved.shape[:2], -1).sum(-1)
    if enumerated:
        inside = all(within for record, _, within in enumerated if "_enumerate_dim" in record.message["infer"])
        if inside and plate is not None:
            only = [(record, value) for record, value, _ in enumerated]
            total[3] = total[3] + _summed_out(only, plate, draws, nesting, size)
        elif scale != 1.0:
            raise IncompatibleError(
                "a discrete latent outside the subsampled plate cannot be summed out from a part of the data. "
                "Run the program on all data, or sum it out by hand."
            )
        else:
            total[1] = total[1] + _summed_out([(r, v) for r, v, _ in enumerated], None, draws, nesting, size)
    return Terms(*total)


def _aligned(record: Record, draws: int, nesting: int) -> Tensor:
    """Log density with the axis of draws first of ``nesting + 1``, further enumerated axes before it."""
    value = record.log_prob
    if not isinstance(value, Tensor):
        raise NotBatchedError(f"the site {record.name!r} has no log density as a tensor")
    if value.dim() < nesting + 1:
        value = value.reshape((1,) * (nesting + 1 - value.dim()) + tuple(value.shape))
    if value.shape[-(nesting + 1)] not in (1, draws):
        raise NotBatchedError(f"the site {record.name!r} has shape {tuple(value.shape)} for {draws} draws")
    if value.dim() > nesting + 1:
        known = set(record.message["infer"].get("_dim_to_id", {}))
        extra = {axis - value.dim() for axis in range(value.dim() - nesting - 1) if value.shape[axis] > 1}
        if extra - known:
            raise NotBatchedError(f"the site {record.name!r} has shape {tuple(value.shape)}, axes that no plate has")
        if not extra:
            value = value.reshape(value.shape[-(nesting + 1) :])
    return value


def _summed_out(sites: list[tuple[Record, Tensor]], plate: str | None, draws: int, nesting: int, size: int) -> Tensor:
    """Sum enumerated axes out in log space, by message passing over plates; ``(draw,)``, or ``(draw, datum)``."""
    plates: dict[str, str] = {}
    sizes: dict[str, int] = {_DRAW: draws}
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sums: set[str] = set()
    for record, value in sites:
        packed, ordinal, summed = _packed(record, value, draws, nesting, plates, sizes)
        tree.setdefault(ordinal, []).append(packed)
        sums |= summed
    target = _DRAW if plate is None else _DRAW + plates[plate]
    with shared_intermediates() as cache:
        ring = LogRing(cache, dim_to_size=sizes)
        term: Any = contract_to_tensor(tree, sums, target_ordinal=frozenset(target), ring=ring)
    order = [term._pyro_dims.index(symbol) for symbol in target]
    out: Tensor = term.permute(order)
    return out.expand(draws) if plate is None else out.expand(draws, size)


def _packed(
    record: Record, value: Tensor, draws: int, nesting: int, plates: dict[str, str], sizes: dict[str, int]
) -> tuple[Tensor, frozenset[str], set[str]]:
    """Drop axes of length one that stand for nothing; name the others."""
    infer = record.message["infer"]
    named = {-(nesting + 1): _DRAW}
    wanted = {-(nesting + 1): draws}
    for frame in record.frames:
        if frame.vectorized:
            symbol = plates.setdefault(frame.name, get_symbol(_PLATE + 2 * len(plates)))
            named[frame.dim], wanted[frame.dim] = symbol, frame.size
            sizes[symbol] = frame.size
    ordinal = frozenset(named.values())
    summed = set()
    for axis, number in infer.get("_dim_to_id", {}).items():
        if axis < -(nesting + 1) and value.dim() >= -axis and value.shape[axis] > 1:
            named[axis] = get_symbol(_PLATE + 1 + 2 * number)
            wanted[axis] = value.shape[axis]
            sizes[named[axis]] = value.shape[axis]
            summed.add(named[axis])
    shape = [wanted.get(axis, value.shape[axis]) for axis in range(-value.dim(), 0)]
    kept = [axis for axis in range(-value.dim(), 0) if axis in named]
    value = value.expand(shape)
    loose = [axis for axis in range(-value.dim(), 0) if axis not in named and value.shape[axis] > 1]
    if loose and "_enumerate_dim" in infer:
        raise IncompatibleError(
            f"the discrete latent {record.name!r} is a batch {tuple(record.fn.batch_shape)} outside plates, so it "
            "cannot be summed out one by one: put it inside a pyro.plate."
        )
    if loose:  # a batch axis without a plate: independent factors of one term, hence a sum
        value = value.sum(loose, keepdim=True)
    packed: Any = value.reshape([value.shape[axis] for axis in kept]).clone()
    packed._pyro_dims = "".join(named[axis] for axis in kept)
    return packed, ordinal, summed
