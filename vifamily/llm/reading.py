"""Records of a data set: from JSON Lines, JSON or Parquet files, from the hub, or as they stand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vifamily.errors import DataError
from vifamily.llm._extra import require

__all__ = ["read_records"]

Record = dict[str, Any]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_records(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], *, split: str = "train", subset: str | None = None
) -> list[Record]:
    """Read a data set as a list of dictionaries, one for each record.

    Args:
        source: A file that ends in ``.jsonl`` (one object a line), ``.json`` (a list of objects, or one object a line)
            or ``.parquet``; the name of a data set on the hub, such as ``"trl-lib/ultrafeedback_binarized"``; or
            records themselves, a list of dictionaries or a ``datasets.Dataset``.
        split: The part of a data set on the hub. Files and records are taken whole.
        subset: Which of several data sets under one name on the hub, such as ``"or-bench-80k"``.

    Returns:
        The records, in their order.

    Raises:
        DataError: If the file is missing, empty, no such format, or a line of it cannot be read.
        MissingExtraError: If a Parquet file or the hub is asked for and the package that reads it is not installed.

    Example:
        >>> read_records([{"prompt": "2 + 2 =", "completion": " 4"}])
        [{'prompt': '2 + 2 =', 'completion': ' 4'}]
    """
    if isinstance(source, (str, os.PathLike)):
        records, name = _from_name(source, split, subset), f"'{os.fspath(source)}'"
    else:
        records, name = _from_records(source), "the data set"
    if not records:
        raise DataError(f"{name} holds no records: give at least one.")
    return records


def _from_records(source: Iterable[Mapping[str, Any]]) -> list[Record]:
    if isinstance(source, Mapping):
        raise DataError(
            f"records must be a list of dictionaries, got one mapping with the keys {', '.join(map(str, source))}. "
            "For a dictionary of splits, pass one of them."
        )
    records = []
    for position, record in enumerate(source):
        if not isinstance(record, Mapping):
            raise DataError(f"record {position} must be a dictionary of columns, got {type(record).__name__}.")
        records.append(dict(record))
    return records


def _from_name(source: str | os.PathLike[str], split: str, subset: str | None) -> list[Record]:
    path = Path(source)
    if path.is_dir():
        raise DataError(f"'{path}' is a folder: name one file in it, ending in {', '.join(_SUFFIXES)}.")
    if path.is_file():
        readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"'{path}' must end in one of {', '.join(_SUFFIXES)}, which says how it is read.")
        if path.stat().st_size == 0:
            raise DataError(f"'{path}' is empty: it has no bytes at all.")
        return reader(path)
    name = os.fspath(source)
    if path.suffix.lower() in _SUFFIXES or not _HUB_NAME.fullmatch(name):
        raise DataError(f"there is no file '{name}' (looked for from the folder '{Path.cwd()}').")
    return _from_hub(name, split, subset)


def _json_lines(path: Path) -> list[Record]:
    records = []
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                records.append(_object(json.loads(line), f"line {number} of '{path}'"))
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of '{path}' is not JSON: {error}. Each line must be one object.") from error
        except RecursionError as error:
            raise DataError(f"line {number} of '{path}' is nested too deeply to be a record.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"'{path}' is not text in UTF-8: {error}.") from error
    return records


def _json(path: Path) -> list[Record]:
    try:
        whole = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError:
        return _json_lines(path)  # many files named .json hold an object a line
    except RecursionError as error:
        raise DataError(f"'{path}' is nested too deeply to hold records.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not text in UTF-8: {error}.") from error
    if isinstance(whole, dict):
        whole = [whole]
    if not isinstance(whole, list):
        raise DataError(f"'{path}' must hold a list of objects, got {type(whole).__name__}.")
    return [_object(record, f"record {i} of '{path}'") for i, record in enumerate(whole)]


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object with named columns, got {type(value).__name__}.")
    return value


def _parquet(path: Path) -> list[Record]:
    parquet = require("pyarrow.parquet", f"reading '{path}'")
    arrow = require("pyarrow", f"reading '{path}'")
    try:
        records: list[Record] = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"'{path}' cannot be read as Parquet: {error}.") from error
    return records


def _from_hub(name: str, split: str, subset: str | None) -> list[Record]:
    datasets = require("datasets", f"reading '{name}', which is no file here and is taken for a name on the hub,")
    try:
        found = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library and what it stands on raise dozens of kinds
        raise DataError(
            f"there is no file '{name}' here, and split '{split}' of a data set of that name on the hub cannot be "
            f"loaded: {error}"
        ) from error
    return _from_records(found)
