"""Objectives: one registered entry per file."""

from __future__ import annotations

from vifamily.objectives._base import Estimator, Objective, log_ratio_parts, weighted_sum
from vifamily.objectives._closed_form import ClosedForm
from vifamily.objectives._per_datum import unit_log_likelihood
from vifamily.objectives.annealed import Annealed
from vifamily.objectives.batch_and_match import BatchAndMatch
from vifamily.objectives.bb_alpha import BbAlpha
from vifamily.objectives.cubo import Cubo
from vifamily.objectives.discrete_stein import DiscreteStein
from vifamily.objectives.distilled_importance import DistilledImportance
from vifamily.objectives.elbo import Elbo
from vifamily.objectives.energy_distance import EnergyDistance
from vifamily.objectives.f_divergence import FDivergence
from vifamily.objectives.fisher import Fisher
from vifamily.objectives.gsm import Gsm
from vifamily.objectives.inclusive_kl import InclusiveKl
from vifamily.objectives.inclusive_kl_draws import InclusiveKlDraws
from vifamily.objectives.iwae import Iwae
from vifamily.objectives.ksd import Ksd
from vifamily.objectives.mmd import Mmd
from vifamily.objectives.msc import MarkovianScoreClimbing
from vifamily.objectives.operator import Operator
from vifamily.objectives.perturbative import Perturbative
from vifamily.objectives.renyi import Renyi
from vifamily.objectives.renyi_predictive import RenyiPredictive
from vifamily.objectives.reweighted_wake import ReweightedWake
from vifamily.objectives.roc_arc import RocArc
from vifamily.objectives.roc_arc_critic import RocArcCritic
from vifamily.objectives.sinkhorn import Sinkhorn
from vifamily.objectives.smc_wake import SmcWake
from vifamily.objectives.svgd import Svgd
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
    "DiscreteStein",
    "DistilledImportance",
    "Elbo",
    "EnergyDistance",
    "Estimator",
    "FDivergence",
    "Fisher",
    "Gsm",
    "InclusiveKl",
    "InclusiveKlDraws",
    "Iwae",
    "Ksd",
    "MarkovianScoreClimbing",
    "Mmd",
    "Objective",
    "Operator",
    "Perturbative",
    "Renyi",
    "RenyiPredictive",
    "ReweightedWake",
    "RocArc",
    "RocArcCritic",
    "Sinkhorn",
    "SmcWake",
    "Svgd",
    "TailAdaptive",
    "Tempered",
    "Thermodynamic",
    "RenyiPredictive",
    "VrMax",
    "log_ratio_parts",
    "unit_log_likelihood",
    "weighted_sum",
]
