"""Amortised inference: one fit for every observation of a simulator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vifamily import posterior as posteriors
from vifamily.posterior.amortised._family import AmortisedFamily, ConditionedFamily
from vifamily.posterior.amortised._fit import fit_amortised
from vifamily.posterior.amortised._posterior import AmortisedPosterior
from vifamily.posterior.amortised._refine import Refined
from vifamily.posterior.amortised._truncated import truncated
from vifamily.posterior.amortised.encoders import Encoder, Image, Series, Set, Vector
from vifamily.posterior.amortised.sbi_checks import (
    calc_misspecification_mmd,
    check_sbc,
    check_tarp,
    run_sbc,
    run_tarp,
)

__all__ = [
    "AmortisedFamily",
    "AmortisedPosterior",
    "ConditionedFamily",
    "Encoder",
    "Image",
    "Refined",
    "Series",
    "Set",
    "Vector",
    "calc_misspecification_mmd",
    "check_sbc",
    "check_tarp",
    "fit_amortised",
    "load",
    "run_sbc",
    "run_tarp",
    "truncated",
]


def load(path: str | os.PathLike[str], *, encoder: Any = None, **options: Any) -> Any:
    """Load a saved posterior, amortised or not. Nothing in the files is executed.

    Args:
        path: The folder that ``save`` wrote.
        encoder: For an amortised posterior whose encoder was a module of the user's own: one of the same architecture.
        **options: ``model=``, the model or the simulator; ``device=``; and, for a posterior that is not amortised,
            ``family=``; see :func:`vifamily.posterior.load` and :meth:`AmortisedPosterior.load`.

    Returns:
        A :class:`~vifamily.posterior.Posterior` or an :class:`AmortisedPosterior`, whichever was saved there.

    Raises:
        CheckpointError: If a file is missing, truncated, changed, of another version, or does not fit.

    Example:
        >>> load("nowhere")
        Traceback (most recent call last):
        vifamily.errors.CheckpointError: there is no checkpoint at nowhere/posterior.json: give the folder that was
        saved to.
    """
    if (Path(path) / "amortised.json").exists():
        return AmortisedPosterior.load(path, encoder=encoder, **options)
    return posteriors.load(path, **options)
