"""Imports inside the package point down only (docs/design.md, "The layout").

The walk reads the source, so an import inside a function, under ``if TYPE_CHECKING`` or through
``importlib.import_module("vifamily...")`` counts like any other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "vifamily"
FOLDER = Path(__file__).resolve().parents[1] / PACKAGE

FLOORS = (
    ("types", "errors", "rng", "numerics"),
    ("registry", "supports", "plots", "report", "progress", "interrupts", "trackers", "watch"),
    ("objectives", "families", "models", "weights", "solvers"),
    ("diagnostics", "checkpoint", "posterior", "plan", "start", "fit", "loop", "grid_fit", "problems"),
    ("ntk", "roc", "llm"),
    ("compare", "reproduce", "benchmark"),
    ("cli", "testing"),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
# Within a floor these stay apart: entries meet through protocols and the registry, and `fit` finds problems by name.
STRANGERS = {frozenset((a, b)) for a in FLOORS[2] for b in FLOORS[2] if a != b} | {frozenset(("fit", "problems"))}
# The facade gathers the public names, and __main__ runs the command line: both see everything, and nothing sees them.
EXEMPT = {"", "__main__"}


def resolve(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    """Absolute name of the module that a ``from`` import names."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def called_import(node: ast.AST) -> str | None:
    """The module named in ``importlib.import_module("...")`` or ``__import__("...")``."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    argument = node.args[0]
    if name not in ("import_module", "__import__") or not isinstance(argument, ast.Constant):
        return None
    return argument.value if isinstance(argument.value, str) else None


def imported_units(source: str, module: str, *, is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield the top-level unit of the package behind each import, with its line; the facade is ``""``."""

    def unit(name: str) -> str | None:
        head, _, rest = name.partition(".")
        return rest.split(".")[0] if head == PACKAGE else None

    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve(node, module, is_package=is_package)
            # `from vifamily import rng` reaches a module, `from vifamily import Posterior` the facade.
            names = (
                [f"{PACKAGE}.{a.name}" if a.name in FLOOR else base for a in node.names] if base == PACKAGE else [base]
            )
        elif (called := called_import(node)) is not None:
            names = [called]
        for name in names:
            target = unit(name)
            if target is not None:
                yield target, node.lineno


def breaches_of(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Sentences about the imports of one module that do not point down."""
    here = module.partition(".")[2].split(".")[0]
    if here in EXEMPT:
        return []
    if here not in FLOOR:
        return [f"{module}: '{here}' has no floor; give it one in tests/test_layers.py and docs/design.md"]
    found = []
    for target, line in imported_units(source, module, is_package=is_package):
        where = f"{module}, line {line}"
        if target in EXEMPT:
            found.append(f"{where}: imports the facade '{PACKAGE}', which stands above everything")
        elif target not in FLOOR:
            found.append(f"{where}: imports '{target}', which has no floor")
        elif FLOOR[target] > FLOOR[here]:
            found.append(f"{where}: '{here}' (floor {FLOOR[here]}) imports '{target}' (floor {FLOOR[target]})")
        elif frozenset((here, target)) in STRANGERS:
            found.append(f"{where}: '{here}' imports '{target}', and these two never import each other")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(FOLDER.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(FOLDER).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One cycle as a list of names, or an empty list."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


# --- the package ---


def test_imports_point_down() -> None:
    found = [
        sentence
        for module, path in modules()
        for sentence in breaches_of(path.read_text("utf-8"), module, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_cycle_between_units() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in modules():
        here = module.partition(".")[2].split(".")[0]
        if here not in EXEMPT:
            units = imported_units(path.read_text("utf-8"), module, is_package=path.name == "__init__.py")
            graph.setdefault(here, set()).update(target for target, _ in units if target != here)
    assert cycle_in(graph) == []


def test_walk_reaches_the_package() -> None:
    seen = {module for module, _ in modules()}
    assert {PACKAGE, f"{PACKAGE}.types", f"{PACKAGE}.registry"} <= seen


# --- the walker, on planted breaches ---

BREACHES = {
    "upwards": ("vifamily.rng", "import vifamily.registry", "'rng' (floor 0) imports 'registry' (floor 1)"),
    "upwards from": (
        "vifamily.registry",
        "from vifamily.fit import fit",
        "'registry' (floor 1) imports 'fit' (floor 3)",
    ),
    "through the facade": ("vifamily.errors", "from vifamily import registry", "imports 'registry' (floor 1)"),
    "deferred": (
        "vifamily.types",
        "def f():\n    from vifamily.cli import main",
        "line 2: 'types' (floor 0) imports 'cli'",
    ),
    "for types only": (
        "vifamily.supports",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vifamily.posterior import Posterior",
        "line 3: 'supports' (floor 1) imports 'posterior' (floor 3)",
    ),
    "relative": ("vifamily.numerics.kernels", "from ..models import Density", "'numerics' (floor 0) imports 'models'"),
    "relative sibling": (
        "vifamily.objectives.elbo",
        "from .. import cli",
        "'objectives' (floor 2) imports 'cli' (floor 6)",
    ),
    "by a call": (
        "vifamily.plots",
        "import importlib\nimportlib.import_module('vifamily.compare')",
        "line 2: 'plots' (floor 1) imports 'compare' (floor 5)",
    ),
    "between strangers": ("vifamily.objectives.elbo", "import vifamily.families.flow", "never import each other"),
    "fit and problems": ("vifamily.fit", "from vifamily.problems import toys", "never import each other"),
    "the facade": ("vifamily.fit", "import vifamily as vf", "imports the facade"),
    "a name of the facade": ("vifamily.cli", "from vifamily import Posterior", "imports the facade"),
    "no floor": ("vifamily.utils", "import math", "'utils' has no floor"),
    "imports no floor": ("vifamily.fit", "import vifamily.utils", "imports 'utils', which has no floor"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_planted_breach_is_found(name: str) -> None:
    module, source, expected = BREACHES[name]
    found = breaches_of(source, module)
    assert len(found) == 1
    assert expected in found[0]


def test_planted_breach_in_a_package_file_is_found() -> None:
    # In an __init__.py one dot is the package itself, so two dots reach its parent.
    (found,) = breaches_of("from ..fit import fit", "vifamily.numerics", is_package=True)
    assert "'numerics' (floor 0) imports 'fit' (floor 3)" in found


ALLOWED = {
    "downwards": ("vifamily.cli", "from vifamily.compare import compare\nimport vifamily.rng"),
    "same floor": ("vifamily.fit", "from vifamily.posterior import Posterior"),
    "same unit": ("vifamily.objectives.elbo", "from ._base import Objective\nfrom vifamily.objectives import iwae"),
    "strangers of others": ("vifamily.problems.toys", "from vifamily.models import Density"),
    "other packages": ("vifamily.types", "import vifamily_extras\nfrom torch import nn"),
    "the facade sees all": ("vifamily", "from vifamily.cli import main"),
    "the entry sees all": ("vifamily.__main__", "from vifamily.cli import main"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_import_passes(name: str) -> None:
    module, source = ALLOWED[name]
    assert breaches_of(source, module) == []


def test_planted_cycle_is_found() -> None:
    assert cycle_in({"fit": {"posterior"}, "posterior": {"diagnostics"}, "diagnostics": {"fit"}}) == [
        "diagnostics",
        "fit",
        "posterior",
        "diagnostics",
    ]
    assert cycle_in({"fit": {"posterior", "rng"}, "posterior": {"rng"}}) == []
