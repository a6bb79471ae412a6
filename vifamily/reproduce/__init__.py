"""The main findings of papers, run again: one file per paper; ``vifamily reproduce NAME`` runs one."""

from __future__ import annotations

import importlib
import pkgutil

from vifamily.errors import UnknownNameError
from vifamily.reproduce._report import Claim, Options, Paper, Reproduction

__all__ = ["Claim", "Options", "Paper", "Reproduction", "names", "paper_named"]


def names() -> tuple[str, ...]:
    """Names of the papers: the modules of this folder without a leading underscore, written with hyphens.

    Example:
        >>> all(name == name.lower() for name in names())
        True
    """
    found = (info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    return tuple(sorted(name.replace("_", "-") for name in found))


def paper_named(name: str) -> Paper:
    """Return what is known of a paper and how to run it.

    Args:
        name: One of :func:`names`.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if name not in names():
        raise UnknownNameError(f"there is no paper {name!r} to reproduce: choose among {', '.join(names())}, or all.")
    found: Paper = importlib.import_module(f"vifamily.reproduce.{name.replace('-', '_')}").PAPER
    return found
