"""Solvers: one registered entry per file."""

from __future__ import annotations

from vifamily.solvers._base import Run, Solver, StepReport, Task
from vifamily.solvers.adam import Adam
from vifamily.solvers.lbfgs import Lbfgs

__all__ = ["Adam", "Lbfgs", "Run", "Solver", "StepReport", "Task"]
