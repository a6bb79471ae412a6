"""Stored references: moments and draws of long Markov chains, made by :mod:`vifamily.problems._references.make`.

Each file ``<name>.npz`` holds ``names``, ``draws`` (float32), the ``mean``, ``sd`` and ``mcse_mean`` of all draws
before thinning, ``rhat``, ``ess_bulk`` and ``ess_tail`` per column, counts of chains, draws and divergences, and the
``command`` that makes it again. Pickles are never read.
"""

from __future__ import annotations

import importlib.resources
import zipfile

import numpy as np

from vifamily.errors import ReferenceDataError
from vifamily.problems._base import Reference

__all__ = ["read_stored", "stored_reference"]

_KEYS = (
    "names",
    "draws",
    "mean",
    "sd",
    "mcse_mean",
    "rhat",
    "ess_bulk",
    "ess_tail",
    "num_chains",
    "num_draws",
    "divergences",
    "command",
)


def read_stored(name: str) -> dict[str, np.ndarray]:
    """Return the arrays stored for a problem.

    Raises:
        ReferenceDataError: If the file is missing, cannot be read, or lacks an array.
    """
    try:
        with (
            (importlib.resources.files(__package__) / f"{name}.npz").open("rb") as file,
            np.load(file, allow_pickle=False) as stored,
        ):
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ReferenceDataError(
            f"the stored reference of {name!r} is missing or damaged ({error}). "
            f"Reinstall the package, or make it again with python -m vifamily.problems._references.make {name}."
        ) from error
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise ReferenceDataError(f"the stored reference of {name!r} lacks {', '.join(missing)}; reinstall the package.")
    return arrays


def stored_reference(name: str) -> Reference:
    """Return the stored reference of a problem.

    Raises:
        ReferenceDataError: If the file is missing or damaged.

    Example:
        >>> stored_reference("poisson_glm").draws.shape
        (2000, 4)
    """
    stored = read_stored(name)
    least = min(stored["ess_bulk"].min(), stored["ess_tail"].min())
    note = (
        f"NUTS, {int(stored['num_chains'])} chains, {int(stored['num_draws'])} draws in all, "
        f"{int(stored['divergences'])} divergences; largest R-hat {stored['rhat'].max():.4f}, "
        f"smallest effective sample size {least:.0f}; "
        f"draws thinned; made by: {stored['command'].item()}"
    )
    return Reference(
        "nuts",
        tuple(str(n) for n in stored["names"]),
        stored["mean"],
        stored["sd"],
        stored["draws"],
        None,
        note,
        stored["mcse_mean"],
    )
