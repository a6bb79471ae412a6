"""The contract kit: what every objective, family, model and solver must keep, as functions that anyone can call.

>>> from vifamily import testing
>>> print(testing.check_objective("renyi(alpha=0.5)").passed[:3])
('declarations', 'refusals', 'declared_needs')
"""

from __future__ import annotations

from vifamily.testing import targets, tolerances
from vifamily.testing._report import ContractError, Report
from vifamily.testing.everything import check_registry
from vifamily.testing.families import check_family
from vifamily.testing.models import check_model
from vifamily.testing.objectives import check_objective
from vifamily.testing.solvers import check_solver

__all__ = [
    "ContractError",
    "Report",
    "check_family",
    "check_model",
    "check_objective",
    "check_registry",
    "check_solver",
    "targets",
    "tolerances",
]
