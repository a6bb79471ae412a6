"""Amortised inference: one fit for every observation of a simulator."""

from __future__ import annotations

from vifamily.amortised._family import AmortisedFamily, ConditionedFamily
from vifamily.amortised._fit import fit_amortised
from vifamily.amortised._posterior import AmortisedPosterior
from vifamily.amortised.encoders import Encoder, Image, Series, Set, Vector

__all__ = [
    "AmortisedFamily",
    "AmortisedPosterior",
    "ConditionedFamily",
    "Encoder",
    "Image",
    "Series",
    "Set",
    "Vector",
    "fit_amortised",
]
