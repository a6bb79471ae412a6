"""Packages that only language models need, imported when they are used and not before."""

from __future__ import annotations

import importlib
from typing import Any

from vifamily.errors import ConfigError, MissingExtraError, VifamilyError

__all__ = ["pretrained", "require"]

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


def pretrained(kind: str, name: str, what: str, **options: Any) -> Any:
    """Load something of transformers by its name or path.

    Args:
        kind: The class, such as ``"AutoTokenizer"``.
        name: A folder, or a name on the hub.
        what: What it is, for the message of an error.
        options: For its ``from_pretrained``.

    Raises:
        ConfigError: If it cannot be loaded.
        MissingExtraError: If transformers is not installed.
    """
    auto = getattr(require("transformers", f"loading {what}"), kind)
    try:
        return auto.from_pretrained(name, **options)
    except VifamilyError:
        raise
    except Exception as error:  # the library and what it stands on raise dozens of kinds
        raise ConfigError(f"cannot load {what} {name!r}: {error}") from error


def _broken(package: str, purpose: str, error: Exception) -> MissingExtraError:
    # transformers and what stands on it import torchvision where it is there, and fail with it
    return MissingExtraError(
        f"{purpose} needs {package}, which is installed but cannot be imported: {error}. A torchvision that does not "
        "fit the installed torch is the usual cause; where nothing else needs it, run: pip uninstall torchvision"
    )
