"""Variational families: one registered entry per file."""

from __future__ import annotations

from vifamily.families._base import Family, FamilyEntry

__all__ = ["Family", "FamilyEntry"]
