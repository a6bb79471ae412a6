"""Named problems with known answers: one registered entry per file."""

from __future__ import annotations

from vifamily.problems._base import Problem, Reference

__all__ = ["Problem", "Reference"]
