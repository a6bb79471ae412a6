"""A posterior as a folder, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vifamily import checkpoint
from vifamily.errors import CheckpointError, ConfigError, ReferenceDataError, VifamilyError
from vifamily.families._base import Family, FamilyEntry
from vifamily.models._base import Model
from vifamily.posterior._record import FitRecord
from vifamily.registry import build
from vifamily.rng import generator
from vifamily.supports import Layout

if TYPE_CHECKING:
    from vifamily.posterior._posterior import Posterior

__all__ = ["load_parts", "save_posterior"]

_NAME = "posterior"


def save_posterior(posterior: Posterior, path: str | os.PathLike[str]) -> Path:
    """Write a posterior's family, restarts, record and layout to a folder."""
    record, trace = posterior.record.to_plain()
    tensors: dict[str, Tensor] = {f"trace/{key}": value for key, value in trace.items()}
    tensors.update({f"family/{key}": value for key, value in posterior.family.state_dict().items()})
    for r, family in enumerate(posterior.restarts):
        tensors.update({f"restart/{r}/{key}": value for key, value in family.state_dict().items()})
    if posterior.model is not None:
        tensors.update({f"model/{key}": value for key, value in posterior.model.named_parameters()})
    meta = {
        "kind": "posterior",
        "family": checkpoint.describe_family(posterior.family),
        "restarts": [checkpoint.describe_family(family) for family in posterior.restarts],
        "layout": posterior.layout.to_json(),
        "problem": posterior.problem_name,
        "model": None if posterior.model is None else type(posterior.model).__name__,
        "config": posterior.config,
        "record": record,
    }
    return checkpoint.write(path, tensors, meta, name=_NAME)


def load_parts(
    path: str | os.PathLike[str],
    *,
    model: Model | None = None,
    family: Family | FamilyEntry | str | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Read a folder and return the arguments of a posterior.

    Raises:
        CheckpointError: If a file is missing, damaged, or does not fit.
    """
    tensors, meta = checkpoint.read(path, name=_NAME)
    if meta.get("kind") != "posterior":
        raise CheckpointError(f"{Path(path)} holds a {str(meta.get('kind'))[:40]!r}, not a posterior.")
    record = FitRecord.from_plain(checkpoint.field(meta, "record", dict), _under(tensors, "trace/"))
    layout = _layout(checkpoint.field(meta, "layout", dict))
    described = checkpoint.field(meta, "family", dict)
    restored = _family(described, _under(tensors, "family/"), family, device)
    if restored.dim != layout.dim:
        raise CheckpointError(
            f"the saved family has {restored.dim} coordinates and its layout {layout.dim}; the file is damaged."
        )
    restarts = tuple(
        _family(one, _under(tensors, f"restart/{r}/"), family, device)
        for r, one in enumerate(checkpoint.field(meta, "restarts", list))
    )
    if any(one.dim != layout.dim for one in restarts):
        raise CheckpointError(
            "the saved restarts have other numbers of coordinates than the layout; the file is damaged."
        )
    problem, why = (
        (None, None) if model is not None else _problem(checkpoint.field(meta, "problem", str, optional=True))
    )
    model = problem.model if problem is not None else model
    if model is not None:
        _fit_model(model, layout, _under(tensors, "model/"), given=problem is None)
    config = checkpoint.field(meta, "config", dict, optional=True)
    name = checkpoint.field(meta, "problem", str, optional=True)
    return {
        "model": model, "family": restored, "record": record, "layout": layout, "problem": problem, "restarts":
        restarts, "objective": _objective(record.objective), "config": config, "problem_name": name, "no_model": why,
    }  # fmt: skip


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _layout(data: Mapping[str, Any]) -> Layout:
    try:
        return Layout.from_json(data)
    except (VifamilyError, RecursionError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"the saved layout is not valid: {str(error)[:200]}") from error


def _family(
    described: Any,
    state: Mapping[str, Tensor],
    given: Family | FamilyEntry | str | None,
    device: torch.device | str | None,
) -> Family:
    if not isinstance(described, dict):
        raise CheckpointError("the saved description of a family is not a dictionary; the file is damaged.")
    if given is None or described.get("kind") == "restart_mixture":
        return checkpoint.rebuild_family(described, state, device=device)
    entry = build("families", given) if isinstance(given, str) else given
    if isinstance(entry, FamilyEntry):
        latent = checkpoint.rebuild_latent(checkpoint.field(described, "latent", dict), device=device)
        family = entry.build(latent, generator=generator(0, "load"))
    elif isinstance(entry, Family):
        family = entry.copy()
    else:
        raise ConfigError(f"family= must be a family, a family's entry or a spec, got {type(given).__name__}.")
    checkpoint.restore_family(family, state)
    return family


def _problem(name: str | None) -> tuple[Any, str | None]:
    """The named problem, or None with the reason why it is not here."""
    if name is None:
        return None, None
    try:
        return build("problems", name), None
    except ReferenceDataError as error:
        return None, f"the data of the problem {name!r} are not on this machine ({error})"
    except VifamilyError as error:
        raise CheckpointError(
            f"the saved posterior is of the problem {name[:80]!r}, which cannot be built: {error}"
        ) from error


def _fit_model(model: Model, layout: Layout, state: Mapping[str, Tensor], *, given: bool) -> None:
    if model.layout != layout:
        what = "the given model" if given else "the named problem"
        raise CheckpointError(f"{what} has the parameters {model.layout!r}, but the saved posterior {layout!r}.")
    own = dict(model.named_parameters())
    if set(own) != set(state) or any(own[key].shape != state[key].shape for key in own):
        raise CheckpointError(
            "the saved point parameters of the model do not fit this model: "
            f"saved {', '.join(sorted(state)[:4]) or 'none'}, here {', '.join(sorted(own)[:4]) or 'none'}."
        )
    if any(not bool(value.isfinite().all()) for value in state.values()):
        raise CheckpointError("the saved point parameters of the model hold NaN or infinite values.")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])


def _objective(spec: str) -> Any:
    try:
        return build("objectives", spec)
    except VifamilyError:
        return None  # an objective of the user's own: only its name is known
