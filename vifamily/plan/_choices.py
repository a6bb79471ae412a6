"""Families and solvers by name, and those that suit where none is named."""

from __future__ import annotations

import dataclasses
from typing import Any

from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, SpecError
from vifamily.families import Family, FamilyEntry
from vifamily.families._adapters import as_entry
from vifamily.models import Model
from vifamily.objectives import Objective
from vifamily.solvers import Solver
from vifamily.types import Capability, Space

__all__ = ["describe", "family_choice", "named_solver", "solver_choice"]

_LARGEST_FULL_RANK = 100
_MOST_PARAMETERS = 200_000
"""Parameters of a family above which fifty steps and gradients are too much to remember."""
_MOST_FIXED_DRAWS = 2000
"""What L-BFGS does with the draws of a set grows with the cube of their number, steps on fresh draws do not."""


def describe(entry: Any) -> str:
    """Return ``name(field=value, ...)`` of an entry, the fields that differ from their defaults."""
    name = registry.entry_name(entry)
    if not dataclasses.is_dataclass(entry) or isinstance(entry, type):
        return name
    changed = {
        f.name: getattr(entry, f.name)
        for f in dataclasses.fields(entry)
        if f.init and f.repr and (f.default is dataclasses.MISSING or getattr(entry, f.name) != f.default)
    }
    changed = {k: describe(v) if dataclasses.is_dataclass(v) else v for k, v in changed.items()}
    inner = ", ".join(f"{k}={v}" for k, v in changed.items())
    return f"{name}({inner})" if inner else name


def family_choice(family: Any, model: Model, solver: Solver | None, notes: list[str]) -> FamilyEntry:
    """Return the family asked for, or the one that suits the space and the number of coordinates."""
    if isinstance(family, str) and family == "auto":
        own = None if solver is None else solver.default_family()
        if own is not None:
            family = own
        elif model.space is Space.DISCRETE:
            simulated = Capability.SIMULATE in model.capabilities
            family = "natural(kind='categorical')" if simulated else "categorical"
        elif model.space is Space.CIRCLE:
            family = "natural(kind='von_mises')"
        elif Capability.SIMULATE in model.capabilities:
            family = "flow"
        else:
            family = "full_rank" if model.dim <= _LARGEST_FULL_RANK else "mean_field"
        notes.append(f"family {family} chosen for {model.dim} {model.space} coordinates")
    return as_entry(family, model=model)


def named_solver(solver: Any) -> Solver:
    """Return the solver of a name, or the solver itself."""
    way = registry.build("solvers", solver) if isinstance(solver, (str, registry.Spec)) else solver
    if not isinstance(way, Solver):
        raise ConfigError(f"a solver is a name such as 'adam' or a Solver, got {type(way).__name__}.")
    return way


def solver_choice(
    named: Solver | None, objective: Objective, model: Model, family: Family, batch_size: int | None, notes: list[str]
) -> Solver:
    """Return the solver asked for, or the one that suits; refuses a solver that cannot drive the objective."""
    if named is None:
        name, why = _automatic(objective, model, family, batch_size)
        notes.append(f"solver {name} chosen: {why}")
        named = named_solver(name)
    own = objective.own_solver
    if own is not None and registry.entry_name(named) != own:
        raise IncompatibleError(
            f"the objective {describe(objective)!r} is not the descent of a loss: its steps are the solver {own!r}'s, "
            f"not {registry.entry_name(named)!r}'s. Leave solver out, or use solver={own!r}.",
            missing=(f"the solver {own!r}",),
        )
    return named


def _automatic(objective: Objective, model: Model, family: Family, batch_size: int | None) -> tuple[str, str]:
    """Name of the solver that suits, and why, from what the three can do; nothing is measured."""
    if objective.own_solver is not None:
        return objective.own_solver, "the objective is not the descent of a loss, and this drives it"
    if Capability.SIMULATE in model.capabilities:
        return "adam", "the loss is a mean over simulated pairs, a few of them in each step"
    if batch_size is not None:
        return "adam", "minibatches change the loss at every step"
    if Capability.LOCAL in model.capabilities:
        return "adam", "local latents"
    if any(p.requires_grad for p in model.parameters()):
        return "adam", "the model has parameters of its own"
    fewest = getattr(family, "fewest_fixed_draws", lambda: None)()
    if fewest is None:
        return "adam", "the family's optimum on fixed draws need not be bounded"
    if fewest > _MOST_FIXED_DRAWS:
        return "adam", f"the family's optimum is bounded only on {fewest} fixed draws or more"
    if sum(p.numel() for p in family.parameters()) > _MOST_PARAMETERS:
        return "adam", "too many parameters for a quasi-Newton memory"
    lbfgs = registry.build("solvers", "lbfgs")
    try:
        loss = objective.for_fixed_draws("lbfgs").resolve(model, family)
        lbfgs.check(model=model, family=family, batch_size=batch_size)
    except (IncompatibleError, SpecError) as error:
        return "adam", f"on fixed draws not possible ({str(error).split(': use')[0].removesuffix('.')})"
    if not loss.linear_in_draws:
        return "adam", "the objective combines several draws in each value"
    return "lbfgs", "a smooth loss on fixed draws, all data in one step"
