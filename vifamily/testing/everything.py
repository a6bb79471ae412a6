"""Every registered entry through its contracts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from vifamily import registry
from vifamily.plan import describe
from vifamily.testing._report import ContractError, Report
from vifamily.testing.families import check_family
from vifamily.testing.models import check_model
from vifamily.testing.objectives import check_objective
from vifamily.testing.solvers import check_solver

__all__ = ["check_registry"]

_CHECKS: dict[str, Any] = {
    "objectives": check_objective,
    "families": check_family,
    "solvers": check_solver,
    "models": check_model,
}


def check_registry(kinds: Iterable[str] = ("objectives", "families", "solvers", "models")) -> dict[str, Report]:
    """Hold every registered entry to the contracts of its kind, with its default options.

    Args:
        kinds: Which kinds to check.

    Returns:
        Reports by ``"kind/name"``. An entry that cannot be built without arguments is reported with what to call
        instead.

    Raises:
        ContractError: For the first entry that breaks a contract, or whose default options cannot be written down and
        read back.

    Example:
        >>> sorted(check_registry(["models"]))[:3]
        ['models/causal_lm', 'models/density', 'models/likelihood']
    """
    reports = {}
    for kind in kinds:
        for name in registry.names(kind):
            reports[f"{kind}/{name}"] = _check_entry(kind, name)
    return reports


def _check_entry(kind: str, name: str) -> Report:
    entry = registry.lookup(kind, name)
    if not registry.describe(kind, name):
        raise ContractError(f"the entry {name!r} of {kind}", "docstring", "none", "a sentence that says what it is")
    needed = [
        p.name
        for p in inspect.signature(entry).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if needed:
        reason = f"it needs arguments ({', '.join(needed)}): build one and call {_CHECKS[kind].__name__}"
        return Report(name, kind, (), {"all": reason})
    built = registry.build(kind, name)
    again = registry.build(kind, describe(built))
    if built != again:
        raise ContractError(f"the entry {name!r} of {kind}", "spec", f"{again!r} from its spec", f"{built!r} itself")
    report: Report = _CHECKS[kind](name)
    return report
