"""Objectives: one registered entry per file."""

from __future__ import annotations

from vifamily.objectives._base import Estimator, Objective, log_ratio_parts, weighted_sum
from vifamily.objectives._closed_form import ClosedForm
from vifamily.objectives.batch_and_match import BatchAndMatch
from vifamily.objectives.elbo import Elbo
from vifamily.objectives.fisher import Fisher
from vifamily.objectives.gsm import Gsm
from vifamily.objectives.iwae import Iwae
from vifamily.objectives.ksd import Ksd
from vifamily.objectives.renyi import Renyi
from vifamily.objectives.svgd import Svgd

__all__ = [
    "BatchAndMatch",
    "ClosedForm",
    "Elbo",
    "Estimator",
    "Fisher",
    "Gsm",
    "Iwae",
    "Ksd",
    "Objective",
    "Renyi",
    "Svgd",
    "log_ratio_parts",
    "weighted_sum",
]
