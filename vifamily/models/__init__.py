"""Models: one registered entry per file."""

from __future__ import annotations

from vifamily.models._base import BatchSource, Model
from vifamily.models.density import Density

__all__ = ["BatchSource", "Density", "Model"]
