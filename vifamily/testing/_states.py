"""The contracts of objectives that live on enumerated states only."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.models import Density
from vifamily.objectives import Objective
from vifamily.testing import targets, tolerances
from vifamily.testing._report import Broken, Contracts
from vifamily.testing._settings import Setting, build_at
from vifamily.testing._tools import agree, descend, flat_gradient
from vifamily.types import Space

__all__ = ["check_states", "on_states"]


def on_states(objective: Objective) -> bool:
    """Whether an objective runs on the discrete space alone, where the continuous targets say nothing."""
    return objective.spaces == frozenset({Space.DISCRETE})


def check_states(contracts: Contracts, objective: Objective) -> None:
    """Run the contracts that take the place of those on continuous targets.

    Args:
        contracts: Where to record them.
        objective: An objective on the discrete space.
    """
    for contract in (_zero_at_states, _descent_on_states, _gradient_on_states, _extreme_states):
        contracts.run(contract.__name__.removeprefix("_"), contract, objective)


def _states(logs: Tensor, objective: Objective) -> Setting:
    """One coordinate with given log probabilities, up to a constant."""
    model = Density(
        lambda theta: logs[theta["k"].long()], parameters={"k": ((), f"integer_interval(0, {len(logs) - 1})")}
    )
    target = targets.Target(model, float(logs.logsumexp(0)))
    family = build_at(target, "categorical")
    return Setting(objective.resolve(model, family), target, family, None)


_LOGS = torch.tensor([0.3, -1.2, 0.9, 0.1, -0.4], dtype=torch.float64)


def _at(s: Setting, logs: Tensor) -> None:
    with torch.no_grad():
        s.family.logits.copy_(logs)  # type: ignore[operator]


def _zero_at_states(objective: Objective) -> None:
    """At q = p a divergence is zero, a bound the evidence, and the gradient is zero."""
    s = _states(_LOGS, objective)
    _at(s, _LOGS)
    loss = s.loss(s.family, s.noise(4))
    evidence = s.target.log_evidence
    known = {"divergence": 0.0, "lower_bound": -evidence, "upper_bound": evidence}
    if objective.value_kind in known:
        agree(loss.value, torch.tensor(known[objective.value_kind]).double(), tolerances.EXACT, "its value at q = p")
    gradient = flat_gradient(loss, s.family)
    agree(gradient, torch.zeros_like(gradient), tolerances.EXACT, "no gradient at q = p")


def _descent_on_states(objective: Objective) -> None:
    """A descent from elsewhere ends at the exact probabilities of a family that contains them."""
    s = _states(_LOGS, objective)
    descend(s.objective, s.family, s.target.model, s.noise(4), steps=500, rate=0.1)
    found = s.family.log_density(torch.arange(5.0).double().unsqueeze(-1), None).detach().exp()
    agree(found, _LOGS.softmax(0), tolerances.MOMENTS / 2, "the exact probabilities")


def _gradient_on_states(objective: Objective) -> None:
    """Away from the optimum, as the family is built, every parameter has a gradient."""
    s = _states(_LOGS, objective)
    gradient = flat_gradient(s.loss(s.family, s.noise(4)), s.family)
    if not bool((gradient != 0).all()):
        raise Broken(got=f"the gradient {gradient.tolist()}", expected="a gradient for every parameter")


def _extreme_states(objective: Objective) -> None:
    """Log ratios of plus and minus 300 give finite losses and gradients."""
    s = _states(300 * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), objective)
    loss = s.loss(s.family, s.noise(4))
    gradient = flat_gradient(loss, s.family)
    if not (bool(torch.isfinite(loss.value).all()) and bool(torch.isfinite(gradient).all())):
        raise Broken(got=f"value {loss.value.tolist()}, gradient {gradient.tolist()}", expected="finite numbers")
