"""Labels of what is compared: strings, entries, and a user's own objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from vifamily import registry
from vifamily.errors import ConfigError

__all__ = ["Item", "items", "split_specs"]


@dataclasses.dataclass(frozen=True)
class Item:
    """One problem, family or objective of a comparison.

    Attributes:
        label: What it is called in tables: its spec where it has one.
        given: The object, or None when the spec says everything.
        resumable: Whether the label pins it down.
    """

    label: str
    given: Any = None
    resumable: bool = True


def split_specs(text: str) -> list[str]:
    """Split a list of specs at the commas that stand outside brackets and quotes.

    Example:
        >>> split_specs("elbo, renyi(alpha=0.5), mixture(components=2, of=full_rank)")
        ['elbo', 'renyi(alpha=0.5)', 'mixture(components=2, of=full_rank)']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _entry_spec(kind: str, value: Any) -> str | None:
    """The spec of an entry object, from its fields that differ from their defaults."""
    mark = getattr(type(value), "__vifamily_entry__", None)
    if mark is None or mark[0] != kind or not dataclasses.is_dataclass(value):
        return None
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.init and (default is dataclasses.MISSING or own != default):
            changed[field.name] = own
    text = str(registry.Spec(str(mark[1]), changed))
    try:
        return text if registry.build(kind, text) == value else None
    except Exception:  # a field that no spec can write (a tensor, a function): the object goes along as it is
        return None


def _item(kind: str, value: Any) -> Item:
    if isinstance(value, (str, registry.Spec)):
        spec = registry.parse(value) if isinstance(value, str) else value
        if (
            kind != "problems"
        ):  # wrong names and arguments are told before the first fit; problems are built by the caller
            registry.build(kind, spec)
        else:
            registry.lookup(kind, spec.name)
        return Item(str(spec))
    spec_text = _entry_spec(kind, value)
    if spec_text is not None:
        return Item(spec_text)
    name = getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__
    return Item(str(name), value, resumable=False)


def items(kind: str, values: Any) -> list[Item]:
    """Return the items of one axis of the grid.

    Args:
        kind: ``problems``, ``families`` or ``objectives``.
        values: A spec, an object, or a sequence of them. A string may hold several, separated by commas.

    Raises:
        ConfigError: If there are none, or two share a label.
        UnknownNameError: If a name is not registered.
        SpecError: If the arguments of a spec do not fit.
    """
    if isinstance(values, str):
        values = split_specs(values)
    elif not isinstance(values, Sequence) and not isinstance(values, (set, frozenset)):
        values = [values]
    out = [_item(kind, value) for value in _flat(values)]
    labels = [item.label for item in out]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} stands more than once among the {kind}; name each once.")
    if not out:
        raise ConfigError(
            f"a comparison needs at least one of the {kind}; there are: {', '.join(registry.names(kind))}."
        )
    return out


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, str):
            yield from split_specs(value)
        else:
            yield value
