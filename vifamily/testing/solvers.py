"""The contracts of solvers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily import registry
from vifamily.errors import NonFiniteLossError
from vifamily.families import Family
from vifamily.families._stack import StackedFamily
from vifamily.models import Density
from vifamily.objectives import Elbo
from vifamily.rng import NoiseStream, draw_noise
from vifamily.solvers import Run, Solver, Task
from vifamily.testing import targets, tolerances
from vifamily.testing._games import is_game
from vifamily.testing._report import Broken, Contracts, Report
from vifamily.testing._tools import agree, seeded
from vifamily.types import Capability, LatentSpec

__all__ = ["check_solver"]

_MOST_STEPS = 20_000
_DRAWS = 8


def check_solver(solver: Solver | str, *, skip: Mapping[str, str] | None = None) -> Report:
    """Hold a solver to its contracts.

    The contracts: it steps, counts and reports; it ends by itself, at the exact posterior of a conjugate model; several
    restarts at once each end there; written down and taken up again it goes on bit for bit; a loss that is not finite
    stops it at the last finite state.

    Args:
        solver: A solver, or its name or spec.
        skip: Contracts that do not apply, each with the reason that the report will show.

    Returns:
        What was checked and what was skipped.

    Raises:
        ContractError: Naming the solver, the contract, what was expected and what was found.

    Example:
        >>> report = check_solver("adam", skip={"converges": "slow", "restarts": "slow"})
        >>> report.passed
        ('reports', 'resumes', 'non_finite')
    """
    built = registry.build("solvers", solver) if isinstance(solver, (str, registry.Spec)) else solver
    name = solver if isinstance(solver, str) else registry.entry_name(built)
    contracts = Contracts(f"the solver {name!r}", "solver", skip)
    for contract in (_reports, _converges, _restarts, _resumes, _non_finite):
        contracts.run(contract.__name__.removeprefix("_"), contract, built)
    return contracts.report()


def _family(seed: int = 0, spec: str = "full_rank") -> Family:
    family: Family = registry.build("families", spec).build(LatentSpec(2), generator=seeded(seed))
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded(seed + 1), dtype=parameter.dtype))
    return family


def _objective_for(solver: Solver) -> Any:
    """The first registered objective that only this solver can drive, or the ELBO."""
    own = registry.entry_name(solver)
    for name in registry.names("objectives"):
        if registry.lookup("objectives", name).own_solver == own:
            found = registry.build("objectives", name)
            # particles keep the moments of a Gaussian posterior with a linear kernel, and come near them with others
            return dataclasses.replace(found, kernel="linear") if hasattr(found, "flow") else found
    return Elbo("reparameterised")


def _task(solver: Solver, model: Any, restarts: int = 1) -> Any:
    objective = _objective_for(solver)
    spec = "ensemble(size=12)" if Capability.PARTICLES in objective.needs_family else "full_rank"
    members = [_family(10 * r, spec) for r in range(restarts)]
    if is_game(objective):
        # as in a fit: a critic moves at one pace whatever the units, so its coordinates are those of a rough answer
        mean, covariance = targets.linear_regression().moments()
        for member in members:
            member.precondition(mean + 0.3, 1.2 * torch.linalg.cholesky(covariance))
    family: Any = members[0] if restarts == 1 else StackedFamily(members)
    # a critic learns nothing from a handful of draws
    draws = objective.default_draws if is_game(objective) else _DRAWS
    stream = NoiseStream(0, family.noise_spec, draws=draws, restarts=restarts)
    fixed = draw_noise(family.noise_spec, (32,), seeded(1))
    if restarts > 1:
        fixed = fixed.expand(restarts, *fixed.shape)
    state = objective.init_state(model, family, generator=seeded(0))
    return Task(objective.loss, model, family, stream.at, lambda step: None, fixed, restarts, 0.05, state,
                draws=draws, objective=objective)  # fmt: skip


def _drive(run: Run, steps: int) -> str | None:
    for _ in range(steps):
        finished = run.step().finished
        if finished is not None:
            return finished
    return None


def _reports(solver: Solver) -> None:
    """Steps are counted and losses reported, one per restart."""
    for restarts in (1, 3):
        run = solver.start(_task(solver, targets.linear_regression().model, restarts))
        count = 0
        rows = 0
        while rows < 3:
            rows += 1
            report = run.step()
            # a step of one evaluation counts one; a solver that ends in a single step counts its evaluations
            right = report.step == run.step_count and (report.step == count + 1 or report.finished is not None)
            if not right or report.step <= count or len(report.loss) != restarts:
                raise Broken(
                    got=f"step {report.step}, count {run.step_count}, {len(report.loss)} losses",
                    expected=f"step and count {count + 1}, {restarts} losses",
                )
            count = report.step
            if not all(math.isfinite(v) for v in report.loss) or not all(map(math.isfinite, report.terms.values())):
                raise Broken(got=f"losses {report.loss}, terms {dict(report.terms)}", expected="finite numbers")
            if report.finished is not None:
                break
        if tuple(run.losses.shape) != (rows, restarts) or run.step_sizes.shape[0] != rows:
            raise Broken(got=f"a record of shape {tuple(run.losses.shape)}", expected=f"({rows}, {restarts})")
        if len(run.output()["losses"]) != restarts:
            raise Broken(got=f"{len(run.output()['losses'])} final losses", expected=f"{restarts}, one per restart")


def _near(family: Any, target: targets.Target) -> None:
    mean, covariance = (part.detach() for part in family.moments())
    exact_mean, exact_covariance = target.moments()
    exact_sd = exact_covariance.diagonal().sqrt()
    off = float(((mean - exact_mean) / exact_sd).abs().max())
    spread = float((covariance.diagonal().sqrt() / exact_sd).log().abs().max())
    # what a default fit promises is that no mean is off by more than its tolerance, here with room for chance
    if not (off < 2.5 * tolerances.MOMENTS and spread < 2.5 * tolerances.MOMENTS):
        raise Broken(
            got=f"a mean {off:.3g} sd off and a log sd {spread:.3g} off", expected="the exact posterior to 0.05"
        )


def _converges(solver: Solver) -> None:
    """It ends by itself at the exact posterior of a conjugate model."""
    target = targets.linear_regression()
    task = _task(solver, target.model)
    run = solver.start(task)
    if _drive(run, _MOST_STEPS) is None:
        raise Broken(got=f"no end after {_MOST_STEPS} steps", expected="an end by its own rule")
    run.output()
    _near(task.family, target)


def _restarts(solver: Solver) -> None:
    """Several restarts at once each end at the exact posterior."""
    target = targets.linear_regression()
    task = _task(solver, target.model, 2)
    run = solver.start(task)
    _drive(run, _MOST_STEPS)
    run.output()
    for member in task.family.members():
        _near(member, target)


def _resumes(solver: Solver) -> None:
    """Written down after some steps and taken up by a new run, it goes on bit for bit."""
    model = targets.linear_regression().model
    whole = solver.start(_task(solver, model))
    _drive(whole, 23)
    half = solver.start(_task(solver, model))
    # a run that ends sooner is written down half-way all the same, or as finished where it is a single step
    _drive(half, min(11, (whole.losses.shape[0] + 1) // 2))
    tensors, values = half.tensors()

    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    values = json.loads(json.dumps(values, allow_nan=False))
    rest = solver.start(_task(solver, model))
    rest.restore(tensors, values)
    if rest.finished is None:
        _drive(rest, 23 - half.losses.shape[0])
    if rest.step_count != whole.step_count or not torch.equal(rest.losses, whole.losses):
        raise Broken(got="another run after resuming", expected="the losses of the uninterrupted run, bit for bit")
    a, b = (run.tensors()[0] for run in (whole, rest))
    differ = sorted(name for name in a if name not in b or not torch.equal(a[name], b[name]))
    if differ:
        raise Broken(
            got=f"other numbers in {', '.join(differ)}", expected="the state of the uninterrupted run, bit for bit"
        )


def _non_finite(solver: Solver) -> None:
    """A loss that is not finite stops it at the last finite state, and says where."""
    calls, last = [0], [10**9]

    def log_prob(z: Tensor) -> Tensor:
        calls[0] += 1
        return -0.5 * z.square().sum(-1) * (math.nan if calls[0] > last[0] else 1.0)

    _drive(solver.start(_task(solver, Density(log_prob, dim=2))), 50)
    # early enough for solvers that need few evaluations
    last[0], calls[0] = min(6, calls[0] // 2), 0
    task = _task(solver, Density(log_prob, dim=2))
    run = solver.start(task)
    try:
        _drive(run, 50)
    except NonFiniteLossError as error:
        if error.step != run.step_count:
            raise Broken(
                got=f"step {error.step} named, {run.step_count} taken", expected="the step that failed"
            ) from None
        for name, parameter in task.family.named_parameters():
            agree(torch.isfinite(parameter).double(), torch.ones_like(parameter), 0.0, f"a finite parameter {name!r}")
        return
    raise Broken(got="no error from a loss of NaN", expected="NonFiniteLossError at the step where it happens")
