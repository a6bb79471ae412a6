"""Closed-form updates of a Gaussian, averaged until they are known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, IncompatibleError
from vifamily.numerics.gaussian_start import value_and_gradient
from vifamily.registry import entry_name, register
from vifamily.solvers._base import Solver, Task
from vifamily.solvers._gaussian_run import GaussianRun, factor_of
from vifamily.solvers._stopping import StoppingRule

__all__ = ["ClosedFormUpdates"]

_REFRESH = 64
"""Steps between two factorisations of the covariance, which rounding would otherwise let its factor drift from."""


@register("solvers", "closed_form")
@dataclasses.dataclass(frozen=True)
class ClosedFormUpdates(Solver):
    r"""Drives objectives whose steps are formulas (``batch_and_match``, ``gsm``).

    A step takes ``draws`` draws of the current Gaussian, evaluates the score of the log joint at each, and replaces
    mean and covariance by what the objective's formula gives; no gradient passes through the family. The reported
    loss is the Fisher divergence weighted by the covariance, estimated on the same draws.

    Where the posterior is Gaussian the state stops moving, and the fit ends after ten steps in which it moved by less
    than 1e-7 posterior sds. Elsewhere the iterates keep moving with their draws: means and covariances are averaged
    once stationary (split R-hat), until the Monte-Carlo error of every mean (in posterior sds) and log sd is below
    ``mcse``, and the step (the regularisation lambda of ``batch_and_match``, a damping for ``gsm``) is halved until
    that changes none by more than ``tolerance``.

    It needs a family that takes any mean and covariance (``full_rank``). The state is held in float64, in the family's
    standardised coordinates. The factor from which draws are made is updated in ``O(dim^2 draws)`` where the objective
    gives its change in a basis, and computed anew every 64 steps.

    Args:
        step: First step; None takes the objective's.
        tolerance: Largest change on halving the step, in posterior sds and log sds.
        mcse: Largest Monte-Carlo error of the averaged iterates, in the same units.

    Raises:
        ConfigError: If a number is not positive.

    Example:
        >>> from vifamily import registry
        >>> registry.build("solvers", "closed_form(step=0.5)").step
        0.5
    """

    step: float | None = None
    tolerance: float = 0.02
    mcse: float = 0.02

    def __post_init__(self) -> None:
        for name in ("step", "tolerance", "mcse"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (value is not None or name != "step") and not (number and 0 < value < math.inf):
                raise ConfigError(f"closed_form({name}=...) must be a positive number, got {value!r}.")

    def check_objective(self, objective: Any) -> None:
        """Refuse an objective without a closed-form step (see :class:`~vifamily.solvers._base.Solver`)."""
        if not hasattr(objective, "move"):
            raise IncompatibleError(
                f"the solver 'closed_form' drives objectives whose steps are formulas, and {entry_name(objective)!r} "
                "has none: use objective='batch_and_match' or 'gsm', or another solver.",
                missing=("a closed-form step",),
                works_with={"objectives": ["batch_and_match", "gsm"]},
            )

    def start(self, task: Task) -> ClosedFormRun:
        """Begin a run."""
        self.check_objective(task.objective)
        rule = StoppingRule(every=1, window=40, check=20, tolerance=self.tolerance, mcse=self.mcse, stage=400)
        return ClosedFormRun(task, rule, self.step)


class ClosedFormRun(GaussianRun):
    """One run of :class:`ClosedFormUpdates`; its matrix is the covariance."""

    factor: Tensor

    def __init__(self, task: Task, rule: StoppingRule, step: float | None) -> None:
        dim = task.family.latent.dim
        super().__init__(task, rule, step or float(task.objective.first_step(task.draws, dim)))

    def begin(self, covariance: Tensor) -> None:
        """Take the covariances as they are."""
        self.matrix = covariance
        self.renew()

    def renew(self) -> None:
        """Factorise the covariance."""
        self.factor = factor_of(self.matrix)

    def advance(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Replace mean and covariance by what the formula gives on fresh draws."""
        if step % _REFRESH == 0:
            self.renew()
        mean, factor, e = self.mean, self.factor, self.noise(step)
        value, score = value_and_gradient(self.log_joint(step), mean.unsqueeze(-2) + e @ factor.mT)
        h = score.double() @ factor
        loss = self.task.objective.divergence(e, h)
        terms = {"log_joint": value.mean(-1), "largest_score": score.abs().amax((-2, -1)).double()}
        if not all(bool(torch.isfinite(term).all()) for term in terms.values()):
            return loss, terms
        shift, basis, inner = self.task.objective.move(e, h, self.step_size)
        self.mean = mean + (factor @ shift.unsqueeze(-1)).squeeze(-1)
        self.factor, self.matrix = moved(factor, self.matrix, basis, inner)
        return loss, terms

    def variances(self) -> Tensor:
        """Diagonal of the covariance."""
        return torch.diagonal(self.matrix, dim1=-2, dim2=-1).clamp_min(1e-300)

    def scale(self, matrix: Tensor) -> Tensor:
        """Return the factor of a covariance."""
        return factor_of(matrix)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the factor, which is only now and then that of the covariance to the last bit."""
        return {"factor": self.factor}

    def take_extra(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the factor."""
        self.factor = tensors["factor"].clone()


def moved(factor: Tensor, covariance: Tensor, basis: Tensor | None, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and covariance of ``F (I + W (M - I) W^T) F^T``.

    Args:
        factor: ``F``, ``(..., dim, dim)``, not necessarily triangular.
        covariance: ``F F^T``.
        basis: Orthonormal ``W``, ``(..., dim, rank)``, or None for the identity.
        inner: ``M``, symmetric positive definite.

    Returns:
        A factor, as a product with the root of the middle matrix, and the covariance; with a basis both cost
        ``O(dim^2 rank)``.
    """
    if basis is None:
        new = factor @ factor_of(inner)
        return new, new @ new.mT
    values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT))
    values = values.clamp_min(1e-14)
    turned = factor @ (basis @ vectors)
    new = factor + turned * (values.sqrt() - 1).unsqueeze(-2) @ (basis @ vectors).mT
    return new, covariance + turned * (values - 1).unsqueeze(-2) @ turned.mT
