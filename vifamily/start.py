"""Where a fit begins: at a Gaussian approximation, at the prior, at a given point, or at another posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError, ShapeError, VifamilyError
from vifamily.families import Family, FamilyEntry
from vifamily.models import Model
from vifamily.numerics.gaussian_start import (
    GaussianStart,
    LogDensity,
    best_starts,
    laplace,
    negative_curvature,
    value_and_gradient,
)
from vifamily.rng import generator, split
from vifamily.solvers._paths import NoGaussian, drive, find
from vifamily.types import Capability, Space

__all__ = ["gaussian_starts", "initialise"]

_LARGEST_DATA = 200_000
_SUBSET = 10_000
_PATHS = 4
_OTHERS = 15
"""Further starting points from which modes are looked for."""


def initialise(
    family: Family,
    entry: FamilyEntry,
    model: Model,
    init: Any,
    *,
    seed: int,
    restart: int,
    minibatches: bool,
    search: bool = True,
    gaussian: GaussianStart | None = None,
) -> str:
    """Set a family's coordinates, and so its first distribution; returns how, in words.

    Args:
        family: The family, changed in place.
        entry: Its entry.
        model: The model.
        init: ``"auto"``, ``"laplace"``, ``"pathfinder"``, ``"prior"``, a mapping of named constrained values, an
            unconstrained point ``(dim,)``, or a posterior.
        seed: Root seed.
        restart: Index of the restart; each has its own start point.
        minibatches: Whether the fit sees minibatches (then, where the data are many, a Gaussian is found on some
            10,000 of them, their likelihood scaled to all).
        search: Whether ``"auto"`` looks for a Gaussian; without, it stays at a start point.
        gaussian: What :func:`gaussian_starts` found for this restart, where it was called.

    Raises:
        ConfigError: If ``init`` is none of these.
        NotAvailableError: If the Laplace approximation was asked for and the mode is degenerate, Pathfinder was and
            finds no Gaussian, or the prior was and it cannot be drawn from.
    """
    from_posterior = hasattr(init, "draws") and hasattr(init, "family")
    known = isinstance(init, str) and init in ("auto", "laplace", "pathfinder", "prior")
    if not (from_posterior or known or isinstance(init, (Mapping, Tensor, np.ndarray))):
        raise ConfigError(
            "init must be 'auto', 'laplace', 'pathfinder', 'prior', named values, an unconstrained point or a "
            f"posterior, got {init!r:.80}."
        )
    if entry.given and known and init == "auto":
        return "from the given family as it stands"
    if family.latent.space is not Space.REAL or family.latent.dim == 0:
        return "uniform"
    restrict = entry.restrict_scale
    if from_posterior:
        return _from_posterior(family, init, restrict=restrict)
    if not known:
        mean = _given_point(model, init)
        scale = _curvature_scale(model, mean)
        family.precondition(mean, scale)
        model.check_start(mean, scale)
        return "at the given point"
    if init == "prior":
        if not minibatches and Capability.LOCAL not in model.capabilities and Capability.SCORE in model.capabilities:
            # the other starts differentiate the log joint; a density that hides its gradient would go unnoticed here
            value_and_gradient(model.log_joint, torch.zeros(1, model.dim, dtype=model.dtype, device=model.device))
        return _from_prior(family, model, seed=seed, restart=restart)
    own = model.initial_gaussian(generator=generator(seed, "start", restart)) if init == "auto" else None
    if own is not None:
        return _from_own(family, model, own, seed=seed, restart=restart)
    if gaussian is not None:
        family.precondition(gaussian.mean, gaussian.scale, gaussian.covariance)
        return f"at a Gaussian approximation ({gaussian.method})"
    if Capability.LOCAL in model.capabilities:
        point = model.start(1, generator=generator(seed, "start", restart))[0]
        family.precondition(point, torch.ones_like(point))
        return "at a prior draw"
    point = model.start(1, generator=generator(seed, "start", restart))[0]
    many = minibatches and (model.num_data or 0) > _LARGEST_DATA
    if many and (init != "auto" or search):
        density, rows = _subset_density(model, generator(seed, "start/rows", restart))
        how = _gaussian(family, model, density, rows, point, init, seed=seed, restart=restart, restrict=restrict)
        return f"{how}, on {rows} of {model.num_data} data"
    if init == "auto" and not search:
        family.precondition(point, torch.ones_like(point))
        return "at a start point, from where the solver goes its own way"
    rows = model.num_data or 1
    return _gaussian(family, model, model.log_joint, rows, point, init, seed=seed, restart=restart, restrict=restrict)


def _subset_density(model: Model, source: torch.Generator) -> tuple[LogDensity, int]:
    """Log joint on some of the data, scaled to all of them, and their number; reads no other data."""
    size = model.own_batch_size or _SUBSET
    # a loader is read from the beginning of an epoch, in its own order
    stream = model.batches(size, seed=int(torch.randint(2**62, (), generator=source)))
    found = (stream.at(step) for step in range(-(-_SUBSET // size)))
    batches = [batch for batch in found if batch is not None]
    rows = sum(batch.size for batch in batches)

    def density(z: Tensor) -> Tensor:
        # each is an estimate for all data: weighted by size they average to that of all the rows read
        return torch.stack([batch.size / rows * model.log_joint(z, batch) for batch in batches]).sum(0)

    return density, rows


def _gaussian(
    family: Family, model: Model, density: LogDensity, rows: int, point: Tensor, init: str, *,
    seed: int, restart: int, restrict: bool,
) -> str:  # fmt: skip
    found: GaussianStart | None
    if init == "laplace":
        at_mode = laplace(density, point)
        if at_mode is None:
            raise NotAvailableError(
                "the Laplace approximation does not exist here: the mode found is degenerate. Use init='auto'."
            )
        mode, factor = at_mode
        scale = torch.cholesky_inverse(factor).diagonal().rsqrt() if restrict else factor
        found = GaussianStart(mode, scale, float("nan"), "laplace", factor @ factor.T)
    elif init == "pathfinder":
        found = _pathfinder(model, density, rows, point, seed=seed, restart=restart, restrict=restrict)
    else:
        found = _found(density, point[None], seed=seed, restrict=restrict, work=float(rows) * model.dim)[0][0]
    if found is None:
        family.precondition(point, torch.ones_like(point))
        return "at a prior draw (no Gaussian approximation was finite)"
    family.precondition(found.mean, found.scale, found.covariance)
    return f"at a Gaussian approximation ({found.method})"


def _found(
    density: LogDensity, points: Tensor, *, seed: int, restrict: bool, work: float, others: Tensor | None = None
) -> tuple[list[GaussianStart | None], list[int]]:
    source = generator(seed, "start/noise")
    return best_starts(density, points, generator=source, full=not restrict, work=work, others=others)


def gaussian_starts(
    entry: FamilyEntry, model: Model, init: Any, *, seed: int, restarts: int, minibatches: bool
) -> tuple[list[GaussianStart], list[int]] | None:
    """Find the starts of all restarts side by side, where they are Gaussian approximations.

    Args:
        entry: The family's entry.
        model: The model.
        init: As for :func:`initialise`.
        seed: Root seed.
        restarts: Their number.
        minibatches: Whether the fit sees minibatches.

    Returns:
        The distinct starts and for each restart which of them is its own; None where restarts start in another way,
        or where some have no finite approximation.
    """
    ordinary = isinstance(init, str) and init == "auto" and not entry.given and model.space is Space.REAL
    if not ordinary or model.dim == 0 or Capability.LOCAL in model.capabilities:
        return None
    if minibatches and (model.num_data or 0) > _LARGEST_DATA:
        return None
    if model.initial_gaussian(generator=generator(seed, "start", 0)) is not None:
        return None
    points = torch.cat([model.start(1, generator=generator(seed, "start", r)) for r in range(restarts)])
    # one start may lead to a mode that hardly matters
    others = model.start(_OTHERS, generator=generator(seed, "start/others"))
    work = float(model.num_data or 1) * model.dim
    found, which = _found(model.log_joint, points, seed=seed, restrict=entry.restrict_scale, work=work, others=others)
    fine = [start for start in found if start is not None]
    return (fine, which) if len(fine) == len(found) else None


def _pathfinder(
    model: Model, density: LogDensity, rows: int, point: Tensor, *, seed: int, restart: int, restrict: bool
) -> GaussianStart:
    others = model.start(4 * _PATHS, generator=generator(seed, "start/paths", restart)).to(point)
    dialogue = find(
        torch.cat([point.unsqueeze(0), others]).cpu().double(), _PATHS, history=6, elbo_draws=16, draws=0,
        seed=split(seed, "start/pathfinder", restart), resolution=float(torch.finfo(point.dtype).eps),
    )  # fmt: skip
    try:
        found = drive(dialogue, density, point, rows)
    except NoGaussian as error:
        raise NotAvailableError(f"Pathfinder has no start here: {error}. Use init='auto' or a point.") from error
    scale = found.conditional_sd if restrict or found.factor is None else found.factor
    return GaussianStart(found.mean.to(point), scale.to(point), float(found.elbo.max()), "pathfinder")


def _from_posterior(family: Family, posterior: Any, *, restrict: bool) -> str:
    other = posterior.family
    if other.latent.dim != family.latent.dim:
        raise ShapeError(
            f"init= is a posterior over {other.latent.dim} coordinates, the model has {family.latent.dim}."
        )
    same = other.spec == family.spec and {n: p.shape for n, p in other.named_parameters()} == {
        n: p.shape for n, p in family.named_parameters()
    }
    if same:
        family.precondition(other.shift, other.scale)
        family.load_state_dict({k: v.to(family.shift) for k, v in other.state_dict().items()})
        return "at the given posterior"
    z = posterior.draws(2000).to(family.shift)
    mean, centred = z.mean(0), z - z.mean(0)
    if restrict or family.latent.dim > 300:
        scale = centred.std(0).clamp_min(1e-8)
    else:
        covariance = centred.T @ centred / (z.shape[0] - 1)
        factor, info = torch.linalg.cholesky_ex(covariance)
        scale = centred.std(0).clamp_min(1e-8) if int(info) else factor
    family.precondition(mean, scale)
    return "at the moments of the given posterior"


def _given_point(model: Model, init: Mapping[str, Any] | Tensor | np.ndarray) -> Tensor:
    options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    try:
        if isinstance(init, Mapping):
            theta = {k: torch.as_tensor(v, **options).detach() for k, v in init.items()}
            model.layout.check(theta)
            point = model.unconstrain(theta)
        else:
            point = torch.as_tensor(init, **options).detach()
    except VifamilyError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"init cannot be read as numbers: {error}.") from error
    if point.shape != (model.dim,):
        what = "named values must be those of one draw" if isinstance(init, Mapping) else "init must be one point"
        raise ShapeError(f"{what}, {model.dim} unconstrained numbers in all; got the shape {tuple(point.shape)}.")
    if not bool(torch.isfinite(model.log_joint(point.unsqueeze(0))).all()):
        raise ConfigError("the log joint is not finite at the given init point; start inside the support.")
    return point


def _curvature_scale(model: Model, point: Tensor) -> Tensor:
    if model.dim > 300:
        return torch.ones_like(point)
    # the steps as a tensor where the point lives: a plain number would become one on the CPU
    diagonal = negative_curvature(model.log_joint, point, torch.full_like(point, 1e-4)).diagonal()
    positive = torch.isfinite(diagonal) & (diagonal > 0)
    return torch.where(positive, diagonal.clamp_min(1e-30).rsqrt(), torch.ones_like(point))


def _from_own(family: Family, model: Model, own: tuple[Tensor, Tensor], *, seed: int, restart: int) -> str:
    mean, sd = (part.detach().to(family.shift) for part in own)
    family.precondition(mean, sd)
    members: Any = family
    if Capability.FINITE in family.capabilities and hasattr(family, "set_particles"):
        # members that begin at one point stay together under many objectives: each has a start of its own
        found = [
            model.initial_gaussian(generator=generator(seed, "start/member", restart, k))
            for k in range(len(members.particles()))
        ]
        points = torch.stack([part[0] for part in found if part is not None]).to(family.shift)
        members.set_particles(family.to_standard(points))
    return "where the model begins"


def _from_prior(family: Family, model: Model, *, seed: int, restart: int) -> str:
    z = model.sample_prior(1000, generator=generator(seed, "start/prior", restart)).to(family.shift)
    # quartiles, since priors on scales have heavy tails once logged or not
    low, middle, high = z.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=z.dtype, device=z.device), dim=0)
    scale = ((high - low) / 1.349).clamp_min(1e-6)
    family.precondition(middle, scale)
    model.check_start(middle, scale)
    return "at the prior"
