"""Finished parts of a long reproduction, kept on disk so that one that was cut off goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vifamily.posterior import versions
from vifamily.report import write_text

__all__ = ["digest", "kept_rows"]

_SCHEMA = 1
Rows = list[dict[str, Any]]


def digest(paths: Iterable[Path]) -> str:
    """Return a hash of the contents of files, for parts whose rows depend on them; a missing file counts as empty."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return total.hexdigest()[:16]


def kept_rows(
    folder: Path | None, name: str, settings: Mapping[str, Any], compute: Callable[[], Sequence[Mapping[str, Any]]]
) -> Rows:
    """Return the rows of a part: from its file where that is whole and of the same settings, else computed and kept.

    The file is written under another name and then renamed, so that a run that is killed leaves it whole or not at
    all. What it holds is computed anew when the settings or the versions of packages differ; a change of code within
    a version is not noticed.

    Args:
        folder: Where the files are; None keeps nothing.
        name: What the part is, in words; also the name of its file.
        settings: Everything else that its rows depend on, plain values.
        compute: Makes the rows: plain values, numbers finite or not.

    Raises:
        ConfigError: If the folder cannot be written to.

    Example:
        >>> kept_rows(None, "one", {"seed": 0}, lambda: [{"value": 1.0}])
        [{'value': 1.0}]
    """
    if folder is None:
        return [dict(row) for row in compute()]
    content = {"schema": _SCHEMA, "name": name, "settings": dict(settings), "versions": dict(versions())}
    # written and read again, so that tuples and numbers compare as they will when read from the file
    key = json.loads(json.dumps(content, sort_keys=True))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{re.sub(r'[^A-Za-z0-9.=_-]+', '_', name)[:80]}-{digest}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # whatever is wrong with it: computed anew
        held = json.loads(path.read_text("utf-8"))
        if held["key"] == key and all(isinstance(row, dict) for row in held["rows"]):
            return list(held["rows"])
    # numbers of numpy are written as plain ones
    text = json.dumps({"key": key, "rows": [dict(row) for row in compute()]}, indent=1, default=float)
    write_text(path, text + "\n")
    return list(json.loads(text)["rows"])
