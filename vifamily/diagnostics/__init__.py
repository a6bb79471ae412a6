"""How good a posterior is: importance weights, bounds, distances, agreement of restarts, predictive checks."""

from __future__ import annotations

from vifamily.diagnostics.bounds import (
    Estimate,
    cubo,
    divergence_bound,
    elbo,
    iwae,
    log_evidence,
    wasserstein_bounds,
)
from vifamily.diagnostics.diagnosis import Diagnosis
from vifamily.diagnostics.loo import Loo, loo
from vifamily.diagnostics.moments import MomentErrors, distances, moment_errors
from vifamily.diagnostics.predictive import PredictiveCheck, predictive_check
from vifamily.diagnostics.psis import Psis, draws_needed, k_hat_threshold, psis
from vifamily.diagnostics.restarts import restart_rhat
from vifamily.diagnostics.routing import MixtureScore, Responsibilities, mixture_log_score, responsibilities
from vifamily.diagnostics.stacking import RestartMixture, importance_mixture_weights, stacking_weights
from vifamily.diagnostics.stein import SteinTest, kernel_stein
from vifamily.diagnostics.summary import Summary, summarise
from vifamily.diagnostics.two_sample import median_bandwidth, mmd, sliced_wasserstein

__all__ = [
    "Diagnosis",
    "Estimate",
    "Loo",
    "MixtureScore",
    "MomentErrors",
    "PredictiveCheck",
    "Psis",
    "Responsibilities",
    "RestartMixture",
    "SteinTest",
    "Summary",
    "cubo",
    "distances",
    "divergence_bound",
    "draws_needed",
    "elbo",
    "importance_mixture_weights",
    "iwae",
    "k_hat_threshold",
    "kernel_stein",
    "log_evidence",
    "loo",
    "median_bandwidth",
    "mixture_log_score",
    "mmd",
    "moment_errors",
    "predictive_check",
    "psis",
    "responsibilities",
    "restart_rhat",
    "sliced_wasserstein",
    "stacking_weights",
    "summarise",
    "wasserstein_bounds",
]
