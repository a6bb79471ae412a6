"""What a fit returns: draws, density, summary, diagnosis, files."""

from __future__ import annotations

from vifamily.posterior._posterior import Posterior, load
from vifamily.posterior._record import FitRecord, versions
from vifamily.posterior._trace import trace_of

__all__ = ["FitRecord", "Posterior", "load", "trace_of", "versions"]
