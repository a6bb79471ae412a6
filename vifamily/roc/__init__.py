"""The optimal ROC curve of two samples: its tangent angle and its arc length, by scikit-learn's conventions."""

from __future__ import annotations

from vifamily.roc._arc_length import ArcLength, arc_length
from vifamily.roc._ratio import ArcLengthRatio

__all__ = ["ArcLength", "ArcLengthRatio", "arc_length"]
