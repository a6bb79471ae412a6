"""What a fit returns: draws, density, summary, diagnosis, files."""

from __future__ import annotations

from vifamily.posterior._posterior import Posterior, load
from vifamily.posterior._record import FitRecord, versions

__all__ = ["FitRecord", "Posterior", "load", "versions"]
