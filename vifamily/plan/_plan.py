"""What a fit would do, or why it cannot: names resolved, needs checked, the estimator chosen."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch

from vifamily import registry
from vifamily.errors import ConfigError, DeviceError, IncompatibleError, ModelError, VifamilyError
from vifamily.families import Family, FamilyEntry
from vifamily.models import Model
from vifamily.objectives import Objective
from vifamily.plan._choices import describe, family_choice, named_solver, solver_choice
from vifamily.plan._warnings import chosen_estimator, warnings_of
from vifamily.solvers import Solver, worth_compiling
from vifamily.types import Capability, LatentSpec

__all__ = [
    "Plan",
    "alternatives",
    "check_batches",
    "check_pair",
    "default_capabilities",
    "describe",
    "latent_of",
    "make_plan",
    "plan",
    "resolve_model",
]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A fit that has passed every check but has not begun.

    Attributes:
        model: The model.
        problem: The named problem it comes from, or None.
        entry: The family's entry.
        objective: The objective, its estimator chosen.
        solver: The solver.
        latent: What the family covers.
        draws: Draws per step.
        batch_size: Data per step, or None for all.
        notes: What was chosen on the user's behalf, in words.
        compile: Whether steps are compiled: ``"auto"``, True or False.
        warnings: What should be known before the fit, in words: blindness, bias, noise (see :mod:`vifamily.plan`).
    """

    model: Model
    problem: Any
    entry: FamilyEntry
    objective: Objective
    solver: Solver
    latent: LatentSpec
    draws: int
    batch_size: int | None
    notes: tuple[str, ...] = ()
    compile: Literal["auto"] | bool = "auto"
    warnings: tuple[str, ...] = ()

    @property
    def estimator(self) -> str | None:
        """Gradient estimator that will be used, or None where there is no choice or no gradient."""
        chosen = getattr(self.objective, "estimator", None)
        return None if chosen == "auto" else chosen

    @property
    def uses(self) -> Mapping[str, tuple[str, ...]]:
        """Capabilities that the loss will use, of the ``"model"`` and of the ``"family"``."""
        chosen = chosen_estimator(self.objective)
        of_model = self.objective.needs_model | (frozenset() if chosen is None else chosen.model)
        of_family = self.objective.needs_family | (frozenset() if chosen is None else chosen.family)
        return {"model": tuple(sorted(of_model)), "family": tuple(sorted(of_family))}

    def _compiled(self) -> str:
        """Whether steps will be compiled, and why, for one restart without ``steps=``."""
        if self.compile is False or not self.solver.compiles:
            return "no: as asked" if self.solver.compiles else "no: this solver has no compiled steps"
        if self.compile is True:
            return "yes, as asked, where the model can be traced"
        numbers = self.draws * max(self.latent.dim, self.batch_size or self.model.num_data or 1)
        built = self.entry.build(self.latent, generator=torch.Generator(device="cpu"))
        size = sum(p.numel() for p in built.parameters())
        pays, why = worth_compiling(numbers=numbers, parameters=size, steps=None, device=self.latent.device)
        return f"yes: {why}; where the model can be traced" if pays else f"no: {why}"

    def __str__(self) -> str:
        """Return the plan in a few lines."""
        data = "all data" if self.batch_size is None else f"{self.batch_size} of {self.model.num_data} data"
        lines = [
            f"model      {registry.entry_name(self.model)}, {self.latent.dim} unconstrained coordinates, "
            f"{str(self.latent.dtype).removeprefix('torch.')} on {self.latent.device}",
            f"family     {describe(self.entry)}",
            f"objective  {describe(self.objective)}",
            f"uses       of the model: {', '.join(self.uses['model']) or 'nothing'}",
            f"           of the family: {', '.join(self.uses['family']) or 'nothing'}",
            f"solver     {describe(self.solver)}",
            f"each step  {self.draws} draws, {data}",
            f"compiled   {self._compiled()}",
        ]
        lines += [f"note       {note}" for note in self.notes]
        return "\n".join([*lines, *(f"warning    {warning}" for warning in self.warnings)])


def resolve_model(model: Any, device: Any = None, dtype: torch.dtype | None = None) -> tuple[Model, Any]:
    """Turn a name, a problem or a model into (model, problem or None), on the device and in the dtype asked for."""
    problem = None
    if isinstance(model, (str, registry.Spec)):
        problem = registry.build("problems", model)
    elif not isinstance(model, Model) and isinstance(getattr(model, "model", None), Model):
        problem = model
    found = model if problem is None else problem.model
    if not isinstance(found, Model):
        hint = (
            "wrap a log density as vf.models.Density(log_prob, dim=...), "
            "a Pyro program as vf.models.PyroModel(program, ...)"
        )
        raise ModelError(f"a model is needed, got {type(model).__name__}: {hint}, or give a problem's name.")
    where = found.device if device is None else _checked_device(device)
    kind = found.dtype if dtype is None else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype must be a floating torch dtype such as torch.float64, got {dtype!r}.")
    if where != found.device or kind != found.dtype:
        found = found.moved(device=where, dtype=kind)
    if found.device.type == "meta":
        raise DeviceError("the model is on the meta device, which holds no numbers: move it with device='cpu'.")
    return found if problem is None else _with_draws_of(problem, found), problem


def _with_draws_of(problem: Any, model: Model) -> Model:
    """Give the model of a problem its reference draws, where their columns are the parameters themselves."""
    reference, layout = getattr(problem, "reference", None), model.layout
    draws = getattr(reference, "draws", None)
    own = Capability.REFERENCE_DRAWS in model.capabilities or getattr(problem, "quantities", None) is not None
    if own or reference is None or draws is None or tuple(reference.names) != tuple(layout.columns()):
        return model
    try:
        return model.with_reference_draws(layout.unflatten(torch.as_tensor(draws, dtype=torch.float64)))
    except VifamilyError:
        return model  # stored to fewer digits, a draw may lie on the edge of its support


def _checked_device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise DeviceError(f"the device {device!r} cannot be used here: {said} Use for example device='cpu'.") from error
    return found


def latent_of(model: Model) -> LatentSpec:
    """Return what a family for this model must cover."""
    return LatentSpec(model.dim, model.space, model.num_categories, None, model.dtype, model.device)


def default_capabilities(name: str, latent: LatentSpec) -> frozenset[Capability] | None:
    """Capabilities of a registered family with its default options on a latent space; None when it cannot cover it."""
    return _capabilities_by_default(registry.lookup("families", name), latent)


@functools.lru_cache(maxsize=256)  # by the entry itself, so that a name that is registered anew is asked anew
def _capabilities_by_default(make: Any, latent: LatentSpec) -> frozenset[Capability] | None:
    try:
        entry = make()
        if entry.space is not latent.space:
            return None
        return frozenset(entry.build(latent, generator=torch.Generator(device="cpu")).capabilities)
    except (ValueError, RuntimeError, TypeError):
        return None


def _lacking(
    objective: Objective, model: frozenset[Capability], family: frozenset[Capability], latent: LatentSpec
) -> tuple[str, ...]:
    """What stands in the way of an objective, a model and a family, in words."""
    lacking = objective.missing(model, family, latent.space)
    if {Capability.LOCAL} & model and {Capability.WEIGHTED} & family:
        # local latents are drawn one beside each row of noise, of which such a family makes several draws
        lacking += (f"family: no {Capability.WEIGHTED} (the model has {Capability.LOCAL})",)
    return lacking


def alternatives(objective: Objective, model: Model, family: frozenset[Capability]) -> dict[str, list[str]]:
    """Return registered families that this objective could use here, and objectives that this family could serve."""
    latent, of_model = latent_of(model), frozenset(model.capabilities)
    families = [
        name
        for name in registry.names("families")
        if (found := default_capabilities(name, latent)) is not None
        and not _lacking(objective, of_model, found, latent)
    ]
    objectives = [name for name, other in _objectives() if not _lacking(other, of_model, family, latent)]
    return {"families": families, "objectives": objectives}


def _objectives() -> list[tuple[str, Objective]]:
    """Registered objectives at their defaults; those that need arguments are left out."""
    built = ((name, _at_defaults(registry.lookup("objectives", name))) for name in registry.names("objectives"))
    return [(name, objective) for name, objective in built if objective is not None]


@functools.lru_cache(maxsize=256)
def _at_defaults(make: Any) -> Objective | None:
    try:
        objective: Objective = make()
    except (ValueError, RuntimeError, TypeError):
        return None
    return objective


def check_pair(objective: Objective, model: Model, family: Family, entry: FamilyEntry) -> Objective:
    """Return the objective with its estimator chosen, or raise naming what is missing and what would work.

    Raises:
        IncompatibleError: If the three cannot meet.
    """
    lacking = _lacking(objective, frozenset(model.capabilities), frozenset(family.capabilities), latent_of(model))
    if lacking:
        other = alternatives(objective, model, frozenset(family.capabilities))
        raise IncompatibleError(
            f"the objective {describe(objective)!r} cannot run on the family {describe(entry)!r} and this model.\n"
            f"  missing: {'; '.join(lacking)}\n"
            f"  families that work with this objective here: {', '.join(other['families']) or 'none'}\n"
            f"  objectives that work with this family here: {', '.join(other['objectives']) or 'none'}",
            missing=lacking,
            works_with=other,
        )
    return objective.resolve(model, family)


def _check_space(entry: FamilyEntry, latent: LatentSpec, objective: Objective, model: Model) -> None:
    """Refuse a family of another space, with what lives on this one."""
    try:
        entry.check_space(latent)
    except IncompatibleError as error:
        fitting = [n for n in registry.names("families") if default_capabilities(n, latent) is not None]
        works = alternatives(objective, model, frozenset())["families"]
        raise IncompatibleError(
            f"{error}\n  families on the {latent.space} space: {', '.join(fitting) or 'none'}\n"
            f"  of these, with the objective {describe(objective)!r}: {', '.join(works) or 'none'}",
            missing=error.missing,
            works_with={"families": works, "objectives": []},
        ) from None


def check_batches(objective: Objective, model: Model, batch_size: int | None) -> None:
    """Refuse minibatches where they would bias the answer, or where their scale is unknown.

    Raises:
        ConfigError: If the batch size is not between 1 and the size of the data.
        IncompatibleError: If the model gives no minibatches, or the objective is not a sum over data.
    """
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if Capability.SUBSAMPLE not in model.capabilities or model.num_data is None:
        raise IncompatibleError(
            "minibatches need a model in likelihood form that states num_data, so that the batch can be scaled to "
            f"the whole data set; this {registry.entry_name(model)} model does not. Use "
            "LikelihoodModel(log_prior, log_likelihood, data=...), in a Pyro program index the data by the plate "
            "(with pyro.plate('data', n) as index: ... obs=y[index]), or leave batch_size out.",
            missing=(str(Capability.SUBSAMPLE),),
        )
    if batch_size > model.num_data:
        raise ConfigError(f"batch_size={batch_size} is larger than the data set of {model.num_data}.")
    allowed = objective.subsampling in ("unbiased", "biased") or (
        objective.subsampling == "per_datum" and model.dim == 0
    )
    if not allowed:
        others = [n for n, other in _objectives() if other.subsampling in ("unbiased", "biased")]
        raise IncompatibleError(
            f"the objective {describe(objective)!r} is not a sum over data, so a minibatch would change what it "
            "converges to. Use all data (no batch_size), an objective such as elbo, or a model whose latents are all "
            f"local.\n  objectives that take minibatches: {', '.join(others)}",
            missing=("objective: unbiased minibatches",),
            works_with={"families": [], "objectives": others},
        )


def make_plan(
    model: Any,
    family: Any,
    objective: Any,
    solver: Any,
    *,
    draws: int | None,
    batch_size: int | None,
    device: Any,
    dtype: torch.dtype | None,
    compile: Any = "auto",
) -> Plan:
    """Resolve and check everything; the common part of ``plan`` and ``fit``."""
    notes: list[str] = []
    if compile not in ("auto", True, False) or isinstance(compile, (int, float)) and not isinstance(compile, bool):
        raise ConfigError(f"compile must be 'auto', True or False, got {compile!r}.")
    found, problem = resolve_model(model, device, dtype)
    if batch_size is None and found.own_batch_size is not None:
        batch_size = found.own_batch_size
        notes.append(f"batches of {batch_size}, as the DataLoader makes them")
    found = found.for_batches(batch_size)
    loss = registry.build("objectives", objective) if isinstance(objective, (str, registry.Spec)) else objective
    if not isinstance(loss, Objective):
        raise ConfigError(f"an objective is a name such as 'elbo' or an Objective, got {type(loss).__name__}.")
    if loss.freezes_model and any(p.requires_grad for p in found.parameters()):
        found = copy.deepcopy(found).requires_grad_(requires_grad=False)
        notes.append("the model's own parameters stay as they are: moving the target could fake a match of scores")
    simulated = Capability.SIMULATE in found.capabilities
    if simulated and not loss.pairs_alone:
        found = found.by_likelihood()
    named = None if isinstance(solver, str) and solver == "auto" else named_solver(solver)
    own = named_solver(loss.own_solver) if named is None and loss.own_solver is not None else named
    entry = family_choice(family, found, own, notes)
    if simulated and (loss.inclusive or Capability.SIMULATE in loss.needs_model):
        entry = entry.for_given_points()
    latent = latent_of(found)
    _check_space(entry, latent, loss, found)
    built = entry.build(latent, generator=torch.Generator(device="cpu"))
    way = solver_choice(named, loss, found, built, batch_size, notes)
    way.check_objective(loss)
    if way.fixed_draws:
        loss = loss.for_fixed_draws(registry.entry_name(way))
    if not way.noise_per_datum:
        loss = loss.for_shared_noise(registry.entry_name(way))
    if not way.writes(built):
        loss = check_pair(loss, found, built, entry)
    if not simulated:
        check_batches(loss, found, batch_size)
    notes += loss.notes
    way.check(model=found, family=built, batch_size=batch_size, objective=loss)
    if draws is None:
        draws = way.default_draws if way.default_draws and loss.linear_in_draws else loss.default_draws
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ConfigError(f"draws must be a positive integer, got {draws!r}.")
    least = max(loss.min_draws, 2 if getattr(loss, "estimator", None) == "score" else 1)
    if draws < least:
        raise ConfigError(f"the objective {describe(loss)!r} needs at least {least} draws per step, got draws={draws}.")
    # where a solver fills the family by its own formula, the objective is reported only
    said = () if way.writes(built) else warnings_of(loss, found, built, draws=draws, batch_size=batch_size)
    return Plan(found, problem, entry, loss, way, latent, draws, batch_size, tuple(notes), compile, said)


def plan(
    model: Any,
    family: Any = "auto",
    objective: Any = "elbo",
    solver: Any = "auto",
    *,
    draws: int | None = None,
    batch_size: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    compile: Literal["auto"] | bool = "auto",
) -> Plan:
    """Say what ``fit`` would do with the same arguments, or why it cannot.

    Args:
        model: A model, a problem, or a problem's name.
        family: A family's name, an entry, or a user's own family.
        objective: An objective's name or an objective.
        solver: A solver's name or a solver; ``"auto"`` takes the objective's own where it has one, ``lbfgs`` where the
            loss is smooth on fixed draws, and ``adam`` elsewhere, and says which and why.
        draws: Draws per step; None takes the objective's default.
        batch_size: Data per step; None means all.
        device: Device to move the model to; None leaves it.
        dtype: Floating dtype to move the model to; None leaves it.
        compile: Whether to compile the steps, as in ``fit``.

    Returns:
        The plan; ``print`` shows it.

    Raises:
        IncompatibleError: If model, family and objective cannot meet; names what is missing and what would work.
        UnknownNameError: If a name is not registered.
        ConfigError: If a number is out of range.

    Example:
        >>> import vifamily as vf
        >>> planned = vf.plan("banana", "full_rank", "elbo")
        >>> planned.solver, planned.estimator
        (Lbfgs(tolerance=0.02, most_draws=65536), 'entropy')
    """
    return make_plan(model, family, objective, solver, draws=draws, batch_size=batch_size, device=device, dtype=dtype,
                     compile=compile)  # fmt: skip
