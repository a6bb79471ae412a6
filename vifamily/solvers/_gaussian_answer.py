"""What solvers share that write a Gaussian into a family without descending an objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vifamily.errors import IncompatibleError
from vifamily.registry import entry_name
from vifamily.solvers._base import Task
from vifamily.solvers._fixed_draws import FixedLoss, balanced_draws, independent_draws, part_size, stream
from vifamily.types import Capability, Space

__all__ = ["fresh_losses", "members_of", "refuse", "start_of", "write_back", "write_gaussian"]

_FRESH_DRAWS = 256
_FRESH = 2000
"""Number of the level whose draws are kept for judging the answer."""


def refuse(
    solver: str, model: Any, family: Any, batch_size: int | None, objective: Any, *, holds: frozenset[Capability]
) -> None:
    """Refuse what an answer without a descent cannot serve.

    Args:
        solver: Name of the solver, for messages.
        model: The model.
        family: The family.
        batch_size: Data per step, or None for all.
        objective: The objective, or None where it is not known.
        holds: Capabilities of which the family needs one.

    Raises:
        IncompatibleError: Naming why, and what would work.
    """
    has, of_family = frozenset(getattr(model, "capabilities", ())), frozenset(family.capabilities)
    latent = getattr(family, "latent", None)
    name = getattr(family, "spec", None) or type(family).__name__
    given = None if objective is None else entry_name(objective)
    reasons = [
        (given not in (None, "elbo"), f"answers for the objective 'elbo' alone, not for {given!r}",
         "objective='elbo', or solver='adam'", "the objective elbo"),
        (batch_size is not None, "needs the log joint of all data at every point",
         "no batch_size, or solver='adam'", "all data in one step"),
        (Capability.LOCAL in has, "does not take models with local latents", "solver='adam'", "no local latents"),
        (Capability.SCORE not in has, "needs a differentiable log joint, and this model has none",
         "solver='adam'", str(Capability.SCORE)),
        (any(p.requires_grad for p in getattr(model, "parameters", list)()),
         "leaves the parameters of a model as they are, and this model has some to be fitted", "solver='adam'",
         "a model without parameters of its own"),
        (latent is None or latent.space is not Space.REAL or latent.dim == 0,
         "needs latents on real space", "solver='adam'", str(Space.REAL)),
        (not of_family & holds, f"cannot write its answer into the family {name!r}",
         "full_rank, mean_field or low_rank, or init= with this solver's name and solver='adam'",
         " or ".join(sorted(holds))),
    ]  # fmt: skip
    for holds_here, why, instead, lacking in reasons:
        if holds_here:
            raise IncompatibleError(f"the solver {solver!r} {why}: use {instead}.", missing=(lacking,))


def members_of(task: Task) -> list[Any]:
    """Return the families of the restarts one by one; copies where they are stacked."""
    stacked = getattr(task.family, "members", None)
    return [task.family] if stacked is None else list(stacked())


@torch.no_grad()
def write_back(task: Task, members: list[Any]) -> None:
    """Write what :func:`members_of` gave back into the family of the task."""
    if getattr(task.family, "members", None) is None:
        return
    for r, member in enumerate(members):
        for stacked, own in zip(task.family.parameters(), member.parameters(), strict=True):
            stacked[r].copy_(own)


def start_of(member: Any) -> Tensor:
    """Return the point at which a family was placed before the first step, ``(dim,)``."""
    point: Tensor = member.shift
    return point.detach().clone()


@torch.no_grad()
def write_gaussian(member: Any, mean: Tensor, factor: Tensor | None, conditional_sd: Tensor) -> None:
    r"""Set a family to the member that is nearest to a Gaussian in :math:`\mathrm{KL}(q \| N)`, of two.

    One has the Gaussian's covariance as far as the family can hold it, the other the sds of each coordinate given all
    others, which is the optimum among independent coordinates.

    Args:
        member: The family.
        mean: ``(dim,)``.
        factor: Lower-triangular factor of the covariance, or None where there are too many coordinates for one.
        conditional_sd: ``(dim,)``.
    """
    member.requires_grad_(requires_grad=True)
    centre = member.to_standard(mean.to(member.shift))
    narrow = _in_standard(member, conditional_sd.to(member.shift))
    if factor is None:
        member.start_at(centre, narrow)
        return
    wide = _in_standard(member, factor.to(member.shift))
    divergences = []
    for scale in (wide, narrow):
        member.start_at(centre, scale)
        whitened = torch.linalg.solve_triangular(factor, member.moments()[1].to(factor), upper=False)
        trace = torch.linalg.solve_triangular(factor, whitened.mT, upper=False).diagonal().sum()
        divergences.append(float(0.5 * trace - member.entropy().to(factor)))
    if divergences[0] <= divergences[1]:
        member.start_at(centre, wide)


def _in_standard(member: Any, scale: Tensor) -> Tensor:
    """Write sds, or a factor of a covariance, in the standardised coordinates of a family."""
    if member.scale.dim() == 1:
        divided: Tensor = scale / (member.scale if scale.dim() == 1 else member.scale[:, None])
        return divided
    matrix = torch.diag(scale) if scale.dim() == 1 else scale
    solved: Tensor = torch.linalg.solve_triangular(member.scale, matrix, upper=False)
    return solved


def fresh_losses(task: Task) -> list[float]:
    """Loss of every restart as its family stands, on draws that nothing was fitted to."""
    like = task.monitor_noise
    fixed = FixedLoss(
        lambda noise: task.objective_loss(task.family, task.model, noise, None, task.objective_state),
        [],
        task.restarts,
    )
    count, spec = max(_FRESH_DRAWS, 8 * task.draws), task.family.noise_spec
    maker = balanced_draws if task.linear_in_draws else independent_draws
    draws = maker(spec, count + count % 2, stream(task.seed, _FRESH, 0))
    part = part_size(len(draws), task.restarts, getattr(task.model, "num_data", None))
    fixed.fix([draws] * task.restarts, part, {"dtype": like.dtype, "device": like.device})
    losses: list[float] = fixed.values().mean(0).tolist()
    return losses
