"""Pareto-smoothed importance sampling, under the name by which diagnostics are looked for."""

from __future__ import annotations

from vifamily.numerics.psis import FEWEST_DRAWS, Psis, draws_needed, k_hat_threshold, psis

__all__ = ["FEWEST_DRAWS", "Psis", "draws_needed", "k_hat_threshold", "psis"]
