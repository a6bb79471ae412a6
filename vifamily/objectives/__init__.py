"""Objectives: one registered entry per file."""

from __future__ import annotations

from vifamily.objectives._base import Estimator, Objective, log_ratio_parts, weighted_sum
from vifamily.objectives.elbo import Elbo
from vifamily.objectives.iwae import Iwae
from vifamily.objectives.renyi import Renyi

__all__ = ["Elbo", "Estimator", "Iwae", "Objective", "Renyi", "log_ratio_parts", "weighted_sum"]
