"""Imports of libraries that change globals of torch as they load."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from torch.distributions import Distribution

__all__ = ["keep_validation", "load"]

_MISSING = object()


@contextlib.contextmanager
def keep_validation() -> Iterator[None]:
    """Leave torch's validation of distribution arguments as it was found."""
    kept = {name: Distribution.__dict__.get(name, _MISSING) for name in ("_validate_args", "arg_constraints")}
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is not _MISSING:
                setattr(Distribution, name, value)


def load(name: str) -> Any:
    """Import a module; torch's validation stays as found, whether it was loaded before or not.

    Loading zuko switches validation off for every distribution of the process and empties the constraints of the base
    class; both are put back. Where the user loaded it earlier, nothing is changed.
    """
    with keep_validation():
        return importlib.import_module(name)
