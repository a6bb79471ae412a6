"""Families as files: what rebuilds one, and its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.checkpoint._files import field
from vifamily.diagnostics.stacking import RestartMixture
from vifamily.errors import CheckpointError, ConfigError, VifamilyError
from vifamily.families._base import Family
from vifamily.registry import build
from vifamily.rng import generator
from vifamily.types import Capability, LatentSpec, Space

__all__ = ["describe_family", "describe_latent", "rebuild_family", "rebuild_latent", "restore_family"]

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def _whole_numbers(data: Mapping[str, Any], key: str, *, optional: bool = False) -> tuple[int, ...] | None:
    values = field(data, key, list, optional=optional)
    if values is None:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise CheckpointError(f"the saved entry {key!r} must be a list of integers; the file is damaged.")
    return tuple(values)


def describe_latent(latent: LatentSpec) -> dict[str, Any]:
    """Return a latent specification as plain data."""
    return {
        "dim": latent.dim,
        "space": str(latent.space),
        "num_categories": None if latent.num_categories is None else list(latent.num_categories),
        "context_dim": latent.context_dim,
        "dtype": str(latent.dtype).removeprefix("torch."),
        "device": str(latent.device),
    }


def rebuild_latent(data: Mapping[str, Any], *, device: torch.device | str | None = None) -> LatentSpec:
    """Return the latent specification of plain data; a device that is not there becomes the CPU.

    Raises:
        CheckpointError: If the data are not those of a latent specification.
    """
    dim, space, dtype = field(data, "dim", int), field(data, "space", str), field(data, "dtype", str)
    categories = _whole_numbers(data, "num_categories", optional=True)
    if not 0 < dim < 2**31 or space not in set(Space) or dtype not in _DTYPES:
        raise CheckpointError(
            f"the saved latent space is not a possible one (dim {dim}, space {space[:40]!r}, dtype {dtype[:40]!r})."
        )
    if categories is not None and (len(categories) != dim or min(categories) < 1 or max(categories) > 2**31):
        raise CheckpointError(
            f"the saved latent space has {len(categories)} numbers of categories for {dim} coordinates."
        )
    context = field(data, "context_dim", int, optional=True)
    if device is None:
        saved = field(data, "device", str)
        device = saved if saved.startswith("cuda") and torch.cuda.is_available() else "cpu"
    try:
        return LatentSpec(dim, Space(space), categories, context, _DTYPES[dtype], torch.device(device))
    except RuntimeError as error:
        raise CheckpointError(f"the saved device {str(device)[:40]!r} is not a device of torch.") from error


def describe_family(family: Family) -> dict[str, Any]:
    """Return what :func:`rebuild_family` needs, as plain data: the family's spec and latent space."""
    if isinstance(family, RestartMixture):
        return {"kind": "restart_mixture", "components": [describe_family(part) for part in family.members()]}
    # A table or an encoder beside the global family is not in its spec.
    spec = None if Capability.LOCAL in family.capabilities else getattr(family, "spec", None)
    return {
        "kind": "registered",
        "spec": None if spec is None else str(spec),
        "class": type(family).__name__,
        "latent": describe_latent(family.latent),
    }


def rebuild_family(
    data: Mapping[str, Any], state: Mapping[str, Tensor], *, device: torch.device | str | None = None
) -> Family:
    """Build a family from plain data and give it its state.

    Args:
        data: From :func:`describe_family`.
        state: Its state, name to tensor.
        device: Where it goes; by default the saved device, or the CPU where that is not there.

    Raises:
        CheckpointError: If the data or the state do not fit a family.
    """
    # Before anything of the size that the JSON claims is allocated: every family stores a shift of its dimension.
    largest = max((value.numel() for value in state.values()), default=0)
    family = _build(data, device, largest)
    restore_family(family, state)
    return family


def _build(data: Mapping[str, Any], device: torch.device | str | None, largest: int, *, nested: bool = False) -> Family:
    kind = field(data, "kind", str)
    if kind == "restart_mixture" and not nested:
        parts = [_build(part, device, largest, nested=True) for part in field(data, "components", list)]
        if not parts:
            raise CheckpointError("the saved mixture of restarts has no components; the file is damaged.")
        try:
            return RestartMixture(parts, parts[0].shift.new_full((len(parts),), 1 / len(parts)))
        except ConfigError as error:
            raise CheckpointError(f"the saved mixture of restarts cannot be rebuilt: {error}") from error
    if kind != "registered":
        raise CheckpointError(f"the saved family is of the unknown kind {kind[:40]!r}.")
    spec = field(data, "spec", str, optional=True)
    if spec is None:
        raise CheckpointError(
            f"the saved family {str(data.get('class'))[:80]!r} is not a registered one: build it and pass it as "
            "load(path, family=...)."
        )
    latent = rebuild_latent(field(data, "latent", dict), device=device)
    if latent.dim > largest:
        raise CheckpointError(f"the saved family claims {latent.dim} coordinates, which its tensors do not hold.")
    try:
        family: Family = build("families", spec).build(latent, generator=generator(0, "load"))
    except (VifamilyError, TypeError, ValueError, RuntimeError, AttributeError, MemoryError) as error:
        raise CheckpointError(
            f"the saved family {spec[:80]!r} cannot be rebuilt, so pass it as load(path, family=...): {error}"
        ) from error
    family.spec = spec
    return family


def restore_family(family: Family, state: Mapping[str, Tensor]) -> None:
    """Give a family a saved state, checked name by name.

    Raises:
        CheckpointError: If names, shapes or dtypes differ from the family's, or a number is not finite.
    """
    _fit_affine_maps(family, state)
    current = family.state_dict()
    missing, unknown = sorted(set(current) - set(state)), sorted(set(state) - set(current))
    if missing or unknown:
        raise CheckpointError(
            f"the saved state does not fit the family {type(family).__name__}: missing {_some(missing)}, unknown "
            f"{_some(unknown)}."
        )
    for key, value in current.items():
        saved = state[key]
        if saved.shape != value.shape or saved.dtype != value.dtype:
            raise CheckpointError(
                f"the saved tensor {key[:80]!r} is {saved.dtype} of shape {tuple(saved.shape)}, "
                f"but the family needs {value.dtype} of shape {tuple(value.shape)}."
            )
        if saved.is_floating_point() and not bool(saved.isfinite().all()):
            raise CheckpointError(f"the saved tensor {key[:80]!r} holds NaN or infinite values.")
    family.load_state_dict(dict(state))


def _fit_affine_maps(family: Family, state: Mapping[str, Tensor]) -> None:
    """The fixed affine map is a vector or a matrix, which only the state tells."""
    for prefix, part in _families_in(family):
        shift, scale, dim = state.get(prefix + "shift"), state.get(prefix + "scale"), part.dim
        if shift is None or scale is None:
            continue  # reported by name with everything else
        if tuple(shift.shape) != (dim,) or tuple(scale.shape) not in ((dim,), (dim, dim)):
            raise CheckpointError(
                f"the saved affine map {prefix + 'scale'!r} has shapes {tuple(shift.shape)} and {tuple(scale.shape)} "
                f"for {dim} coordinates."
            )
        diagonal = scale if scale.dim() == 1 else scale.diagonal()
        if not bool((diagonal != 0).all()):
            raise CheckpointError(f"the saved affine map {prefix + 'scale'!r} has a zero scale.")
        part.scale = part.scale.new_zeros(scale.shape)


def _families_in(family: Family) -> Iterator[tuple[str, Family]]:
    for name, part in family.named_modules():
        if isinstance(part, Family):
            yield (f"{name}." if name else ""), part


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name[:40] for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "nothing"
