"""Objectives: one registered entry per file."""

from __future__ import annotations

from vifamily.objectives._base import Estimator, Objective, log_ratio_parts, weighted_sum
from vifamily.objectives._closed_form import ClosedForm
from vifamily.objectives.batch_and_match import BatchAndMatch
from vifamily.objectives.discrete_stein import DiscreteStein
from vifamily.objectives.elbo import Elbo
from vifamily.objectives.gsm import Gsm
from vifamily.objectives.iwae import Iwae
from vifamily.objectives.operator import Operator
from vifamily.objectives.renyi import Renyi

__all__ = [
    "BatchAndMatch",
    "ClosedForm",
    "DiscreteStein",
    "Elbo",
    "Estimator",
    "Gsm",
    "Iwae",
    "Objective",
    "Operator",
    "Renyi",
    "log_ratio_parts",
    "weighted_sum",
]
