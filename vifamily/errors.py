"""Exceptions of the package.

Every exception is a :class:`VifamilyError` and also one of Python's own classes, so that ``except ValueError``
keeps working. Messages say what was wrong, what was got, and what to do.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = [
    "BenchmarkError",
    "CheckpointError",
    "ConfigError",
    "ConvergenceWarning",
    "DataError",
    "DeviceError",
    "IncompatibleError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteLossError",
    "NotAvailableError",
    "RegistryError",
    "ReferenceDataError",
    "ShapeError",
    "SpecError",
    "SupportError",
    "UnknownNameError",
    "VifamilyError",
    "VifamilyWarning",
]


class VifamilyError(Exception):
    """Base of every exception raised on purpose by the package."""


class ConfigError(VifamilyError, ValueError):
    """An argument has a value that cannot be used (negative size, unknown option, unwritable folder)."""


class DataError(VifamilyError, ValueError):
    """Data contain NaN or infinite values, are empty, or disagree in length."""


class ShapeError(VifamilyError, ValueError):
    """An array has the wrong rank or size, or would broadcast silently."""


class DeviceError(VifamilyError, ValueError):
    """Tensors live on different devices or have different floating dtypes."""


class SupportError(VifamilyError, ValueError):
    """A support cannot be mapped to unconstrained space, or a value lies outside its support."""


class SpecError(VifamilyError, ValueError):
    """A spec string such as ``"renyi(alpha=0.5)"`` cannot be parsed or has wrong arguments."""


class UnknownNameError(SpecError, KeyError):
    """A name is not registered; the message lists what is, nearest match first."""

    def __str__(self) -> str:
        """Return the message itself (``KeyError`` would show its repr)."""
        return str(self.args[0]) if self.args else ""


class RegistryError(VifamilyError, RuntimeError):
    """Two entries claim one name, or an entry does not have the form its kind requires."""


class IncompatibleError(VifamilyError, TypeError, ValueError):
    """A model, a family and an objective cannot meet; raised before the first step.

    Args:
        message: The whole sentence.
        missing: The names of the missing capabilities.
        works_with: What would work instead, by kind (``{"families": [...], "objectives": [...]}``).
    """

    def __init__(
        self, message: str, *, missing: tuple[str, ...] = (), works_with: dict[str, list[str]] | None = None
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.works_with = works_with or {}


class ModelError(VifamilyError, RuntimeError):
    """User code inside a model raised; the original exception is the cause."""


class NonFiniteLossError(VifamilyError, RuntimeError):
    """The loss or its gradient stopped being finite; the fit stopped there.

    Args:
        message: The whole sentence.
        step: The step at which it happened, counted from zero.
        term: The term of the loss that is not finite.
        parameter: The latent or family parameter where it shows first, when one can be named.
        posterior: The last finite state as a posterior, or None when there was none.
    """

    def __init__(
        self, message: str, *, step: int, term: str, parameter: str | None = None, posterior: Any = None
    ) -> None:
        super().__init__(message)
        self.step = step
        self.term = term
        self.parameter = parameter
        self.posterior = posterior

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process boundaries without the posterior, whose model may hold functions that cannot be pickled."""
        return functools.partial(type(self), step=self.step, term=self.term, parameter=self.parameter), self.args


class NotAvailableError(VifamilyError, RuntimeError):
    """The posterior or model cannot do what was asked (no density, no closed-form entropy, no predictive)."""


class CheckpointError(VifamilyError, RuntimeError, ValueError):
    """A saved file is missing, truncated, of another version, or does not hold what it must."""


class ReferenceDataError(VifamilyError, FileNotFoundError, ValueError):
    """Reference data that a problem needs are not on this machine."""


class BenchmarkError(VifamilyError, RuntimeError):
    """A worker of a benchmark failed, or answered something that cannot be used; a peer cannot be installed."""


class MissingExtraError(VifamilyError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


class VifamilyWarning(UserWarning):
    """Base of every warning of the package."""


class ConvergenceWarning(VifamilyWarning):
    """A fit ended before its stopping rule was met."""
