"""Models: one registered entry per file."""

from __future__ import annotations

from vifamily.models._base import BatchSource, Model

__all__ = ["BatchSource", "Model"]
