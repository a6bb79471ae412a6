"""What a saved ensemble says of itself: ``ensemble.json`` beside the folders of its members."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vifamily.checkpoint import field
from vifamily.errors import CheckpointError

__all__ = ["MANIFEST", "Manifest", "base_digest", "file_digest", "read_manifest", "read_object", "versions"]

MANIFEST = "ensemble.json"
FORMAT = 1
_SAMPLED = 256
"""Numbers read of each tensor of the base for its digest."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ``ensemble.json`` holds.

    Attributes:
        num_members: Number of members; their folders are ``member_0`` and so on.
        weights: Weights of the members in the mixture.
        log_weights: Their logarithms, to the last digit.
        base: Name or path of the base model, as it was loaded.
        revision: Commit of the base on its hub, where known.
        base_digest: Digest of the base's shapes and of some of its numbers.
        files: Digest of each member's weights, by path in the folder.
        adapter: Kind of the members' adapters: lora, which PEFT loads, or walsh_hadamard.
        training: How it was trained: objective, alpha, unit and more; plain values.
        versions: Versions of the packages that wrote it.
    """

    num_members: int
    weights: tuple[float, ...]
    log_weights: tuple[float, ...]
    base: str
    revision: str | None
    base_digest: str
    files: dict[str, str]
    adapter: str = "lora"
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """Read what a folder says of its ensemble, and check that its files are those that were written.

    Args:
        folder: The folder.

    Returns:
        The manifest.

    Raises:
        CheckpointError: If it is missing or damaged, of another format, or a member's file is missing or changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}: it is no ensemble, or its writing was broken off. Use another folder."
        )
    found = _checked(path, read_object(path))
    for name, digest in found.files.items():
        file = folder / str(name)
        if file.resolve().parent.parent != folder.resolve():
            raise CheckpointError(f"{path} names a file outside its folder: {name!r}.")
        if not file.is_file() or file_digest(file) != digest:
            raise CheckpointError(f"{file} is missing or is not the file that was saved. Use another checkpoint.")
    lacking = sorted({f"member_{k}" for k in range(found.num_members)} - {n.partition("/")[0] for n in found.files})
    if lacking:
        raise CheckpointError(f"{path} names no file with its digest for {', '.join(lacking[:5])}. It is damaged.")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is missing, no JSON, nested too deeply, or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}. It is missing or damaged.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object with named entries, got {type(content).__name__}.")
    return content


def _checked(path: Path, content: dict[str, Any]) -> Manifest:
    """The manifest, once every entry is known to be of its kind and the entries to fit together."""
    written = content.pop("format", None)
    if written != FORMAT:
        raise CheckpointError(f"{path} has format {written!r}; this version reads {FORMAT}.")
    unknown = sorted(set(content) - {entry.name for entry in dataclasses.fields(Manifest)})
    if unknown:
        raise CheckpointError(f"{path} cannot be read: its entry {unknown[0]!r} is unknown to this version.")
    try:
        field(content, "num_members", int)
        for name in ("base", "base_digest"):
            field(content, name, str)
        field(content, "revision", str, optional=True)
        field(content, "files", dict)
        for name, kind in (("adapter", str), ("training", dict), ("versions", dict)):
            field(content, name, kind, optional=True)
        for name in ("weights", "log_weights"):
            content[name] = tuple(field({name: w}, name, float) for w in field(content, name, list))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found = Manifest(**{name: value for name, value in content.items() if value is not None or name == "revision"})
    _check_weights(path, found)
    for name, digest in found.files.items():
        if not isinstance(digest, str):
            raise CheckpointError(f"{path} cannot be read: the digest of {name} must be a string, got {digest!r}.")
    return found


def _check_weights(path: Path, found: Manifest) -> None:
    pairs = list(zip(found.weights, found.log_weights, strict=False))
    if (
        {len(found.weights), len(found.log_weights)} != {found.num_members}
        or not all(0 <= w <= 1 and math.isclose(w, math.exp(min(log, 1.0)), abs_tol=1e-6) for w, log in pairs)
        or not math.isclose(sum(found.weights), 1.0, abs_tol=1e-6)
    ):
        raise CheckpointError(
            f"{path} has weights {list(found.weights)} with logarithms {list(found.log_weights)} for "
            f"{found.num_members} members: they must be from 0, sum to one, and agree."
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def base_digest(base: nn.Module) -> str:
    """Digest of a frozen base: names and shapes of its tensors, with up to 256 numbers of each.

    Adapters are left out, and dtypes and devices do not matter beyond the rounding that a dtype does.

    Args:
        base: The model.

    Returns:
        Hexadecimal digits.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = base_digest(layer)
        >>> _ = layer.weight.data.add_(1)
        >>> base_digest(layer) == before
        False
    """
    digest = hashlib.sha256()
    for name, value in sorted(base.named_parameters(), key=lambda item: item[0]):
        if ".lora_" in name or ".walsh_" in name:
            continue
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        # half precision is the least that a base is loaded in, so what it keeps is what can be compared
        some = flat[::step][:_SAMPLED].float().bfloat16().view(torch.int16).cpu()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)} ".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that take part."""
    out = {"python": platform.python_version()}
    for name in ("vifamily", "torch", "transformers", "peft", "accelerate"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out
