"""The optimal ROC curve of two samples: its tangent angle and its arc length, by scikit-learn's conventions."""

from __future__ import annotations

from vifamily.roc._arc_length import ArcLength, arc_length, arc_length_from_angles
from vifamily.roc._classifier import AUCBoundClassifier
from vifamily.roc._display import OptimalRocDisplay
from vifamily.roc._ratio import ArcLengthRatio
from vifamily.roc._stream import ArcLengthStream
from vifamily.roc._two_sample import ArcLengthTest, arc_length_test

__all__ = [
    "AUCBoundClassifier",
    "ArcLength",
    "ArcLengthRatio",
    "ArcLengthStream",
    "ArcLengthTest",
    "OptimalRocDisplay",
    "arc_length",
    "arc_length_from_angles",
    "arc_length_test",
]
