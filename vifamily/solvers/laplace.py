"""The Laplace approximation: the Gaussian at the mode with the curvature there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vifamily.errors import IncompatibleError, NonFiniteLossError, NotAvailableError
from vifamily.numerics.gaussian_start import laplace, value_and_gradient
from vifamily.registry import register
from vifamily.solvers._base import Run, Solver, StepReport, Task
from vifamily.solvers._gaussian_answer import fresh_losses, members_of, refuse, start_of, write_back, write_gaussian
from vifamily.types import Capability

__all__ = ["Laplace"]

_LARGEST_HESSIAN = 2000


@register("solvers", "laplace")
@dataclasses.dataclass(frozen=True)
class Laplace(Solver):
    r"""The Laplace approximation: the mode, and the Gaussian whose precision is the curvature there.

    .. math:: \hat z = \arg\max_z \log p(z, y), \qquad q(z) = N(z; \hat z, H^{-1}), \qquad
        H = -\nabla^2 \log p(\hat z, y)

    on unconstrained space, where the mode includes the Jacobian of the supports. The mode is found by L-BFGS from the
    start point and finished by Newton steps, until half the squared Newton decrement, the log density still to be
    gained, is below 5e-11. Exact for Gaussian posteriors; in general its error falls with the number of data, and it
    knows nothing of skewness or of other modes. Where the curvature is not positive definite (a flat direction, a
    posterior without a mode) it raises rather than answer; a funnel can have a proper mode where it has no mass, which
    k-hat shows.

    ``full_rank`` takes the Gaussian as it is. A family that cannot hold it gets the nearer, in
    :math:`\mathrm{KL}(q \| N)`, of two: the best fit to the covariance, and the sds of each coordinate given all
    others, :math:`(H_{ii})^{-1/2}`, which is the optimum for independent coordinates and so what ``mean_field`` gets.

    ``record.steps`` counts evaluations of the log joint, each on a batch of points. The loss is minus the ELBO on draws
    that nothing was fitted to.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", family="full_rank", solver="laplace", seed=0)
        >>> posterior.record.stop_reason, posterior.diagnose().k_hat < 0.1
        ('converged', True)
    """

    own_start: ClassVar[bool] = True

    def check(self, *, model: Any, family: Any, batch_size: int | None = None, objective: Any = None) -> None:
        """Refuse what has no Laplace approximation (see :class:`~vifamily.solvers._base.Solver`)."""
        refuse("laplace", model, family, batch_size, objective, holds=frozenset({Capability.GAUSSIAN}))
        if family.latent.dim > _LARGEST_HESSIAN:
            raise IncompatibleError(
                f"the solver 'laplace' forms the Hessian of at most {_LARGEST_HESSIAN} coordinates, and this model has "
                f"{family.latent.dim}: use solver='pathfinder', or solver='adam'.",
                missing=("a Hessian that can be formed",),
            )

    def start(self, task: Task) -> LaplaceRun:
        """Begin a run."""
        self.check(model=task.model, family=task.family)
        return LaplaceRun(task)


class _Counted:
    """A log density that counts its evaluations and keeps the best point where it was finite."""

    def __init__(self, model: Any) -> None:
        self.model, self.count, self.best = model, 0, -math.inf
        self.at: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        self.count += 1
        value: Tensor = self.model.log_joint(z)
        seen = value.detach().nan_to_num(-math.inf, math.inf, -math.inf)
        top = int(seen.argmax())
        if self.best < float(seen[top]) < math.inf:
            self.best, self.at = float(seen[top]), z[top].detach().clone()
        return value

    @property
    def broken(self) -> bool:
        """Whether the log density is not finite even where it was before."""
        return self.at is None or not bool(torch.isfinite(self(self.at.unsqueeze(0))).all())


class LaplaceRun(Run):
    """One run of :class:`Laplace`: a single step, for all restarts."""

    def __init__(self, task: Task) -> None:
        self.task, self.step_count, self.finished = task, 0, None
        self.notes: list[str] = []
        self._losses: list[list[float]] = []

    def step(self) -> StepReport:
        """Find the modes (see :class:`~vifamily.solvers._base.Run`).

        Raises:
            NotAvailableError: If no restart has a mode with positive definite curvature.
            NonFiniteLossError: If the log joint is not finite at any start point, or stops being so.
        """
        if self.finished is None:
            members, density = members_of(self.task), _Counted(self.task.model)
            found = [self._one(density, member) for member in members]
            if not any(found):
                self._fail(density)
            write_back(self.task, members)
            losses = fresh_losses(self.task)
            self._losses.append([loss if ok else math.inf for loss, ok in zip(losses, found, strict=True)])
            self.step_count += density.count
            self.notes.append(f"mode and curvature found in {density.count} evaluations of the log joint")
            if not all(found):
                self.notes.append(f"{found.count(False)} of {len(found)} restarts ended at a degenerate mode")
            self.finished = "converged"
        return StepReport(self.step_count, tuple(self._losses[-1]), {}, 1.0, self.finished, "mode and curvature")

    def _one(self, density: _Counted, member: Any) -> bool:
        at_mode = laplace(density, start_of(member))
        if at_mode is None:
            return False
        mode, factor = at_mode
        # the curvature is at hand: one more Newton step squares what is left of the error
        value, gradient = value_and_gradient(density, mode.unsqueeze(0))
        if not bool(torch.isfinite(gradient).all() and torch.isfinite(value).all()):
            return False
        moved = mode + factor @ (factor.mT @ gradient[0])
        if bool(torch.isfinite(moved).all()) and float(density(moved.unsqueeze(0))) >= float(value):
            mode = moved
        write_gaussian(member, mode, factor, torch.cholesky_inverse(factor).diagonal().rsqrt())
        return True

    def _fail(self, density: _Counted) -> None:
        if density.broken:
            raise NonFiniteLossError(
                f"step {self.step_count}: the log joint is not finite at the start points, or no longer where it was "
                "before. Start inside the support with init=, and look for a log joint that overflows.",
                step=self.step_count,
                term="log_joint",
            )
        raise NotAvailableError(
            "the Laplace approximation does not exist here: no mode with positive definite curvature was found (a flat "
            "direction, or a posterior without a mode). Use solver='pathfinder' or 'lbfgs', which need "
            "none, or non-centred parameters."
        )

    def output(self) -> Mapping[str, Any]:
        """Say how it stands; the family was written by the step."""
        losses = self._losses[-1] if self._losses else [math.inf] * self.task.restarts
        return {
            "losses": losses, "rhat": math.nan, "mcse": math.nan, "gradient_snr": None, "notes": tuple(self.notes),
        }  # fmt: skip

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state (see :class:`~vifamily.solvers._base.Run`)."""
        out = {f"parameter/{i}": p.detach().clone() for i, p in enumerate(self.task.family.parameters())}
        out["losses"] = self.losses
        return out, {"step": self.step_count, "finished": self.finished, "notes": list(self.notes)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up a written-down state (see :class:`~vifamily.solvers._base.Run`)."""
        for i, parameter in enumerate(self.task.family.parameters()):
            parameter.copy_(tensors[f"parameter/{i}"])
        self._losses = tensors["losses"].tolist()
        self.step_count, self.finished, self.notes = int(values["step"]), values["finished"], list(values["notes"])

    @property
    def losses(self) -> Tensor:
        """Minus the ELBO of every restart, ``(1, restart)`` once the step is taken."""
        return torch.tensor(self._losses, dtype=torch.float64).reshape(len(self._losses), self.task.restarts)

    @property
    def step_sizes(self) -> Tensor:
        """One, as Newton's method takes whole steps, ``(step,)``."""
        return torch.ones(len(self._losses), dtype=torch.float64)
