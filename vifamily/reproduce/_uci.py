"""Regression data sets with the standard splits, one file each: ``X``, ``y`` and ``test_index``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import DataError

__all__ = ["Split", "num_splits", "split_of"]


@dataclasses.dataclass(frozen=True)
class Split:
    """A split, scaled by the means and standard deviations of its training rows.

    Attributes:
        x: Training inputs, ``(row, feature)``, float32.
        y: Training targets, ``(row,)``.
        x_test: Test inputs.
        y_test: Test targets, in the same scale.
        scale: Standard deviation of the training targets in their own unit: errors are multiplied by it.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    scale: float


def _read(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    path = folder / f"{name}.npz"
    if not path.exists():
        raise DataError(f"there is no {name}.npz in {folder}: give the folder that holds the data sets.")
    with np.load(path, allow_pickle=False) as found:
        missing = {"X", "y", "test_index"} - set(found.files)
        if missing:
            raise DataError(f"{path} lacks {', '.join(sorted(missing))}.")
        x, y, test = found["X"], found["y"], found["test_index"]
    if x.ndim != 2 or y.shape != x.shape[:1] or test.ndim != 2 or not np.isfinite(x).all() or not np.isfinite(y).all():
        raise DataError(f"{path} must hold finite X (row, feature) and y (row,), and test_index (split, row).")
    return x, y, test


def num_splits(folder: Path, name: str) -> int:
    """Number of splits that come with a data set."""
    return int(_read(folder, name)[2].shape[0])


def split_of(folder: Path, name: str, index: int) -> Split:
    """Return one split of a data set.

    Args:
        folder: Where the files are.
        name: Name of the data set.
        index: Number of the split.

    Raises:
        DataError: If there is no such file or split, or it does not hold what it should.
    """
    x, y, test = _read(folder, name)
    if not 0 <= index < len(test):
        raise DataError(f"{name} has splits 0 to {len(test) - 1}, got {index}.")
    held = np.zeros(len(y), dtype=bool)
    held[test[index]] = True
    centre, sd = x[~held].mean(0), x[~held].std(0)
    scaled = (x - centre) / np.where(sd > 0, sd, 1.0)
    middle, scale = float(y[~held].mean()), float(y[~held].std()) or 1.0
    target = (y - middle) / scale

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).float()

    return Split(tensor(scaled[~held]), tensor(target[~held]), tensor(scaled[held]), tensor(target[held]), scale)
