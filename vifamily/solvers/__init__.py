"""Solvers: one registered entry per file."""

from __future__ import annotations

from vifamily.solvers._base import Run, Solver, StepReport, Task
from vifamily.solvers.adam import Adam

__all__ = ["Adam", "Run", "Solver", "StepReport", "Task"]
