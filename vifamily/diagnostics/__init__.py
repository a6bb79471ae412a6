"""How good a posterior is: importance weights, bounds, distances, agreement of restarts, predictive checks."""

from __future__ import annotations

from vifamily.diagnostics.arc_length import arc_length
from vifamily.diagnostics.bounds import (
    Estimate,
    cubo,
    divergence_bound,
    elbo,
    iwae,
    log_evidence,
    wasserstein_bounds,
)
from vifamily.diagnostics.calibration import Calibration, SymmetryCheck, sbc, vsbc
from vifamily.diagnostics.classifier_tests import NullTest, c2st, local_c2st
from vifamily.diagnostics.coverage import Coverage, expected_coverage, tarp
from vifamily.diagnostics.diagnosis import Diagnosis
from vifamily.diagnostics.fisher_gap import fisher_gap
from vifamily.diagnostics.loo import Loo, loo
from vifamily.diagnostics.misspecification import misspecification_mmd
from vifamily.diagnostics.moments import MomentErrors, distances, moment_errors
from vifamily.diagnostics.predictive import PredictiveCheck, predictive_check
from vifamily.diagnostics.psis import Psis, draws_needed, k_hat_threshold, psis
from vifamily.diagnostics.restarts import restart_rhat
from vifamily.diagnostics.routing import MixtureScore, Responsibilities, mixture_log_score, responsibilities
from vifamily.diagnostics.stability import Labelled, Spread, Stability, stability, unit_stability
from vifamily.diagnostics.stacking import RestartMixture, importance_mixture_weights, stacking_weights
from vifamily.diagnostics.stein import SteinTest, kernel_stein
from vifamily.diagnostics.summary import Summary, summarise
from vifamily.diagnostics.two_sample import mmd, sliced_wasserstein
from vifamily.numerics.kernels import median_bandwidth

__all__ = [
    "Calibration",
    "Coverage",
    "Diagnosis",
    "Estimate",
    "Labelled",
    "Loo",
    "MixtureScore",
    "MomentErrors",
    "NullTest",
    "PredictiveCheck",
    "Psis",
    "Responsibilities",
    "RestartMixture",
    "Spread",
    "Stability",
    "SteinTest",
    "Summary",
    "SymmetryCheck",
    "c2st",
    "arc_length",
    "cubo",
    "distances",
    "divergence_bound",
    "draws_needed",
    "elbo",
    "expected_coverage",
    "fisher_gap",
    "importance_mixture_weights",
    "iwae",
    "k_hat_threshold",
    "kernel_stein",
    "local_c2st",
    "log_evidence",
    "loo",
    "median_bandwidth",
    "misspecification_mmd",
    "mixture_log_score",
    "mmd",
    "moment_errors",
    "predictive_check",
    "psis",
    "responsibilities",
    "restart_rhat",
    "sbc",
    "sliced_wasserstein",
    "stability",
    "stacking_weights",
    "summarise",
    "vsbc",
    "tarp",
    "unit_stability",
    "wasserstein_bounds",
]
