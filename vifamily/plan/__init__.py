"""What a fit would do, or why it cannot, and what can meet what; all before step one."""

from __future__ import annotations

from vifamily.plan._kinds import KINDS, ModelKind
from vifamily.plan._matrix import Cell, Matrix, Needs, compatibility
from vifamily.plan._plan import (
    Plan,
    alternatives,
    check_batches,
    check_pair,
    default_capabilities,
    describe,
    latent_of,
    make_plan,
    plan,
    resolve_model,
)

__all__ = [
    "KINDS",
    "Cell",
    "Matrix",
    "ModelKind",
    "Needs",
    "Plan",
    "alternatives",
    "check_batches",
    "check_pair",
    "compatibility",
    "default_capabilities",
    "describe",
    "latent_of",
    "make_plan",
    "plan",
    "resolve_model",
]
