"""Files: tensors as safetensors, everything else as JSON; pickle is never read and nothing is evaluated.

A saved folder holds ``NAME.json`` and one tensor file ``NAME-HASH.safetensors`` that the JSON names with its SHA-256.
The tensor file is written first and the JSON replaced in one step, so a process killed at any moment leaves the folder
at the old state or at the new one, never between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from vifamily.errors import CheckpointError, ConfigError, VifamilyError

__all__ = ["SCHEMA", "field", "prepare", "read", "read_if_any", "write"]

SCHEMA = 1
"""Version of the format; files of another version are refused."""
_LARGEST_JSON = 64 * 2**20
_NON_FINITE = "non_finite"


# -- writing -----------------------------------------------------------------------------------------------------------
def prepare(folder: str | os.PathLike[str]) -> Path:
    """Create a folder if need be and try to write to it, before any work is done.

    Args:
        folder: Where something will be saved.

    Returns:
        The folder.

    Raises:
        ConfigError: If it cannot be created or written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as here:
        ...     prepare(here + "/new").is_dir()
        True
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write to the folder {str(path)!r} ({error}): choose another one.") from error
    return path


def write(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, name: str = "checkpoint"
) -> Path:
    """Save tensors and plain data; a folder that already holds a checkpoint of this name is replaced in one step.

    Args:
        folder: The folder, created if need be.
        tensors: Name to tensor, of any shape, dtype and device.
        meta: Plain data: text, numbers (also NaN and infinite), booleans, None, lists, and dictionaries with text keys.
        name: Name of the files.

    Returns:
        The folder.

    Raises:
        ConfigError: If the folder cannot be written, or ``meta`` holds something else.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as here:
        ...     _ = write(here, {"loc": torch.zeros(2)}, {"step": 7})
        ...     tensors, meta = read(here)
        >>> tensors["loc"].tolist(), meta["step"]
        ([0.0, 0.0], 7)
    """
    _check_name(name)
    plain = _to_json(meta, "meta")
    # Tensors may share memory or be views, which the format does not hold.
    own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    path = prepare(folder)
    try:
        payload = safetensors.torch.save(own)
        digest = hashlib.sha256(payload).hexdigest()
        file = f"{name}-{digest[:16]}.safetensors"
        _replace(path / file, payload)
        header = {"schema": SCHEMA, "tensors": file, "sha256": digest, "meta": plain}
        _replace(path / f"{name}.json", json.dumps(header, allow_nan=False, indent=1).encode())
        for old in path.glob(f"{name}-*.safetensors"):
            if old.name != file and _tensor_file(name).fullmatch(old.name):
                old.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {str(path)!r}: {error}.") from error
    return path


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", name):
        raise ConfigError(f"the name of a checkpoint must be letters, digits and underscores, got {name!r}.")


def _tensor_file(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name) + r"-[0-9a-f]{16}\.safetensors")


def _replace(target: Path, payload: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_NON_FINITE: str(value)}
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise ConfigError(f"{where} has a key that is not text: it cannot be saved.")
        return {key: _to_json(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which cannot be saved: give text, numbers, lists or dictionaries."
    )


# -- reading -----------------------------------------------------------------------------------------------------------
def read_if_any(
    folder: str | os.PathLike[str], *, name: str = "checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read as :func:`read` does, or return None where nothing of this name was saved.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as here:
        ...     read_if_any(here) is None
        True
    """
    _check_name(name)
    return read(folder, name=name) if os.path.lexists(Path(folder) / f"{name}.json") else None


def read(folder: str | os.PathLike[str], *, name: str = "checkpoint") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write` saved.

    Args:
        folder: The folder.
        name: Name of the files.

    Returns:
        Tensors (on the CPU) and plain data (tuples come back as lists).

    Raises:
        CheckpointError: If a file is missing, truncated, changed, of another version, or not of this form.
    """
    _check_name(name)
    path = Path(folder)
    header = _header(path / f"{name}.json")
    file = field(header, "tensors", str)
    # A name that is not ours could point anywhere.
    if not _tensor_file(name).fullmatch(file):
        raise CheckpointError(
            f"{path / f'{name}.json'} names the tensor file {file[:80]!r}, which is not a name of this format."
        )
    tensors = _tensors(path / file, field(header, "sha256", str))
    try:
        meta = _from_json(header.get("meta"))
    except RecursionError as error:
        raise CheckpointError(f"{path / f'{name}.json'} is nested too deeply; it is not valid.") from error
    if not isinstance(meta, dict):
        raise CheckpointError(
            f"{path / f'{name}.json'} holds no 'meta' dictionary; the file is not a checkpoint of this package."
        )
    return tensors, meta


def _header(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(
                f"{path} is larger than {_LARGEST_JSON // 2**20} MiB; it is not a checkpoint of this package."
            )
        header = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}: give the folder that was saved to.") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}.") from error
    except VifamilyError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({type(error).__name__}: {str(error)[:120]}); it is damaged."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} holds a {type(header).__name__}, not a checkpoint.")
    schema = header.get("schema")
    if isinstance(schema, bool) or schema != SCHEMA:
        raise CheckpointError(
            f"{path} has format version {str(schema)[:40]!r}, and this version of the package reads {SCHEMA}: "
            "save it again, or use the version of the package that wrote it."
        )
    return header


def _refuse_constant(text: str) -> float:
    raise CheckpointError(f"the JSON holds {text}, which this format writes differently; the file is damaged.")


def _tensors(path: Path, expected: str) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise CheckpointError(f"{path} is truncated or changed: its SHA-256 is not the one in the JSON beside it.")
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except FileNotFoundError as error:
        raise CheckpointError(f"the tensor file {path} is missing: copy the whole folder.") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}.") from error
    except VifamilyError:
        raise
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {str(error)[:120]}.") from error


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_NON_FINITE}:
            if value[_NON_FINITE] not in ("nan", "inf", "-inf"):
                raise CheckpointError("the JSON holds a malformed number; the file is damaged.")
            return float(value[_NON_FINITE])
        return {key: _from_json(inner) for key, inner in value.items()}
    return [_from_json(inner) for inner in value] if isinstance(value, list) else value


def field(data: Any, key: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
    """Return an entry of plain data read from a file, checked for its type.

    Args:
        data: The dictionary.
        key: The entry.
        kind: The type or types it must have; ``float`` takes integers too, ``int`` takes no booleans.
        optional: Whether None or a missing entry is allowed, and given as None.

    Raises:
        CheckpointError: If it is missing or of another type.

    Example:
        >>> field({"dim": 2}, "dim", int)
        2
    """
    value: Any = data.get(key) if isinstance(data, Mapping) else None
    if value is None and optional:
        return None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise CheckpointError(
            f"the saved entry {key!r} must be {wanted}, got {type(value).__name__}; the file is damaged."
        )
    return float(value) if kinds == (float,) else value
