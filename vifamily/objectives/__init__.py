"""Objectives: one registered entry per file."""

from __future__ import annotations

from vifamily.objectives._base import Estimator, Objective, log_ratio_parts, weighted_sum
from vifamily.objectives._closed_form import ClosedForm
from vifamily.objectives.annealed import Annealed
from vifamily.objectives.batch_and_match import BatchAndMatch
from vifamily.objectives.elbo import Elbo
from vifamily.objectives.f_divergence import FDivergence
from vifamily.objectives.gsm import Gsm
from vifamily.objectives.iwae import Iwae
from vifamily.objectives.perturbative import Perturbative
from vifamily.objectives.renyi import Renyi
from vifamily.objectives.roc_arc import RocArc
from vifamily.objectives.tail_adaptive import TailAdaptive
from vifamily.objectives.tempered import Tempered
from vifamily.objectives.thermodynamic import Thermodynamic

__all__ = [
    "Annealed",
    "BatchAndMatch",
    "ClosedForm",
    "Elbo",
    "Estimator",
    "FDivergence",
    "Gsm",
    "Iwae",
    "Objective",
    "Perturbative",
    "Renyi",
    "RocArc",
    "TailAdaptive",
    "Tempered",
    "Thermodynamic",
    "log_ratio_parts",
    "weighted_sum",
]
