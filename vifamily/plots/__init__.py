"""Pictures from plain arrays.

Each function takes arrays and returns a matplotlib figure that pyplot does not know of; no global state is read or
changed. Save one with ``figure.savefig("picture.png")``; in a notebook, name it as the last line of a cell.
"""

from __future__ import annotations

from vifamily.plots.calibration import ecdf_difference, probability_histograms
from vifamily.plots.cells import Panel, Row, cell_grid
from vifamily.plots.contour import contour, grid_over
from vifamily.plots.pairs import marginals, pairs
from vifamily.plots.routing import alpha_curve, responsibilities
from vifamily.plots.stability import stability
from vifamily.plots.tangent import function_flow, kernel_spectrum, power_laws
from vifamily.plots.traces import k_hat, loss_trace

__all__ = [
    "Panel",
    "Row",
    "cell_grid",
    "contour",
    "ecdf_difference",
    "alpha_curve",
    "cell_grid",
    "contour",
    "function_flow",
    "grid_over",
    "k_hat",
    "kernel_spectrum",
    "loss_trace",
    "marginals",
    "pairs",
    "power_laws",
    "probability_histograms",
    "stability",
    "responsibilities",
]
