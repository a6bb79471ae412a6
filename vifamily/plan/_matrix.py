"""What can meet what: every objective with every family on every kind of model, planned."""

from __future__ import annotations

import dataclasses
import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, VifamilyError
from vifamily.objectives import Objective
from vifamily.plan._kinds import KINDS
from vifamily.plan._plan import make_plan
from vifamily.types import Capability, Space

__all__ = ["Cell", "Matrix", "Needs", "compatibility"]

Mark = Literal["required", "alternative", "not used"]
_MARKS: Mapping[Mark, str] = {"required": "●", "alternative": "○", "not used": "–"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What comes of one objective, one family and one model.

    Attributes:
        objective: The objective's name or spec.
        family: The family's.
        model: The kind of model.
        works: Whether it can be fitted.
        estimator: The gradient estimator that would be used, or None.
        solver: The solver that would be used, or None where it cannot be fitted.
        warnings: What the plan warns of.
        missing: The capabilities that stand in the way, empty where it works.
        reason: Why it cannot be fitted, one line.
    """

    objective: str
    family: str
    model: str
    works: bool
    estimator: str | None = None
    solver: str | None = None
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        """Return estimator and solver, or a dash."""
        if not self.works:
            return _MARKS["not used"]
        return str(self.solver) if self.estimator is None else f"{self.estimator}, {self.solver}"


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an objective needs and is.

    Attributes:
        objective: Its name or spec.
        model: Capability of models to whether it is required, one of several alternatives, or not used.
        family: The same of families.
        min_draws: Fewest draws per step.
        implicit: Whether a family will do that has reparameterised draws and nothing else.
        discrete: Whether it takes integer latents.
        minibatches: ``"unbiased"``, ``"biased"``, ``"per_datum"`` or ``"no"``.
        value_kind: What its value is.
        renyi_order: The order of the divergence it stands for, or None.
        blind: Whether it is blind to the weights of separate modes.
        own_solver: The only solver that drives it, or None.
        freezes_model: Whether the model's own parameters stay as they are.
    """

    objective: str
    model: Mapping[str, Mark]
    family: Mapping[str, Mark]
    min_draws: int
    implicit: bool
    discrete: bool
    minibatches: str
    value_kind: str
    renyi_order: float | tuple[float, float] | None
    blind: bool
    own_solver: str | None
    freezes_model: bool


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What can meet what; prints as tables.

    Attributes:
        needs: What each objective needs, by objective.
        families: The families.
        models: Kind of model to its letter in tables and what it is.
        cells: One for each objective, family and kind of model.
    """

    needs: tuple[Needs, ...]
    families: tuple[str, ...]
    models: Mapping[str, tuple[str, str]]
    cells: tuple[Cell, ...]

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives."""
        return tuple(row.objective for row in self.needs)

    def cell(self, objective: str, family: str, model: str) -> Cell:
        """Return one cell.

        Raises:
            ConfigError: If there is none.
        """
        for found in self.cells:
            if (found.objective, found.family, found.model) == (objective, family, model):
                return found
        raise ConfigError(
            f"the matrix has no cell ({objective!r}, {family!r}, {model!r}): objectives are "
            f"{', '.join(self.objectives)}; families {', '.join(self.families)}; models {', '.join(self.models)}."
        )

    def needs_rows(self) -> list[list[str]]:
        """Return marks for each objective and capability, the first row naming the capabilities."""
        columns = [(side, c) for side in ("model", "family") for c in self._used(side)]
        head = ["objective", *(f"{side}: {c}" for side, c in columns)]
        return [head, *([row.objective, *(_MARKS[getattr(row, s).get(c, "not used")] for s, c in columns)]
                        for row in self.needs)]  # fmt: skip

    def traits_rows(self) -> list[list[str]]:
        """Return what else is declared of each objective, the first row naming the columns."""
        head = ["objective", "fewest draws", "implicit family", "integer latents", "minibatches", "value",
                "mode weights", "order", "own solver", "model's parameters"]  # fmt: skip
        return [head, *([
            row.objective, str(row.min_draws), _yes(row.implicit), _yes(row.discrete),
            row.minibatches.replace("_", " "), row.value_kind.replace("_", " "), "blind" if row.blind else "seen",
            _order(row.renyi_order), row.own_solver or _MARKS["not used"],
            "frozen" if row.freezes_model else "fitted",
        ] for row in self.needs)]  # fmt: skip

    def _used(self, side: str) -> list[str]:
        """Capabilities that some objective asks for, in the order in which they are defined."""
        asked = {c for row in self.needs for c in getattr(row, side)}
        return [str(c) for c in Capability if str(c) in asked]

    def overview_rows(self) -> list[list[str]]:
        """Return, for each objective, the letters of the models on which it meets each family; first a header."""
        works = {(c.objective, c.family, c.model) for c in self.cells if c.works}
        return [["objective", *self.families], *(
            [o, *("".join(s for m, (s, _) in self.models.items() if (o, f, m) in works) or _MARKS["not used"]
                  for f in self.families)]
            for o in self.objectives
        )]  # fmt: skip

    def model_rows(self, model: str) -> list[list[str]]:
        """Return, for each objective, estimator and solver with each family on one kind of model; first a header.

        Raises:
            ConfigError: If there is no such kind.
        """
        rows = [[o, *(str(self.cell(o, f, model)) for f in self.families)] for o in self.objectives]
        return [["objective", *self.families], *rows]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that JSON takes."""
        return {
            "needs": [dataclasses.asdict(row) | {"model": dict(row.model), "family": dict(row.family)}
                      for row in self.needs],
            "families": list(self.families),
            "models": {name: {"letter": s, "description": text} for name, (s, text) in self.models.items()},
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }  # fmt: skip

    def __rich__(self) -> Group:
        """Return the tables for a rich console; capabilities are lettered, for their names are long."""
        head, *rows = self.needs_rows()
        letters = [_letter(i) for i in range(len(head) - 1)]
        names = "; ".join(f"{letter} {name}" for letter, name in zip(letters, head[1:], strict=True))
        kinds = "; ".join(f"{letter} {text}" for letter, text in self.models.values())
        title = "What objectives need: ● always, ○ in one of several ways, – not"
        return Group(
            _table(title, ["objective", *letters], rows), Text(names + "\n"),
            _table("What they are", *_split(self.traits_rows())), Text(),
            _table("On which models they meet a family", *_split(self.overview_rows())), Text(kinds),
        )  # fmt: skip

    def __str__(self) -> str:
        """Return the tables as plain text."""
        out = io.StringIO()
        Console(file=out, width=200, color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")

    def __repr__(self) -> str:
        """Return the tables, which is what an interactive session should show."""
        return str(self)


def _order(order: float | tuple[float, float] | None) -> str:
    if order is None:
        return _MARKS["not used"]
    return f"{order[0]:g} to {order[1]:g}" if isinstance(order, tuple) else f"{order:g}"


def _letter(index: int) -> str:
    """Return a, b, ..., z, aa, ab, ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _split(rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return rows[0], rows[1:]


def _yes(value: bool) -> str:  # noqa: FBT001
    return "yes" if value else "no"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "center", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def compatibility(
    objectives: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    models: Sequence[str] | Mapping[str, Any] | None = None,
) -> Matrix:
    """Plan every objective with every family on every kind of model.

    Nothing is fitted and nothing is listed by hand: entries come from the registry, and each cell is what
    :func:`vifamily.plan` says of it.

    Args:
        objectives: Names or specs; None takes every registered one that needs no arguments.
        families: Names or specs; None takes every registered one.
        models: Names of kinds (``density``, ``likelihood``, ``local``, ``discrete``, ``reference``, ``simulator``), or
            models of your own by name (anything that ``fit`` takes); None takes all kinds.

    Returns:
        The matrix; ``print`` shows it.

    Raises:
        UnknownNameError: If an objective or family is not registered.
        ConfigError: If a kind is unknown.

    Example:
        >>> found = compatibility(["elbo", "gsm"], ["mean_field", "full_rank"], ["density"])
        >>> found.cell("gsm", "full_rank", "density").solver, found.cell("gsm", "mean_field", "density").missing
        ('closed_form', ('family: any mean and covariance',))
    """
    built = {name: _built(name) for name in registry.names("objectives")} if objectives is None else {}
    if objectives is not None:
        built = {spec: registry.build("objectives", spec) for spec in objectives}
    losses = {name: loss for name, loss in built.items() if loss is not None}
    forms = tuple(registry.names("families") if families is None else families)
    for form in forms:
        registry.lookup("families", registry.parse(form).name)
    given, kinds = _models(models)
    grid = itertools.product(losses.items(), forms, given.items())
    cells = tuple(_cell(name, loss, form, kind, model) for (name, loss), form, (kind, model) in grid)
    rows = tuple(_needs(name, loss) for name, loss in losses.items())
    return Matrix(rows, forms, kinds, cells)


def _built(name: str) -> Objective | None:
    try:
        loss: Objective = registry.build("objectives", name)
    except (ValueError, RuntimeError, TypeError):
        return None  # needs arguments
    return loss


def _models(asked: Sequence[str] | Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    if isinstance(asked, Mapping):
        said = {name: (f"{i}", name) for i, name in enumerate(asked, 1)}
        return dict(asked), said
    names = tuple(KINDS) if asked is None else tuple(asked)
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ConfigError(f"there is no kind of model {unknown[0]!r}: choose among {', '.join(KINDS)}.")
    return {n: KINDS[n].make() for n in names}, {n: (KINDS[n].letter, KINDS[n].description) for n in names}


def _cell(name: str, loss: Objective, family: str, kind: str, model: Any) -> Cell:
    try:
        with warnings.catch_warnings():
            # networks of no inputs, where every latent is local
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors", category=UserWarning)
            found = make_plan(model, family, loss, "auto", draws=None, batch_size=None, device=None, dtype=None)
    except IncompatibleError as error:
        return Cell(name, family, kind, works=False, missing=tuple(error.missing), reason=str(error).splitlines()[0])
    except VifamilyError as error:  # a family too large for the example
        return Cell(name, family, kind, works=False, reason=str(error).splitlines()[0])
    solver = registry.entry_name(found.solver)
    return Cell(name, family, kind, works=True, estimator=found.estimator, solver=solver, warnings=found.warnings)


def _needs(name: str, loss: Objective) -> Needs:
    sides: dict[str, dict[str, Mark]] = {"model": {}, "family": {}}
    for side, marks in sides.items():
        own = getattr(loss, f"needs_{side}")
        ways = [getattr(estimator, side) for estimator in loss.estimators.values()]
        always = own | (frozenset.intersection(*ways) if ways else frozenset())
        for capability in Capability:
            if capability in always:
                marks[str(capability)] = "required"
            elif any(capability in way for way in ways):
                marks[str(capability)] = "alternative"
    vetoed = loss.never_model | frozenset(c for e in loss.estimators.values() for c in e.never_model)
    able = frozenset(Capability) - (vetoed - loss.needs_model)
    sampler = frozenset({Capability.DRAWS, Capability.REPARAMETERISED})
    implicit = any(not loss.missing(able, sampler, space) for space in loss.spaces)
    return Needs(
        objective=name,
        model=sides["model"],
        family=sides["family"],
        min_draws=loss.min_draws,
        implicit=implicit,
        discrete=Space.DISCRETE in loss.spaces and _runs_on_integers(loss),
        minibatches=loss.subsampling,
        value_kind=loss.value_kind,
        renyi_order=loss.renyi_order,
        blind=loss.blind_to_mode_weights,
        own_solver=loss.own_solver,
        freezes_model=loss.freezes_model,
    )


def _runs_on_integers(loss: Objective) -> bool:
    """Whether it needs no gradient through draws or of the log joint."""
    smooth = {Capability.SCORE, Capability.SECOND_ORDER, Capability.REPARAMETERISED}
    ways = list(loss.estimators.values())
    if (loss.needs_model | loss.needs_family) & smooth:
        return False
    return not ways or any(not (way.model | way.family) & smooth for way in ways)
