"""Weights: one registered entry per file."""

from __future__ import annotations

from vifamily.weights._base import LayerWeights
from vifamily.weights._convert import convert
from vifamily.weights._entry import NetworkWeights, WeightsEntry

__all__ = ["LayerWeights", "NetworkWeights", "WeightsEntry", "convert"]
