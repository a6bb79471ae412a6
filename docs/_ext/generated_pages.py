"""Pages made when the site is built: one for each module, each registered entry and each notebook.

Nothing is listed by hand, so a new file in ``vifamily/objectives`` has its page without an edit here. Pages go to
``docs/api``, ``docs/registry`` and ``docs/notebooks``, which git ignores.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "vifamily"
KINDS = {
    "objectives": "How an answer is scored.",
    "families": "What the answer may look like.",
    "models": "The Bayesian problem.",
    "weights": "How a low-dimensional latent becomes the weights of a network.",
    "solvers": "How the loss is driven down, and when to stop.",
    "problems": "Named problems with known answers.",
}


WORDS = {
    "value_kind": {
        "lower_bound": "minus a lower bound on the log evidence",
        "upper_bound": "an upper bound on the log evidence",
        "divergence": "a divergence, zero at the posterior",
        "surrogate": "orders answers, and is no bound or divergence",
        "none": "says nothing by itself",
    },
    "subsampling": {
        "unbiased": "unbiased",
        "biased": "allowed, and biased",
        "per_datum": "only where every latent is local; then one bound per datum, unbiased",
        "no": "refused",
    },
}


def heading(text: str, mark: str = "=") -> list[str]:
    """Return a title as lines."""
    return [text, mark * len(text), ""]


def first_sentence(thing: object) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def write(path: Path, lines: list[str]) -> None:
    """Write a page unless it is there with the same text, so that Sphinx re-reads only what changed."""
    text = "\n".join(lines).rstrip() + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


def remove_others(folder: Path, kept: set[Path]) -> None:
    """Remove pages of modules and entries that are gone."""
    for path in folder.rglob("*.rst"):
        if path not in kept:
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


# --- the API: one page for each public module ---


def public_modules() -> Iterator[ModuleType]:
    """Import and yield the package and its modules whose names have no leading underscore.

    A module behind an optional dependency that is not installed is left out; its message names the extra.
    """
    package = importlib.import_module(PACKAGE)
    yield package
    for info in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        try:
            yield importlib.import_module(info.name)
        except ImportError as error:
            if f"{PACKAGE}[" not in str(error):
                raise


def home_of(module: ModuleType, name: str) -> str | None:
    """Return the module whose page documents a public name of ``module``, or None for what is not ours.

    What is defined in a private module has no page of its own; it belongs to the package that makes it public.
    """
    thing = getattr(module, name, None)
    if inspect.ismodule(thing):
        return None
    origin = getattr(thing, "__module__", None)
    if origin is None or not isinstance(origin, str) or not hasattr(thing, "__name__"):
        return module.__name__  # a constant: it is documented where it is made public
    if not origin.startswith(PACKAGE):
        return None
    if origin == module.__name__:
        return origin
    hidden = [part.startswith("_") for part in origin.split(".")]
    if any(hidden):
        owner = ".".join(origin.split(".")[: hidden.index(True)])
        return module.__name__ if owner == module.__name__ else owner
    return origin


def public_names(module: ModuleType) -> list[str]:
    """Return ``__all__``, or the module's own public classes and functions."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    ]


def is_documented(thing: object) -> bool:
    """Whether autodoc can describe it: classes and functions; constants are described in the module's text."""
    return inspect.isclass(thing) or callable(thing)


def module_page(module: ModuleType) -> list[str]:
    """Return the page of one module: its text, its own names in full, the others as links."""
    names = public_names(module)
    own = [n for n in names if home_of(module, n) == module.__name__ and is_documented(getattr(module, n))]
    links = [(n, home) for n in names if (home := home_of(module, n)) not in (None, module.__name__)]
    lines = heading(module.__name__)
    lines += [f".. automodule:: {module.__name__}"]
    if own:
        lines += [f"   :members: {', '.join(own)}", "   :show-inheritance:", "   :member-order: bysource"]
    lines += [""]
    if links:
        lines += [".. list-table:: Public names documented elsewhere", "   :widths: 30 70", ""]
        for name, home in sorted(links):
            thing = getattr(module, name)
            target = f"{home}.{thing.__name__}"
            lines += [f"   * - :py:obj:`{name} <{target}>`", f"     - {first_sentence(thing)}"]
    return lines


def write_api(folder: Path) -> None:
    """Write the API pages and their index."""
    pages = {module.__name__: module_page(module) for module in public_modules()}
    names = sorted(pages)
    index = heading("Reference")
    index += ["One page for each public module, from its docstrings.", "", ".. toctree::", "   :maxdepth: 1", ""]
    index += [f"   {name}" for name in names]
    write(folder / "index.rst", index)
    for name, lines in pages.items():
        write(folder / f"{name}.rst", lines)
    remove_others(folder, {folder / "index.rst", *(folder / f"{name}.rst" for name in names)})


# --- the registry: one page for each entry ---


def written_spec(name: str, entry: Any) -> str:
    """Return the spec string with every argument at its default."""
    try:
        parameters = inspect.signature(entry).parameters.values()
    except (TypeError, ValueError):
        return name
    shown = [
        f"{p.name}={p.default!r}" if p.default is not p.empty else f"{p.name}=..."
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and not hasattr(p.default, "default_factory")
    ]
    return f"{name}({', '.join(shown)})" if shown else name


def facts(entry: Any) -> Iterator[tuple[str, str]]:
    """Yield what an entry declares about itself, as (label, text)."""
    labels = {
        "needs_model": "Needs of the model",
        "needs_family": "Needs of the family",
        "capabilities": "Can do",
        "value_kind": "Value",
        "subsampling": "Minibatches",
        "space": "Space",
        "spaces": "Spaces",
        "min_draws": "Fewest draws per step",
        "default_draws": "Draws per step",
        "estimators": "Estimators, best first",
    }
    for attribute, label in labels.items():
        value = inspect.getattr_static(entry, attribute, None)
        if isinstance(value, (property, staticmethod, classmethod)) or callable(value) or value is None:
            continue
        if isinstance(value, str) and value in WORDS.get(attribute, {}):
            text = WORDS[attribute][value]
        elif isinstance(value, (frozenset, set)):
            text = ", ".join(sorted(str(v) for v in value))
        elif isinstance(value, (tuple, list, dict)):
            text = ", ".join(str(v) for v in value)
        else:
            text = str(value).replace("_", " ")
        if text:
            yield label, text
    if hasattr(entry, "blind_to_mode_weights"):
        yield from objective_facts(entry)


def objective_facts(entry: Any) -> Iterator[tuple[str, str]]:
    """Yield what only objectives declare: what they are blind to, their order, and what they do to solver and model."""
    blind = "does not see them: posteriors that differ in nothing else look the same to it"
    yield "Weights of separate modes", blind if entry.blind_to_mode_weights else "seen"
    with contextlib.suppress(ValueError, RuntimeError, TypeError):  # an entry that needs arguments has no defaults
        order = entry().renyi_order
        shown = (
            "none"
            if order is None
            else f"between {order[0]:g} and {order[1]:g}"
            if isinstance(order, tuple)
            else f"{order:g}"
        )
        yield "Rényi order at its defaults", shown
    yield "Solver", f"{entry.own_solver} only" if entry.own_solver else "any that descends a loss"
    yield "The model's own parameters", "stay as they are" if entry.freezes_model else "are fitted beside the family"
    if entry.never_model:
        yield "Refuses models with", ", ".join(sorted(str(c) for c in entry.never_model))


# --- what can meet what ---


def list_table(rows: list[list[str]], title: str = "") -> list[str]:
    """Return rows, the first a header, as a table."""
    lines = [f".. list-table:: {title}".rstrip(), "   :header-rows: 1", "   :stub-columns: 1", ""]
    for row in rows:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    return [*lines, ""]


def write_matrix(path: Path) -> None:
    """Write the page of every objective with every family on every kind of model."""
    found = importlib.import_module(f"{PACKAGE}.plan").compatibility()
    lines = heading("What can meet what")
    lines += [
        "Every registered objective with every registered family, as ``vf.plan`` judges them; ``vifamily list "
        "--matrix`` prints the same, with ``--json`` also why a cell is empty. :doc:`../planning` says how to read it.",
        "",
    ]
    lines += heading("What objectives need", "-")
    lines += ["● always, ○ in one of several ways (estimators), – not.", "", *list_table(found.needs_rows())]
    lines += heading("What they are", "-") + list_table(found.traits_rows())
    lines += heading("Where they run", "-")
    lines += [f"{letter}: {text}." for letter, text in found.models.values()] + [""]
    lines += list_table(found.overview_rows())
    for model, (_, text) in found.models.items():
        lines += heading(text[0].upper() + text[1:], "-")
        lines += ["Estimator and solver that ``auto`` takes at the defaults.", "", *list_table(found.model_rows(model))]
    write(path, lines)


def entry_page(name: str, entry: Any) -> list[str]:
    """Return the page of one entry: how to write it, what it declares, its docstring."""
    target = f"{entry.__module__}.{entry.__qualname__}"
    lines = heading(name)
    lines += [f'Written as ``"{written_spec(name, entry)}"``; defined by :py:obj:`{target}`.', ""]
    rows = list(facts(entry))
    if rows:
        lines += [".. list-table::", "   :widths: 25 75", "   :stub-columns: 1", ""]
        for label, text in rows:
            lines += [f"   * - {label}", f"     - {text}"]
        lines += [""]
    directive = "autoclass" if inspect.isclass(entry) else "autofunction"
    lines += [f".. {directive}:: {target}", "   :no-index:", ""]
    return lines


def own_entries(registry: ModuleType, kind: str) -> dict[str, Any]:
    """Return the package's own entries; what others have installed beside it is not ours to document."""
    entries = {name: registry.lookup(kind, name) for name in registry.names(kind)}
    return {name: entry for name, entry in entries.items() if entry.__module__.startswith(f"{PACKAGE}.")}


def write_registry(folder: Path) -> None:
    """Write a page for each entry, an index for each kind and one above them."""
    registry = importlib.import_module(f"{PACKAGE}.registry")
    kept = {folder / "index.rst", folder / "matrix.rst"}
    write_matrix(folder / "matrix.rst")
    top = heading("Registered entries")
    top += [
        "Everything that can be named in a spec string, from the registry.",
        "",
        ".. toctree::",
        "   :maxdepth: 2",
        "",
        "   matrix",
    ]
    for kind in registry.kinds():
        entries = own_entries(registry, kind)
        if not entries:
            continue
        page = heading(kind.capitalize())
        page += [KINDS.get(kind, ""), "", ".. list-table::", "   :widths: 25 75", "   :header-rows: 1", ""]
        page += ["   * - Name", "     - What it is"]
        for name, entry in entries.items():
            page += [f"   * - :doc:`{name}`", f"     - {first_sentence(entry)}"]
            path = folder / kind / f"{name}.rst"
            write(path, entry_page(name, entry))
            kept.add(path)
        page += ["", ".. toctree::", "   :hidden:", "", *(f"   {name}" for name in entries)]
        write(folder / kind / "index.rst", page)
        kept.add(folder / kind / "index.rst")
        top += [f"   {kind}/index"]
    write(folder / "index.rst", top)
    remove_others(folder, kept)


# --- the notebooks: their text and code; what they print is theirs to show when they run ---


def notebook_page(path: Path) -> list[str]:
    """Return a notebook as a page: text as it is, code as blocks, and the file itself to take away."""
    lines: list[str] = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"]).rstrip()
        lines += ["```python", source, "```", ""] if cell["cell_type"] == "code" else [source, ""]
        if len(lines) == 2:  # below the title
            lines += [f"The notebook itself: {{download}}`{path.name} <../../notebooks/{path.name}>`.", ""]
    return lines


def write_notebooks(source: Path, folder: Path) -> None:
    """Write a page for each notebook."""
    kept = {folder / f"{path.stem}.md": notebook_page(path) for path in sorted(source.glob("*.ipynb"))}
    for path, lines in kept.items():
        write(path, lines)
    for path in folder.glob("*.md"):
        if path not in kept:
            path.unlink()


def write_all(docs: Path) -> None:
    """Write every generated page below the documentation folder."""
    write_api(docs / "api")
    write_registry(docs / "registry")
    write_notebooks(docs.parent / "notebooks", docs / "notebooks")
