"""The contract kit: what every objective, family, model and solver must keep, as functions that anyone can call.

>>> from vifamily import testing
>>> print(testing.check_objective("renyi(alpha=0.5)").passed[:3])
('declarations', 'refusals', 'declared_needs')
"""

from __future__ import annotations

from vifamily.testing import targets, tolerances
from vifamily.testing._report import ContractError, Report
from vifamily.testing.objectives import check_objective

__all__ = ["ContractError", "Report", "check_objective", "targets", "tolerances"]
