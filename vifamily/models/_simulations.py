"""Simulated pairs of parameters and data, in memory and on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vifamily.errors import CheckpointError, ConfigError, DataError, ShapeError

__all__ = ["SimulationFolder", "Simulations"]

_INDEX = "simulations.json"
_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Simulations:
    """Pairs of parameters and simulated data, all finite.

    Attributes:
        theta: Constrained parameters side by side, ``(pair, column)``.
        x: Data, ``(pair, *shape)``.
        non_finite: Simulations that were left out because a number of them was not finite.

    Raises:
        ShapeError: If the two do not have the same number of rows.
        DataError: If there is none.

    Example:
        >>> pairs = Simulations.of(torch.zeros(3, 1), torch.tensor([[1.0], [float("nan")], [2.0]]))
        >>> len(pairs), pairs.non_finite
        (2, 1)
    """

    theta: Tensor
    x: Tensor
    non_finite: int = 0

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.theta.dim() != 2 or self.x.dim() < 1 or self.theta.shape[0] != self.x.shape[0]:
            raise ShapeError(
                "simulations need parameters (pair, column) and data (pair, ...) with as many rows, got "
                f"{tuple(self.theta.shape)} and {tuple(self.x.shape)}."
            )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return int(self.theta.shape[0])

    @classmethod
    def of(cls, theta: Tensor, x: Tensor, non_finite: int = 0) -> Simulations:
        """Leave out the rows that are not finite, and count them."""
        pairs = cls(theta, x, non_finite)
        if not len(pairs):
            return pairs
        good = theta.isfinite().all(-1) & x.unsqueeze(-1).flatten(1).isfinite().all(-1)
        if bool(good.all()):
            return pairs
        return cls(theta[good], x[good], non_finite + int((~good).sum()))

    @classmethod
    def join(cls, parts: Sequence[Simulations]) -> Simulations:
        """Put several sets one after the other.

        Raises:
            DataError: If nothing finite is left.
        """
        widths = {part.theta.shape[1] for part in parts}
        if len(widths) > 1:
            raise ShapeError(f"parameters must all have one number of columns, got {sorted(widths)}.")
        shapes = {tuple(part.x.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise ShapeError(f"simulated data must all have one shape, got {', '.join(map(str, sorted(shapes)))}.")
        out = cls(
            torch.cat([part.theta for part in parts]),
            torch.cat([part.x for part in parts]),
            sum(part.non_finite for part in parts),
        )
        if not len(out):
            raise DataError(
                f"all {out.non_finite} simulations have numbers that are not finite: there is nothing to learn from."
            )
        return out


class SimulationFolder:
    """A folder of simulations that can be resumed and extended: one safetensors file per chunk, and an index in JSON.

    Chunks are only ever added. Each is written under another name and moved into place, so a process killed at any
    moment leaves whole chunks behind.

    Args:
        folder: The folder, created if need be.
        identity: What the simulations depend on, plain data: another identity is refused.

    Raises:
        ConfigError: If the folder cannot be written.
        CheckpointError: If it holds simulations of another kind.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(folder)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot write to the folder {str(self.path)!r} ({error}): choose another one."
            ) from error
        self.identity = json.loads(json.dumps(identity))
        self.sizes = self._read_index()

    def _read_index(self) -> list[int]:
        file = self.path / _INDEX
        if not file.exists():
            self._write(_INDEX, json.dumps({"schema": _SCHEMA, "identity": self.identity, "sizes": []}).encode())
            return []
        try:
            header = json.loads(file.read_bytes())
            sizes, identity, schema = header["sizes"], header["identity"], header["schema"]
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise CheckpointError(f"{file} is not an index of simulations, or is damaged: {error}") from error
        if schema != _SCHEMA:
            raise CheckpointError(f"{file} has format version {schema!r}, and this version of the package reads 1.")
        if not isinstance(identity, dict):
            raise CheckpointError(f"{file} does not say how its simulations were made; it is damaged.")
        if identity != self.identity:
            keys = set(identity) | set(self.identity)
            names = sorted(key for key in keys if identity.get(key) != self.identity.get(key))
            raise CheckpointError(
                f"the simulations in {self.path} were made otherwise ({', '.join(names)} differ): use another folder."
            )
        if not isinstance(sizes, list) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise CheckpointError(f"{file} does not list the sizes of its chunks; it is damaged.")
        return list(sizes)

    def _write(self, name: str, payload: bytes) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
            os.replace(temporary, self.path / name)
        except OSError as error:
            raise ConfigError(f"cannot write to the folder {str(self.path)!r}: {error}.") from error

    def _name(self, index: int) -> str:
        return f"chunk-{index:06d}.safetensors"

    def plan(self, num: int, chunk: int) -> list[tuple[int, int]]:
        """Return index and size of the chunks of ``num`` simulations, those that are there included."""
        out, total = list(enumerate(self.sizes)), sum(self.sizes)
        while total < num:
            size = min(chunk, num - total)
            out.append((len(out), size))
            total += size
        return out

    def declare(self, plan: Sequence[tuple[int, int]]) -> None:
        """Write down the sizes of chunks before they are made, so that a resumed run makes the same ones."""
        self.sizes = [size for _, size in plan]
        header = {"schema": _SCHEMA, "identity": self.identity, "sizes": self.sizes}
        self._write(_INDEX, json.dumps(header).encode())

    def has(self, index: int) -> bool:
        """Whether a chunk is there."""
        return (self.path / self._name(index)).exists()

    def add(self, index: int, part: Simulations) -> None:
        """Write a chunk."""
        tensors = {"theta": part.theta.contiguous(), "x": part.x.contiguous()}
        meta = {"non_finite": str(part.non_finite)}
        self._write(self._name(index), safetensors.torch.save(tensors, metadata=meta))

    def read(self, index: int) -> Simulations:
        """Read a chunk.

        Raises:
            CheckpointError: If it is missing, truncated or not of this form.
        """
        file = self.path / self._name(index)
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                dropped = int((opened.metadata() or {}).get("non_finite", 0))
                found = Simulations(opened.get_tensor("theta"), opened.get_tensor("x"), dropped)
        except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{file} is missing or damaged ({error}): delete it, and it is made again."
            ) from error
        whole = index < len(self.sizes) and len(found) + dropped == self.sizes[index] and dropped >= 0
        if (
            not whole
            or str(found.x.dtype) != str(found.theta.dtype)
            or not bool(found.theta.isfinite().all() and found.x.isfinite().all())
        ):
            raise CheckpointError(
                f"{file} does not hold the simulations that its index speaks of: delete it, and it is made again."
            )
        return found
