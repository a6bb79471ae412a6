"""Eight schools against the draws of posteriordb."""

from __future__ import annotations

import torch

from vifamily.problems._base import Problem
from vifamily.problems._eight_schools import eight_schools_model
from vifamily.problems._folder import find_folder, read_folder
from vifamily.registry import register

__all__ = ["posteriordb_eight_schools"]


@register("problems", "posteriordb_eight_schools")
def posteriordb_eight_schools(*, parameterisation: str = "noncentered") -> Problem:
    """Eight schools judged against the published draws of posteriordb.

    The model is that of :func:`~vifamily.problems.eight_schools.eight_schools`.

    Args:
        parameterisation: ``"noncentered"`` or ``"centered"``; the reference is the same.

    Returns:
        The problem, with reference moments and 2,000 draws of ``theta``, ``mu`` and ``tau``.

    Raises:
        ConfigError: If the parameterisation is neither.
        ReferenceDataError: If the reference data are not on this machine.
    """
    data, reference = read_folder(find_folder("posteriordb", "eight_schools"))
    effect, error = (torch.as_tensor(data[key], dtype=torch.float64) for key in ("y", "sigma"))
    model, quantities = eight_schools_model(effect, error, parameterisation)
    return Problem(
        "posteriordb_eight_schools",
        model,
        reference,
        f"Hierarchy of eight effects with unknown spread, {parameterisation}, against published draws.",
        quantities,
    )
