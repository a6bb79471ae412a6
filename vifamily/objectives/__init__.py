"""Objectives: one registered entry per file."""

from __future__ import annotations

from vifamily.objectives._base import Estimator, Objective, log_ratio_parts, weighted_sum
from vifamily.objectives._closed_form import ClosedForm
from vifamily.objectives._per_datum import unit_log_likelihood
from vifamily.objectives.annealed import Annealed
from vifamily.objectives.batch_and_match import BatchAndMatch
from vifamily.objectives.bb_alpha import BbAlpha
from vifamily.objectives.cubo import Cubo
from vifamily.objectives.elbo import Elbo
from vifamily.objectives.f_divergence import FDivergence
from vifamily.objectives.gsm import Gsm
from vifamily.objectives.iwae import Iwae
from vifamily.objectives.perturbative import Perturbative
from vifamily.objectives.renyi import Renyi
from vifamily.objectives.renyi_predictive import RenyiPredictive
from vifamily.objectives.roc_arc import RocArc
from vifamily.objectives.tail_adaptive import TailAdaptive
from vifamily.objectives.tempered import Tempered
from vifamily.objectives.thermodynamic import Thermodynamic
from vifamily.objectives.vr_max import VrMax

__all__ = [
    "Annealed",
    "BatchAndMatch",
    "BbAlpha",
    "ClosedForm",
    "Cubo",
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
    "RenyiPredictive",
    "VrMax",
    "log_ratio_parts",
    "unit_log_likelihood",
    "weighted_sum",
]
