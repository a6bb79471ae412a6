"""One cell of a comparison: what is fitted, what came out, and how it is kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vifamily.errors import ConfigError

__all__ = ["Cell", "Outcome", "load", "plain", "store"]

SCHEMA = 1
Status = Literal["ok", "failed", "not possible"]
Array = NDArray[np.float64]


def plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it: numbers that are not finite become None.

    Example:
        >>> plain({"k_hat": float("inf"), "steps": np.int64(3), "names": ("a",)})
        {'k_hat': None, 'steps': 3, 'names': ['a']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return None if value is None else str(value)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One fit of a comparison.

    Attributes:
        problem: Label of the problem.
        family: Label of the family.
        objective: Label of the objective.
        seed: Root seed, the same for every method.
        settings: Budget and solver, the same for every method (``draws``, ``steps``, ``time_limit``, ``solver``).
        fingerprint: What the problem is, in numbers; a cell whose problem changed is computed anew.
        given: The objects themselves for what was not given as a string, by ``problem``, ``family``, ``objective``.
        resumable: False when an object without a spec takes part, for then a change of it could not be noticed.
        metrics: Names of the metrics against reference draws that are computed besides the standard ones.
    """

    problem: str
    family: str
    objective: str
    seed: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resumable: bool = True
    metrics: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Where the cell stands in the grid."""
        return self.problem, self.family, self.objective, self.seed

    @property
    def name(self) -> str:
        """File name without ending: readable, and unique for the place in the grid."""
        text = f"{self.problem}--{self.family}--{self.objective}--seed{self.seed}"
        digest = hashlib.sha256(repr(self.place).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '_', text)[:120]}-{digest}"

    def key(self, versions: Mapping[str, str]) -> str:
        """Return a hash of everything that the result depends on."""
        content = {
            "schema": SCHEMA,
            "place": list(self.place),
            "settings": plain(dict(self.settings)),
            "fingerprint": self.fingerprint,
            "metrics": list(self.metrics),
            "versions": dict(versions),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def __str__(self) -> str:
        """Return the place in words."""
        return f"{self.problem} x {self.family} x {self.objective} (seed {self.seed})"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of one cell.

    Attributes:
        problem: Label of the problem.
        family: Label of the family.
        objective: Label of the objective.
        seed: Root seed.
        status: ``ok``, ``failed``, or ``not possible`` when the three cannot meet.
        reason: Why there is no result, one line.
        values: Figures of merit by name (see ``vifamily.compare.MEASURES``) and the words of the fit.
        errors: Error of the mean of each quantity in reference standard deviations, by name.
        names: Names of the quantities.
        draws: Some draws of the posterior, ``(draw, quantity)``, or None.
        trace: The course of the fit, by name.
        notes: Remarks and warnings of the fit.
        resumed: Whether it was read from disk instead of computed.
    """

    problem: str
    family: str
    objective: str
    seed: int
    status: Status = "ok"
    reason: str | None = None
    values: Mapping[str, float | int | str | bool | None] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()
    draws: Array | None = None
    trace: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    resumed: bool = False

    @classmethod
    def of(cls, cell: Cell, **fields: Any) -> Outcome:
        """Return the outcome of a cell."""
        return cls(cell.problem, cell.family, cell.objective, cell.seed, **fields)

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Where the cell stands in the grid."""
        return self.problem, self.family, self.objective, self.seed

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the draws as plain data."""
        fields = dataclasses.asdict(dataclasses.replace(self, draws=None))
        return {key: plain(value) for key, value in fields.items() if key not in ("draws", "resumed")}


def _replace(path: Path, write: Any) -> None:
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def store(folder: Path, cell: Cell, outcome: Outcome, key: str) -> None:
    """Keep an outcome so that a killed run finds it whole or not at all.

    The draws are written first and the JSON file last, each under a temporary name and then renamed: a JSON file with
    the right key means that the cell is finished.

    Raises:
        ConfigError: If the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draws = folder / f"{cell.name}.npz"
        if outcome.draws is None:
            draws.unlink(missing_ok=True)
        else:
            values = np.asarray(outcome.draws, dtype=np.float64)
            _replace(draws, lambda file: np.savez_compressed(file, draws=values))
        content = {"schema": SCHEMA, "key": key, "has_draws": outcome.draws is not None, **outcome.to_dict()}
        text = json.dumps(content, allow_nan=False, indent=1).encode()
        _replace(folder / f"{cell.name}.json", lambda file: file.write(text))
    except OSError as error:
        raise ConfigError(
            f"cannot keep results in {folder}: {error.strerror or error}. Choose another out=."
        ) from error


def load(folder: Path, cell: Cell, key: str) -> Outcome | None:
    """Return a finished outcome with this key, or None where there is none that can be used.

    A file that is truncated, foreign or of another configuration counts as not there; failed cells are tried again.
    """
    try:
        content = json.loads((folder / f"{cell.name}.json").read_text("utf-8"))
        if content["schema"] != SCHEMA or content["key"] != key or content["status"] == "failed":
            return None
        draws = None
        if content["has_draws"]:
            # opened here, for numpy leaves a damaged file open
            with (folder / f"{cell.name}.npz").open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                draws = np.asarray(file["draws"], dtype=np.float64)
        known = {field.name for field in dataclasses.fields(Outcome)} - {"draws", "resumed"}
        outcome = Outcome(**{name: content[name] for name in known}, draws=draws, resumed=True)
        return outcome if outcome.place == cell.place else None
    except Exception:  # whatever is wrong with the file, the answer is to compute the cell
        return None
