"""Timings, one file per benchmark; ``vifamily benchmark NAME`` runs one."""

from __future__ import annotations

import importlib
import pkgutil

from vifamily.benchmark._report import Benchmark, Options, Report
from vifamily.errors import UnknownNameError

__all__ = ["Benchmark", "Options", "Report", "benchmark_named", "names"]


def names() -> tuple[str, ...]:
    """Names of the benchmarks: the modules of this folder that have no leading underscore.

    Example:
        >>> "solvers" in names()
        True
    """
    found = (info for info in pkgutil.iter_modules(__path__) if not info.ispkg and not info.name.startswith("_"))
    return tuple(sorted(info.name for info in found))


def benchmark_named(name: str) -> Benchmark:
    """Return a benchmark.

    Raises:
        UnknownNameError: If there is none of that name.
    """
    if name not in names():
        raise UnknownNameError(f"there is no benchmark {name!r}: choose among {', '.join(names())}.")
    found: Benchmark = importlib.import_module(f"vifamily.benchmark.{name}").BENCHMARK
    return found
