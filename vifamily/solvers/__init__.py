"""Solvers: one registered entry per file."""

from __future__ import annotations

from vifamily.solvers._base import Run, Solver, StepReport, Task
from vifamily.solvers._compiled import worth_compiling
from vifamily.solvers.adam import Adam
from vifamily.solvers.closed_form import ClosedFormUpdates
from vifamily.solvers.laplace import Laplace
from vifamily.solvers.lbfgs import Lbfgs
from vifamily.solvers.natural_gradient import NaturalGradient
from vifamily.solvers.particle_flow import ParticleFlow
from vifamily.solvers.pathfinder import Pathfinder
from vifamily.solvers.two_player import TwoPlayer

__all__ = [
    "Adam",
    "ClosedFormUpdates",
    "Laplace",
    "Lbfgs",
    "NaturalGradient",
    "ParticleFlow",
    "Pathfinder",
    "Run",
    "Solver",
    "StepReport",
    "Task",
    "TwoPlayer",
    "worth_compiling",
]
