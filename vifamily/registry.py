"""One registry for objectives, families, models, weights, solvers and problems.

An entry is a class (or function) in a file of its own inside the folder of its kind, marked with :func:`register`;
nothing else is edited. Third parties add entries through the entry-point groups ``vifamily.objectives``,
``vifamily.families`` and so on. Specs are strings such as ``"renyi(alpha=0.5)"``; they are parsed, never evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import keyword
import math
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vifamily.errors import RegistryError, SpecError, UnknownNameError, VifamilyWarning

__all__ = ["Spec", "build", "describe", "entry_name", "kinds", "lookup", "names", "parse", "refresh", "register"]

_KINDS = ("objectives", "families", "models", "weights", "solvers", "problems")
_LONGEST_SPEC = 2000
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A name with keyword arguments, as written in ``"low_rank(rank=3)"``.

    Attributes:
        name: The registered name.
        kwargs: Keyword arguments; a nested call is a nested ``Spec``.

    Example:
        >>> str(parse("mixture(components=3, of=full_rank(student_t=5))"))
        'mixture(components=3, of=full_rank(student_t=5))'
    """

    name: str
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Return the spec as it would be written."""
        if not self.kwargs:
            return self.name
        inner = ", ".join(f"{key}={_write(value)}" for key, value in self.kwargs.items())
        return f"{self.name}({inner})"


def _write(value: Any) -> str:
    if isinstance(value, Spec):
        # a bare word would be read back as a string
        return str(value) if value.kwargs else f"{value.name}()"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, str) and _is_bare_word(value):
        return value
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_write(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_write(k)}: {_write(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _is_bare_word(text: str) -> bool:
    """Whether a string may stand without quotes: the parser changes non-ASCII identifiers, and keywords are none."""
    return (
        text.isidentifier()
        and text.isascii()
        and not keyword.iskeyword(text)
        and text not in ("inf", "nan", "true", "false")
    )


def kinds() -> tuple[str, ...]:
    """Return the kinds of entries.

    Example:
        >>> kinds()
        ('objectives', 'families', 'models', 'weights', 'solvers', 'problems')
    """
    return _KINDS


def register(kind: str, name: str) -> Callable[[T], T]:
    """Mark a class or function as the entry ``name`` of a kind.

    Args:
        kind: One of :func:`kinds`.
        name: Lower-case identifier by which users call it.

    Returns:
        A decorator that returns its argument unchanged but for the mark.

    Raises:
        RegistryError: If the kind is unknown or the name is not a lower-case identifier.

    Example:
        >>> @register("objectives", "my_loss")
        ... class MyLoss: ...
        >>> entry_name(MyLoss)
        'my_loss'
    """
    if kind not in _KINDS:
        raise RegistryError(f"unknown kind {kind!r}: entries are registered under one of {', '.join(_KINDS)}.")
    if not name.isidentifier() or name != name.lower():
        raise RegistryError(f"the name {name!r} cannot be registered: use a lower-case identifier such as 'my_loss'.")

    def mark(entry: T) -> T:
        entry.__vifamily_entry__ = (kind, name)  # type: ignore[attr-defined]
        return entry

    return mark


def entry_name(entry: Any) -> str:
    """Return the registered name of an entry or of an instance of one, or its class's name where it has none."""
    mark = getattr(entry, "__vifamily_entry__", None)
    if mark is not None:
        return str(mark[1])
    return getattr(entry, "__name__", type(entry).__name__)


def _folder_entries(kind: str) -> dict[str, Any]:
    package = importlib.import_module(f"vifamily.{kind}")
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            mark = getattr(value, "__dict__", {}).get("__vifamily_entry__")
            if mark is not None and mark[0] == kind and value.__module__ == module.__name__:
                _add(found, kind, mark[1], value)
    return found


def _add(found: dict[str, Any], kind: str, name: str, value: Any) -> None:
    if name in found and found[name] is not value:
        raise RegistryError(
            f"two modules claim the name {name!r} among {kind}: {_module(found[name])} and {_module(value)}. "
            "Rename one of them."
        )
    found[name] = value


def _module(value: Any) -> str:
    return str(getattr(value, "__module__", type(value).__module__))


@functools.cache
def _entries(kind: str) -> dict[str, Any]:
    if kind not in _KINDS:
        raise UnknownNameError(f"unknown kind {kind!r}: choose one of {', '.join(_KINDS)}.")
    found = _folder_entries(kind)
    for point in sorted(importlib.metadata.entry_points(group=f"vifamily.{kind}"), key=lambda p: p.name):
        try:
            value = point.load()
        except Exception as error:  # a broken plug-in must not take the package down with it
            warnings.warn(
                f"the {kind} entry point {point.name!r} ({point.value}) could not be loaded: {error!r}. "
                "Reinstall or remove the package that declares it.",
                VifamilyWarning,
                stacklevel=2,
            )
            continue
        _add(found, kind, point.name, value)
    return dict(sorted(found.items()))


def refresh() -> None:
    """Forget what was discovered, so that newly installed entry points are seen."""
    _entries.cache_clear()


def names(kind: str) -> list[str]:
    """Return the registered names of a kind, sorted.

    Raises:
        UnknownNameError: If the kind is unknown.
    """
    return list(_entries(kind))


def lookup(kind: str, name: str) -> Any:
    """Return the entry with a name.

    Raises:
        UnknownNameError: If there is none; the message gives the nearest match and the whole list.
    """
    entries = _entries(kind)
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name, entries, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownNameError(f"no entry named {name!r} among {kind}.{hint} There are: {', '.join(entries) or 'none'}.")


def describe(kind: str, name: str) -> str:
    """Return the first sentence of an entry's docstring."""
    text = inspect.getdoc(lookup(kind, name)) or ""
    return " ".join(text.split("\n\n")[0].split())


def parse(text: str) -> Spec:
    """Parse ``"name"`` or ``"name(key=value, ...)"`` without evaluating anything.

    Values are numbers (also ``inf``, ``nan``), strings, bare words (read as strings), ``True``, ``False``,
    ``None``, lists, tuples, dictionaries, and nested specs.

    Args:
        text: The spec.

    Returns:
        The name and its keyword arguments.

    Raises:
        SpecError: If the text is anything else; nothing in it is ever executed.

    Example:
        >>> parse("renyi(alpha=0.5)").kwargs
        {'alpha': 0.5}
    """
    if not isinstance(text, str):
        raise SpecError(f"a spec must be a string such as 'renyi(alpha=0.5)', got {type(text).__name__}.")
    if len(text) > _LONGEST_SPEC:
        raise SpecError(f"the spec is {len(text)} characters long; at most {_LONGEST_SPEC} are read.")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        return _spec(node, text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"cannot read the spec {text[:80]!r}: write it like 'renyi(alpha=0.5)'.") from error


def _spec(node: ast.expr, text: str) -> Spec:
    if isinstance(node, ast.Name):
        return Spec(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.args or any(k.arg is None for k in node.keywords):
            raise SpecError(f"in {text[:80]!r}: arguments must be given by name, as in 'low_rank(rank=3)'.")
        given = [str(k.arg) for k in node.keywords]
        if twice := next((key for key in given if given.count(key) > 1), None):
            raise SpecError(f"in {text[:80]!r}: the argument {twice!r} is given twice.")
        return Spec(node.func.id, {str(k.arg): _value(k.value, text) for k in node.keywords})
    raise SpecError(
        f"cannot read the spec {text[:80]!r}: write a name, or a name with arguments like 'renyi(alpha=0.5)'."
    )


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, ast.Name):
        return {"inf": math.inf, "nan": math.nan, "true": True, "false": False}.get(node.id, node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        inner = _value(node.operand, text)
        if isinstance(inner, (int, float)) and not isinstance(inner, bool):
            return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.List):
        return [_value(item, text) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, text) for item in node.elts)
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {_value(k, text): _value(v, text) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, ast.Call):
        return _spec(node, text)
    raise SpecError(
        f"in {text[:80]!r}: {ast.unparse(node)[:40]!r} is not a plain value (number, string, list, or a nested spec)."
    )


def build(kind: str, spec: str | Spec) -> Any:
    """Look an entry up and call it with the spec's arguments.

    Args:
        kind: One of :func:`kinds`.
        spec: ``"name(key=value)"`` or a :class:`Spec`.

    Returns:
        What the entry returns, an instance for classes.

    Raises:
        UnknownNameError: If the name is not registered.
        SpecError: If the arguments do not fit; the message lists those that exist.
    """
    parsed = spec if isinstance(spec, Spec) else parse(spec)
    entry = lookup(kind, parsed.name)
    signature = inspect.signature(entry)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = [] if open_ended else [key for key in parsed.kwargs if key not in signature.parameters]
    known = [p for p, v in signature.parameters.items() if v.kind is not v.VAR_KEYWORD]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SpecError(
            f"{parsed.name!r} has no argument {unknown[0]!r}.{hint} It takes: {', '.join(known) or 'none'}."
        )
    try:
        signature.bind(**parsed.kwargs)
    except TypeError as error:
        raise SpecError(f"cannot build {str(parsed)!r}: {error}. It takes: {', '.join(known) or 'none'}.") from error
    return entry(**parsed.kwargs)
