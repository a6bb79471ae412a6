"""How models check arguments and call the user's optional functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily import rng
from vifamily.errors import ConfigError, DataError, ModelError, ShapeError, VifamilyError
from vifamily.supports import Layout

__all__ = ["call_seeded", "check_callable", "check_count", "check_device", "check_dtype", "prior_draws"]


def check_callable(value: Any, name: str, form: str) -> None:
    """Raise :class:`ConfigError` unless the value can be called."""
    if not callable(value):
        raise ConfigError(f"{name} must be a function {form}, got {type(value).__name__}.")


def check_count(value: Any, name: str) -> int:
    """Return a positive integer, or raise :class:`ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    return value


def check_dtype(dtype: Any) -> torch.dtype:
    """Return a floating dtype, or raise :class:`ConfigError`."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating torch dtype such as torch.float64, got {dtype!r}.")
    return dtype


def check_device(device: Any) -> torch.device:
    """Return a device, or raise :class:`ConfigError`."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must name a torch device such as 'cpu' or 'cuda:0', got {device!r}.") from error


def call_seeded(what: str, function: Callable[..., Any], *args: Any, generator: torch.Generator) -> Any:
    """Call user code that draws at random.

    It gets ``generator=`` where it takes that argument; otherwise it runs inside :func:`vifamily.rng.scoped`.

    Raises:
        ModelError: If it raises; the original exception is the cause.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = inspect.signature(lambda: None).parameters
    try:
        if "generator" in parameters:
            return function(*args, generator=generator)
        with rng.scoped(generator):
            return function(*args)
    except VifamilyError:
        raise
    except Exception as error:
        raise ModelError(f"{what} raised {type(error).__name__}: {error}") from error


def prior_draws(
    layout: Layout, function: Callable[..., Any], num_draws: int, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Draw from the prior by the user's function, checked, on unconstrained space, ``(num_draws, dim)``."""
    check_count(num_draws, "num_draws")
    drawn = call_seeded("sample_prior", function, num_draws, generator=generator)
    if isinstance(drawn, Mapping):
        layout.check(drawn)
        drawn = layout.unconstrain(drawn)
    if not isinstance(drawn, Tensor):
        raise ShapeError(f"sample_prior must return named parameters or a tensor, got {type(drawn).__name__}.")
    if tuple(drawn.shape) != (num_draws, layout.dim):
        raise ShapeError(f"sample_prior must return {(num_draws, layout.dim)} numbers, got shape {tuple(drawn.shape)}.")
    if not bool(torch.isfinite(drawn).all()):
        raise DataError("sample_prior gave draws that are not finite on unconstrained space.")
    return drawn.to(like)
