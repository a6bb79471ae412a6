"""Packages that only language models need, imported when they are used and not before."""

from __future__ import annotations

import importlib
from typing import Any

from vifamily.errors import MissingExtraError

__all__ = ["require"]

_IN_EXTRA = frozenset({"accelerate", "datasets", "peft", "pyarrow", "safetensors", "tokenizers", "transformers"})


def require(module: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Its full name, such as ``"transformers"``.
        purpose: What it is wanted for, as the subject of a sentence.

    Returns:
        The module.

    Raises:
        MissingExtraError: If the package is not installed, or is and cannot be imported; the message says which.

    Example:
        >>> require("json", "this example").dumps([1])
        '[1]'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == package:
            command = 'pip install "vifamily[llm]"' if package in _IN_EXTRA else f"pip install {package}"
            raise MissingExtraError(f"{purpose} needs {package}, which is not installed. Run: {command}") from error
        raise _broken(package, purpose, error) from error
    except (ImportError, RuntimeError) as error:
        raise _broken(package, purpose, error) from error


def _broken(package: str, purpose: str, error: Exception) -> MissingExtraError:
    # transformers and what stands on it import torchvision where it is there, and fail with it
    return MissingExtraError(
        f"{purpose} needs {package}, which is installed but cannot be imported: {error}. A torchvision that does not "
        "fit the installed torch is the usual cause; where nothing else needs it, run: pip uninstall torchvision"
    )
