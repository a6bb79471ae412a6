"""What is accepted where a family is: specs, entries, families, modules, zuko flows, Pyro guides."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vifamily.errors import ConfigError
from vifamily.families._autoguide import convert_autoguide, is_autoguide
from vifamily.families._base import Family, FamilyEntry
from vifamily.families._modules import GivenFamily, GivenModule
from vifamily.families._pyro_guide import PyroGuide
from vifamily.families._zuko_flow import ZukoFlow, is_zuko
from vifamily.registry import Spec, build

__all__ = ["as_entry"]


def as_entry(obj: Any, model: Any = None) -> FamilyEntry:
    """Turn anything that is accepted where a family is into an entry.

    Args:
        obj: A spec string, an entry, a built family, a module with a family's methods, a zuko flow, a Pyro guide or one
            of Pyro's automatic guides.
        model: The Pyro model, which guides need: an object with ``layout`` (names, supports and order of the latents),
            ``args`` and ``kwargs``.

    Returns:
        An entry. Families built from objects of the user's are copies that start as the object is.

    Raises:
        ConfigError: If the object is nothing of the kind, or lacks methods, which are named.
        UnknownNameError: If a spec names no family.

    Example:
        >>> as_entry("low_rank(rank=3)")
        LowRank(rank=3, student_t=None, hidden=())
    """
    if isinstance(obj, (str, Spec)):
        obj = build("families", obj)
    if isinstance(obj, FamilyEntry):
        return obj
    if inspect.isclass(obj) and issubclass(obj, FamilyEntry):
        return as_entry(obj())
    if isinstance(obj, Family):
        return GivenFamily(obj)
    if is_zuko(obj):
        return ZukoFlow(obj)
    if is_autoguide(obj):
        return convert_autoguide(obj, _pyro_model(obj, model))
    if _is_guide(obj):
        return PyroGuide(obj, _pyro_model(obj, model))
    if isinstance(obj, nn.Module):
        return GivenModule(obj)
    raise ConfigError(
        f"cannot use a {type(obj).__name__} as a family: give a name such as 'full_rank', a family, a module with a "
        "family's methods, a zuko flow, or a Pyro guide."
    )


def _is_guide(obj: Any) -> bool:
    if isinstance(obj, nn.Module):
        of_pyro = any(base.__module__.startswith("pyro.nn") for base in type(obj).__mro__)
        return of_pyro and not hasattr(obj, "noise_spec")
    return callable(obj) and not inspect.isclass(obj)


def _pyro_model(guide: Any, model: Any) -> Any:
    if not hasattr(model, "layout") or not hasattr(getattr(model, "program", model), "args"):
        name = getattr(guide, "__name__", type(guide).__name__)
        got = "no model" if model is None else type(model).__name__
        raise ConfigError(
            f"the guide {name!r} needs the Pyro model it was written for (a PyroModel), got {got}. "
            "For another model, use a registered family such as 'full_rank'."
        )
    return model
