"""Problems kept in a folder: a data file and a file with the reference posterior.

The folder is looked for where the environment variable ``VIFAMILY_REFERENCE_DATA`` says, else in ``shared`` beside the
checkout. Inside, a problem is ``<collection>/<name>/`` with ``data.json`` or ``data.npz``, and ``reference.npz``;
pickles are never read.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vifamily.errors import ReferenceDataError
from vifamily.problems._base import Reference

__all__ = ["ENVIRONMENT", "find_folder", "read_folder", "reference_root"]

ENVIRONMENT = "VIFAMILY_REFERENCE_DATA"
_INDEX = re.compile(r"\[([0-9, ]+)\]$")


def reference_root() -> Path:
    """Return the folder of reference data, whether it exists or not."""
    given = os.environ.get(ENVIRONMENT)
    return Path(given).expanduser() if given else Path(__file__).resolve().parents[2].parent / "shared"


def find_folder(collection: str, name: str) -> Path:
    """Return the folder of a problem.

    Args:
        collection: ``"posteriordb"`` or ``"inference_gym"``.
        name: Name of the folder inside it.

    Raises:
        ReferenceDataError: If there is none; the message says where it was looked for.
    """
    folder = reference_root() / collection / name
    if not folder.is_dir():
        raise ReferenceDataError(
            f"this problem needs reference data that are not here: there is no folder {folder}. "
            f"Set the environment variable {ENVIRONMENT} to the folder that holds {collection}/{name}."
        )
    return folder


def read_folder(path: str | Path) -> tuple[dict[str, Any], Reference]:
    """Read a problem's data and reference.

    Args:
        path: Folder with ``data.json`` or ``data.npz``, and ``reference.npz`` with ``names``, ``mean``, ``sd`` and
            optionally ``draws`` and ``mcse_mean``.

    Returns:
        The data, numbers as they are and lists as arrays; and the reference, its columns counted from 0 where the file
        counts from 1.

    Raises:
        ReferenceDataError: If a file is missing, cannot be read, or does not hold what it must.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ReferenceDataError(f"there is no folder {folder}.")
    if (folder / "data.json").is_file():
        data = _read_json(folder / "data.json")
    elif (folder / "data.npz").is_file():
        data = dict(_read_arrays(folder / "data.npz"))
    else:
        raise ReferenceDataError(f"the folder {folder} has neither data.json nor data.npz.")
    return data, _reference(folder / "reference.npz")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReferenceDataError(f"cannot read {path}: {error}. Fetch the file again.") from error
    if not isinstance(content, dict):
        raise ReferenceDataError(
            f"{path} must hold a mapping from names to numbers or lists, got {type(content).__name__}."
        )
    return {name: _plain(value, f"{path}, entry {name!r}") for name, value in content.items()}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ReferenceDataError(f"{where}: the rows of the list differ in length.") from error
    if array.dtype.kind not in "if" or not array.size:
        raise ReferenceDataError(f"{where}: must be a number or a list of numbers, got {str(value)[:60]!r}.")
    return array


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here, because NumPy leaves the file open when it finds it damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ReferenceDataError(f"cannot read {path}: {error}. Fetch the file again.") from error


def _reference(path: Path) -> Reference:
    stored = _read_arrays(path)
    missing = [key for key in ("names", "mean", "sd") if key not in stored]
    if missing:
        raise ReferenceDataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(stored) or 'nothing'}.")
    if stored["names"].dtype.kind != "U" or stored["names"].ndim != 1:
        raise ReferenceDataError(f"{path}: names must be a list of strings, got dtype {stored['names'].dtype}.")
    numeric = {key: stored[key] for key in ("mean", "sd", "draws", "mcse_mean") if key in stored}
    for key, value in numeric.items():
        if value.dtype.kind not in "if":
            raise ReferenceDataError(f"{path}: {key} must be numbers, got dtype {value.dtype}.")
    snapshot = f", snapshot {stored['snapshot'].item()}" if "snapshot" in stored else ""
    try:
        reference = Reference(
            "published",
            tuple(_from_zero(str(name)) for name in stored["names"]),
            numeric["mean"],
            numeric["sd"],
            numeric.get("draws"),
            None,
            f"read from {path.parent.parent.name}/{path.parent.name}{snapshot}",
            numeric.get("mcse_mean"),
        )
    except ReferenceDataError as error:
        raise ReferenceDataError(f"{path}: {error}") from error
    if reference.draws is not None:
        # Thinned draws can be off by a few hundredths of a standard deviation; more means that columns and names do not
        # belong together.
        off = np.abs(reference.draws.mean(0) - reference.mean) / reference.sd
        if off.max() > 0.3:
            raise ReferenceDataError(
                f"{path}: draws and mean disagree for {reference.names[int(off.argmax())]!r}, "
                "so columns and names do not belong together. Fetch the file again."
            )
    return reference


def _from_zero(name: str) -> str:
    """``theta[1]`` to ``theta[0]``: the database counts from 1, this package from 0."""
    found = _INDEX.search(name)
    if found is None:
        return name
    return f"{name[: found.start()]}[{','.join(str(int(i) - 1) for i in found.group(1).split(','))}]"
