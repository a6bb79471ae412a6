"""Fits one cell and measures the result against what is known."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vifamily import registry
from vifamily.compare.cells import Cell, Outcome
from vifamily.compare.metrics import metric_values
from vifamily.diagnostics.moments import distances, moment_errors
from vifamily.errors import ConfigError
from vifamily.fit import fit
from vifamily.grid_fit import SeedGrid, why_one_by_one
from vifamily.models import Model
from vifamily.plan import make_plan
from vifamily.posterior import Posterior
from vifamily.problems._base import Problem
from vifamily.rng import generator

__all__ = ["Target", "as_problem", "fingerprint", "fit_cell", "fit_cells", "target_of"]

MOMENT_DRAWS = 40_000
"""Draws behind means and standard deviations: their own error is then half a hundredth of a standard deviation."""
NUM_DRAWS = 2000
"""Draws behind distances between samples, whose cost is quadratic."""
KEPT_DRAWS = 500
KEPT_TRACE = 400
Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Target:
    """What is known about a problem, as plain values.

    Attributes:
        label: Label of the problem.
        description: One or two sentences.
        names: Names of the quantities.
        kind: Where the reference comes from, or ``"none"``.
        draws: Reference draws ``(draw, quantity)``, or None.
        log_evidence: Log evidence, or None.
        log_density: Log density of points ``(n, 2)``, where the quantities are the two unconstrained coordinates.
    """

    label: str
    description: str
    names: tuple[str, ...]
    kind: str = "none"
    draws: Array | None = None
    log_evidence: float | None = None
    log_density: Callable[[Array], Array] | None = None


def as_problem(value: Any) -> Problem:
    """Return a problem from a spec, a problem, or a model without reference.

    Raises:
        ConfigError: If it is none of these.
    """
    if isinstance(value, (str, registry.Spec)):
        value = registry.build("problems", value)
    if isinstance(value, Problem):
        return value
    if isinstance(value, Model):
        name = getattr(value, "name", None) or type(value).__name__
        return Problem(str(name), value, None, "A model without reference.")
    raise ConfigError(
        f"a comparison takes problems, their names, or models, got {type(value).__name__}. "
        "Wrap a function as vf.models.Density(log_prob, dim=...)."
    )


def fingerprint(problem: Problem) -> str:
    """Return a hash of a problem's log joint at a few fixed points, its columns and its reference."""
    model, digest = problem.model, hashlib.sha256()
    points = model.start(4, generator=generator(0, "compare/fingerprint"))
    with torch.no_grad():
        values = model.log_joint(points).to("cpu", torch.float64)
    # six digits: the last ones depend on the machine
    digest.update(" ".join(f"{v:.6g}" for v in values.tolist()).encode())
    digest.update(repr(model.layout.columns()).encode())
    if problem.reference is not None:
        for part in (problem.reference.mean, problem.reference.sd, problem.reference.draws):
            digest.update(b"none" if part is None else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def target_of(label: str, problem: Problem) -> Target:
    """Return what is known about a problem."""
    reference, model = problem.reference, problem.model
    names = tuple(model.layout.columns()) if reference is None else tuple(reference.names)
    if reference is None and problem.quantities is not None:
        return Target(label, problem.description, ())
    target = Target(label, problem.description, names)
    if reference is not None:
        target = dataclasses.replace(
            target, kind=reference.kind, draws=reference.draws, log_evidence=reference.log_evidence
        )
    if len(names) == 2 and model.dim == 2 and _is_identity(problem):
        target = dataclasses.replace(target, log_density=_log_density(model))
    return target


def _is_identity(problem: Problem) -> bool:
    z = problem.model.start(8, generator=generator(0, "compare/identity"))
    with torch.no_grad():
        columns = problem.columns(problem.model.constrain(z))
    return columns.shape == z.shape and bool(torch.equal(columns, z))


def _log_density(model: Model) -> Callable[[Array], Array]:
    def evaluate(points: Array) -> Array:
        z = torch.as_tensor(points, dtype=model.dtype, device=model.device)
        with torch.no_grad():
            return np.asarray(model.log_joint(z).cpu(), dtype=np.float64)

    return evaluate


def fit_cells(cells: Sequence[Cell]) -> list[Callable[[Cell], Outcome]]:
    """Fit cells that differ in their seed alone side by side.

    Args:
        cells: The cells.

    Returns:
        For each cell the function that finishes its fit and measures it; :func:`fit_cell` for all of them where the
        fits cannot run side by side.

    Raises:
        VifamilyError: What ended all of them, for example a start that cannot be made. Run alone, each cell meets its
            own reason.
    """
    one_by_one: list[Callable[[Cell], Outcome]] = [fit_cell] * len(cells)
    first, settings = cells[0], dict(cells[0].settings)
    # a limit of time is one fit's own, and side by side none has the time to itself
    if len(cells) < 2 or settings.pop("time_limit", None) is not None:
        return one_by_one
    problem = as_problem(first.given.get("problem", first.problem))
    steps = settings.pop("steps", None)
    planned = make_plan(
        problem.model,
        first.given.get("family", first.family),
        first.given.get("objective", first.objective),
        settings.pop("solver"),
        draws=settings.pop("draws"),
        batch_size=None,
        device=None,
        dtype=None,
    )
    if settings or why_one_by_one(planned) is not None:
        return one_by_one
    grid = SeedGrid(planned, [cell.seed for cell in cells], steps=steps)
    grid.advance()
    return [functools.partial(_measured, fitted=functools.partial(grid.finish, i)) for i in range(len(cells))]


def fit_cell(cell: Cell) -> Outcome:
    """Fit one cell and measure it.

    Args:
        cell: What to fit.

    Returns:
        The figures of merit of :data:`vifamily.compare.MEASURES` and the words of the fit.

    Raises:
        KeyboardInterrupt: If the fit was interrupted; half a fit is not a result.
        VifamilyError: Whatever the fit raises.
    """

    def fitted() -> Posterior:
        return fit(
            as_problem(cell.given.get("problem", cell.problem)).model,
            cell.given.get("family", cell.family),
            cell.given.get("objective", cell.objective),
            seed=cell.seed,
            progress=False,
            **cell.settings,
        )

    return _measured(cell, fitted)


def _measured(cell: Cell, fitted: Callable[[], Posterior]) -> Outcome:
    """Measure what a fit of the cell returns."""
    problem = as_problem(cell.given.get("problem", cell.problem))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = fitted()
        record = posterior.record
        if record.stop_reason == "interrupted":
            raise KeyboardInterrupt
        diagnosis = posterior.diagnose()
        with torch.no_grad():
            draws = _columns(problem, posterior.draws(MOMENT_DRAWS))
    values: dict[str, Any] = {
        "elbo": None if diagnosis.elbo is None else diagnosis.elbo.value,
        "elbo_error": None if diagnosis.elbo is None else diagnosis.elbo.error,
        "k_hat": diagnosis.k_hat,
        "k_hat_threshold": diagnosis.k_hat_threshold,
        "loss": None if diagnosis.loss is None else diagnosis.loss.value,
        "seconds": record.seconds,
        "steps": record.steps,
        "stop_reason": record.stop_reason,
        "converged": record.converged,
        "estimator": record.estimator,
        "draws_per_step": record.draws_per_step,
        "non_finite": record.non_finite,
        "advice": diagnosis.advice,
    }
    errors, remarks = _against_reference(problem, draws, cell, values)
    remarks = [
        *record.notes,
        *remarks,
        *(" ".join(str(w.message).split()) for w in caught if issubclass(w.category, UserWarning)),
    ]
    names = target_of(cell.problem, problem).names
    return Outcome.of(
        cell,
        values=_finite(values),
        errors=errors,
        names=names,
        draws=draws[:KEPT_DRAWS] if names else None,
        trace=_thin(record.trace),
        notes=tuple(dict.fromkeys(remarks)),
    )


def _columns(problem: Problem, z: torch.Tensor) -> Array:
    return np.asarray(problem.columns(problem.model.constrain(z)).cpu(), dtype=np.float64)


def _against_reference(
    problem: Problem, draws: Array, cell: Cell, values: dict[str, Any]
) -> tuple[dict[str, float | None], list[str]]:
    """Fill in the figures against the reference; returns the error of each mean, and remarks."""
    reference = problem.reference
    remarks: list[str] = []
    if reference is None:
        return {}, []
    finite = draws[np.isfinite(draws).all(axis=1)]
    values["non_finite_draws"] = int(draws.shape[0] - finite.shape[0])
    if finite.shape[0] < 2:
        return {}, []
    moments = moment_errors(finite, reference.mean, reference.sd, reference.names)
    errors = moments.mean_error.numpy()
    where, worst_sd = moments.worst_sd
    values |= {
        "mean_error": float(np.abs(errors).max()),
        "mean_error_rms": float(np.sqrt(np.mean(errors**2))),
        "mean_error_at": moments.worst_mean[0],
        "log_sd_ratio": worst_sd.value,
        "log_sd_ratio_at": where,
    }
    if reference.draws is not None:
        source = generator(cell.seed, "compare/projections")
        found = distances(finite[:NUM_DRAWS], reference.draws, reference.sd, generator=source)
        values |= {name: estimate.value for name, estimate in found.items()}
        chosen, remarks = metric_values(cell.metrics, finite[:NUM_DRAWS], reference.draws, cell.seed)
        values |= chosen
    by_name = {name: float(e) if math.isfinite(e) else None for name, e in zip(reference.names, errors, strict=True)}
    return by_name, remarks


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _thin(trace: Mapping[str, Any]) -> dict[str, list[float]]:
    arrays = {name: np.asarray(trace[name]) for name in ("step", "loss", "loss_error", "step_size") if name in trace}
    if not arrays or "loss" not in arrays:
        return {}
    size = arrays["loss"].size
    chosen = np.unique(np.linspace(0, size - 1, min(size, KEPT_TRACE)).astype(int)) if size else np.arange(0)
    return {name: [float(v) for v in array[chosen]] for name, array in arrays.items()}
