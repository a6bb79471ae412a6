"""Language models: ensembles of low-rank adapters that share one frozen base.

Needs the extra ``llm``; its packages are imported when something here first needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vifamily.llm._stacked import StackedCausalLM, StackedLoRA

__all__ = ["StackedCausalLM", "StackedLoRA"]

_HOMES = {"StackedCausalLM": "_stacked", "StackedLoRA": "_stacked"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
