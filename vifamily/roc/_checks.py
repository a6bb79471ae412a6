"""What settings and points must be, said in words before anything is computed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vifamily.errors import ConfigError, DataError, ShapeError

__all__ = ["check_fraction", "check_positive", "check_whole", "check_widths", "numbers_of", "one_label_each"]

Array = NDArray[np.float64]


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """See that a setting is an integer of at least ``least``.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ConfigError(f"{name} must be {kind}, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """See that a setting is a positive and finite number.

    Raises:
        ConfigError: If it is not.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive and finite, got {value!r}.")


def check_fraction(name: str, value: Any) -> None:
    """See that a setting is a number between 0 and 1, neither of them.

    Raises:
        ConfigError: If it is not.
    """
    if not _is_number(value) or not 0 < value < 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value!r}.")


def check_widths(hidden: Any, fewest: int) -> None:
    """See that the widths of hidden layers are positive integers, of ``fewest`` layers or more.

    Raises:
        ConfigError: If they are not.
    """
    if not isinstance(hidden, Sequence | np.ndarray) or isinstance(hidden, str) or len(hidden) < fewest:
        wanted = "the widths of one layer or more" if fewest else "the widths of layers"
        raise ConfigError(f"hidden must name {wanted}, such as (32, 32), got {hidden!r}.")
    for width in hidden:
        check_whole("a width in hidden", width)


def numbers_of(values: Any, what: str) -> Array:
    """Values as an array of real numbers; a tensor is taken off its graph and its device.

    Raises:
        DataError: If they are not real numbers, or rows differ in length.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    try:
        found = np.asarray(values)
        if not np.iscomplexobj(found):
            return found.astype(float)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be real numbers in rows of one length: {error}") from error
    raise DataError(f"{what} must be real numbers, got complex ones: give real and imaginary parts as two features.")


def one_label_each(x: Any, y: NDArray[Any]) -> None:
    """See that labels are a vector with one label for each point.

    Raises:
        ShapeError: If they are not.
    """
    points = np.shape(x)
    if y.ndim != 1 or not points or len(y) != points[0]:
        raise ShapeError(f"one label for each point is needed, got labels of shape {y.shape} and points of {points}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
