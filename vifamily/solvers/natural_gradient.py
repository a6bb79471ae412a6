"""Natural-gradient steps of a Gaussian in its natural parameters, on all data or on minibatches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vifamily.errors import ConfigError, IncompatibleError
from vifamily.numerics.gaussian_start import value_and_gradient
from vifamily.registry import entry_name, register
from vifamily.solvers._base import Solver, Task
from vifamily.solvers._gaussian_run import GaussianRun, factor_of
from vifamily.solvers._stopping import StoppingRule
from vifamily.types import Capability

__all__ = ["NaturalGradient", "derivatives", "positive"]

_LARGEST_HESSIAN = 300
_MOST_NUMBERS = 10_000_000
"""Log likelihoods held at once while Hessians are formed."""
_MOST_SDS = 10.0
_MOVED_SDS = 3.0
_MOST_SLOWNESS = 20.0


@register("solvers", "natural_gradient")
@dataclasses.dataclass(frozen=True)
class NaturalGradient(Solver):
    r"""Natural-gradient ELBO for Gaussian families, made for minibatches.

    In the natural parameters of :math:`q = N(m, P^{-1})` the natural gradient of the ELBO is its gradient in the
    expectation parameters (Khan and Rue 2023, "The Bayesian learning rule"). By the theorems of Bonnet and Price a step
    of size :math:`\rho` is

    .. math:: P' = (1 - \rho) P - \rho\, E_q[\nabla^2 \log p(x, z)], \qquad
              m' = m + \rho\, P'^{-1} E_q[\nabla \log p(x, z)],

    a Newton step averaged over q. On a Gaussian target one step of size 1 on all data gives the exact posterior. The
    right-hand sides are linear in the log joint, so they are unbiased on minibatches. Expectations over q are means
    over mirrored pairs of draws. Where a step would leave an eigenvalue of :math:`P^{-1/2} P' P^{-1/2}` below 1/2, that
    eigenvalue follows a continuation that stays above 1/4 instead (a retraction, in place of that of Lin, Schmidt and
    Khan 2020, which is positive everywhere but exact nowhere); a mean moves by at most ten sds per coordinate in one
    step.

    Hessians are exact, by one backward pass per coordinate, up to 300 coordinates of a twice differentiable model;
    otherwise ``E_q[Hessian]`` is estimated from gradients alone (Stein's identity), which is far noisier.

    *Minibatches.* Alone, they leave an error of about ``sqrt(N / rows seen)`` posterior sds in the mean: hundreds of
    epochs for a few hundredths of an sd. So gradient and Hessian of all data at the start point are first summed in one
    streaming pass, and each minibatch only corrects that second-order expansion (control variates, Baker, Fearnhead,
    Fox and Nemeth 2019); the estimates stay unbiased, and their noise falls with the square of the distance to the
    anchor. The anchor is moved, by another pass, where a stage ends more than three posterior sds from it. The cost of
    a step does not depend on N, nor does the memory.

    The step is halved until that changes nothing, with averages of mean and precision, as in the solver ``adam``. For
    ``mean_field`` the precision is diagonal and the step of the mean is divided by the largest eigenvalue of the
    curvature in units of that precision: without it, correlated coordinates overshoot together.

    Args:
        step: First step size; None takes 0.5 on minibatches with an anchor, 0.2 on all data, 0.1 with
            inexact Hessians or minibatches without an anchor.
        anchor: Whether minibatches correct an expansion of all data.
        tolerance: Largest change on halving the step, in posterior sds and log sds.
        mcse: Largest Monte-Carlo error of the averaged iterates, in the same units.

    Raises:
        ConfigError: If a number is not positive, or the step is above 1.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "full_rank", solver="natural_gradient", seed=0)
        >>> posterior.record.stop_reason, posterior.record.steps
        ('converged', 10)
    """

    step: float | None = None
    anchor: bool = True
    tolerance: float = 0.02
    mcse: float = 0.02

    default_draws: ClassVar[int | None] = 4
    noise_per_datum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("step", "tolerance", "mcse"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (value is not None or name != "step") and not (number and 0 < value < math.inf):
                raise ConfigError(f"natural_gradient({name}=...) must be a positive number, got {value!r}.")
        if self.step is not None and self.step > 1:
            raise ConfigError(f"natural_gradient(step=...) must not exceed 1, a whole Newton step, got {self.step!r}.")
        if not isinstance(self.anchor, bool):
            raise ConfigError(f"natural_gradient(anchor=...) must be true or false, got {self.anchor!r}.")

    def check_objective(self, objective: Any) -> None:
        """Refuse what is not the ELBO (see :class:`~vifamily.solvers._base.Solver`)."""
        name = entry_name(objective)
        if name != "elbo":
            raise IncompatibleError(
                f"the solver 'natural_gradient' takes steps of the ELBO, not of {name!r}: use objective='elbo', or "
                "solver='adam'.",
                missing=("the objective 'elbo'",),
                works_with={"objectives": ["elbo"]},
            )

    def check(self, *, model: Any, family: Any, batch_size: int | None = None, objective: Any = None) -> None:
        """Refuse families without natural parameters of their own, and models beyond gradients."""
        capabilities = frozenset(family.capabilities)
        if not capabilities & {Capability.FULL_GAUSSIAN, Capability.FACTORISED_GAUSSIAN}:
            name = getattr(family, "spec", None) or type(family).__name__
            raise IncompatibleError(
                f"the solver 'natural_gradient' needs a Gaussian family that takes any covariance, or any variances, "
                f"and {name!r} does not: use family='full_rank' or 'mean_field', or solver='adam'.",
                missing=(str(Capability.FULL_GAUSSIAN),),
                works_with={"families": ["full_rank", "mean_field"]},
            )
        of_model = frozenset(getattr(model, "capabilities", ()))
        if Capability.SCORE not in of_model:
            raise IncompatibleError(
                "the solver 'natural_gradient' needs the gradient of the log joint, and this model gives none: use "
                "solver='adam'.",
                missing=(str(Capability.SCORE),),
            )
        for capability in (Capability.LOCAL, Capability.POINT_PARAMETERS):
            if capability in of_model:
                raise IncompatibleError(
                    f"the solver 'natural_gradient' does not take models with {capability!s}: use solver='adam'.",
                    missing=(f"a model without {capability!s}",),
                )

    def start(self, task: Task) -> NaturalGradientRun:
        """Begin a run."""
        self.check(model=task.model, family=task.family)
        rule = StoppingRule(every=1, window=40, check=20, tolerance=self.tolerance, mcse=self.mcse, stage=400)
        return NaturalGradientRun(task, rule, self.step, anchored=self.anchor)


class NaturalGradientRun(GaussianRun):
    """One run of :class:`NaturalGradient`; its matrix is the precision, or its diagonal for ``mean_field``."""

    factor: Tensor
    """``F`` with ``F F^T`` the covariance, or standard deviations."""

    def __init__(self, task: Task, rule: StoppingRule, step: float | None, *, anchored: bool) -> None:
        self.full = Capability.FULL_GAUSSIAN in frozenset(task.family.capabilities)
        dim = task.family.latent.dim
        first = task.batch_at(0)
        self.rows = (task.model.num_data or 1) if first is None else first.size
        twice = Capability.SECOND_ORDER in frozenset(task.model.capabilities)
        self.exact = twice and dim <= _LARGEST_HESSIAN
        self.anchored = anchored and self.exact and first is not None and task.model.num_data is not None
        usual = 0.1 if not self.exact else 0.5 if self.anchored else 0.2 if first is None else 0.1
        super().__init__(task, rule, step or usual)
        with torch.no_grad():
            entropy = task.family.entropy().double().reshape(-1)
        self.constant = entropy - self._log_det()
        self.anchor: tuple[Tensor, Tensor, Tensor] | None = None
        self.largest: Tensor | None = None

    # -- the Gaussian --------------------------------------------------------------------------------------------------
    def begin(self, covariance: Tensor) -> None:
        """Take the precision of the covariances."""
        if self.full:
            self.matrix = torch.cholesky_inverse(factor_of(covariance))
        else:
            self.matrix = 1 / torch.diagonal(covariance, dim1=-2, dim2=-1)
        self.renew()

    def renew(self) -> None:
        """Factorise the covariance."""
        if not self.full:
            self.factor = self.matrix.rsqrt()
            return
        lower = factor_of(self.matrix)
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        self.factor = torch.linalg.solve_triangular(lower, eye, upper=False).mT

    def variances(self) -> Tensor:
        """Marginal variances."""
        return self.factor.square().sum(-1) if self.full else self.factor**2

    def scale(self, matrix: Tensor) -> Tensor:
        """Return the factor of the covariance, or standard deviations, of a precision."""
        return factor_of(torch.cholesky_inverse(factor_of(matrix))) if self.full else matrix.rsqrt()

    def _log_det(self) -> Tensor:
        diagonal = torch.diagonal(self.factor, dim1=-2, dim2=-1) if self.full else self.factor
        return diagonal.log().sum(-1)

    # -- one step ------------------------------------------------------------------------------------------------------
    def advance(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a natural-gradient step."""
        if self.anchored and self.anchor is None:
            self._set_anchor()
        value, slope, curvature = self.natural_gradient(step)
        entropy = self._log_det() + self.constant
        terms = {"log_joint": -value, "entropy": -entropy}
        finite = all(bool(torch.isfinite(part).all()) for part in (value, slope, curvature))
        if not finite:
            return -value - entropy + 0 * slope.sum(-1), terms | {"gradient": slope, "hessian": curvature}
        rho = self.step_size
        if self.full:
            values, vectors = torch.linalg.eigh(curvature)
            grown = positive(rho * (values - 1))
            move = (vectors @ ((vectors.mT @ slope.unsqueeze(-1)) / grown.unsqueeze(-1))).squeeze(-1)
            root = torch.linalg.solve(self.factor.mT, vectors)
            self.mean = self.mean + (self.factor @ _bounded(rho * move).unsqueeze(-1)).squeeze(-1)
            self.matrix = root * grown.unsqueeze(-2) @ root.mT
        else:
            diagonal = torch.diagonal(curvature, dim1=-2, dim2=-1)
            grown = positive(rho * (diagonal - 1))
            unit = grown.rsqrt()
            largest = torch.linalg.eigvalsh(unit.unsqueeze(-1) * curvature * unit.unsqueeze(-2)).amax(-1, keepdim=True)
            # that of the steps before: one from the same draws as the slope would bias its mean
            before = largest if self.largest is None else self.largest
            self.largest = before + rho * (largest - before)
            self.mean = self.mean + self.factor * _bounded(rho * slope / grown / before.clamp_min(1.0))
            self.matrix = self.matrix * grown
        self.renew()
        return -value - entropy, terms

    def natural_gradient(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Estimate what a step needs, where q is standard normal.

        Args:
            step: The step, for its noise and its batch.

        Returns:
            Mean log joint ``(restart,)``; mean gradient ``F^T E[g]``, ``(restart, dim)``; mean negative Hessian
            ``-F^T E[H] F``, ``(restart, dim, dim)``.
        """
        noise = self.noise(step)
        half = noise[:, : max(1, (noise.shape[1] + 1) // 2)]
        e = torch.cat([half, -half], dim=1)
        factor = self.factor if self.full else torch.diag_embed(self.factor)
        points = self.mean.unsqueeze(1) + e @ factor.mT
        if not self.exact:
            value, gradient = value_and_gradient(self.log_joint(step), points)
            h = gradient.double() @ factor
            product = e.mT @ h / e.shape[1]
            return value.mean(1), h.mean(1), -0.5 * (product + product.mT)
        if self.anchor is not None:
            points = torch.cat([points, self.anchor[0].unsqueeze(1)], dim=1)
        value, gradient, hessian = derivatives(self.log_joint(step), points, self.rows)
        count = e.shape[1]
        slope, bend = gradient[:, :count].mean(1), hessian[:, :count].mean(1)
        if self.anchor is not None:
            at, all_slope, all_bend = self.anchor
            lacking = all_bend - hessian[:, -1]
            slope = slope + all_slope - gradient[:, -1] + (lacking @ (self.mean - at).unsqueeze(-1)).squeeze(-1)
            bend = bend + lacking
        curvature = -factor.mT @ bend @ factor
        return value[:, :count].mean(1), (slope.unsqueeze(1) @ factor).squeeze(1), 0.5 * (curvature + curvature.mT)

    # -- the anchor ----------------------------------------------------------------------------------------------------
    def _set_anchor(self) -> None:
        """Sum gradient and Hessian of all data at the mean, in one pass over the batches of an epoch."""
        at, seen = self.mean, 0
        slope, bend = torch.zeros_like(at), torch.zeros(*at.shape, at.shape[-1], dtype=at.dtype, device=at.device)
        total = int(self.task.model.num_data)
        for step in range(math.ceil(total / self.rows)):
            batch = self.task.batch_at(step)
            size = total if batch is None else batch.size
            if seen + size > total:
                break
            _, gradient, hessian = derivatives(self.log_joint(step), at.unsqueeze(1), size)
            # each is an estimate for all data: weighted by size they average to that of all the rows seen
            slope, bend, seen = slope + size * gradient[:, 0], bend + size * hessian[:, 0], seen + size
        self.anchor = (at, slope / seen, bend / seen)
        self.notes.append(f"gradient and Hessian of {seen} of {total} data summed before step {self.step_count}")

    def _end_stage(self, verdict: str) -> None:
        # the mean of a factorised Gaussian takes steps that much shorter
        if self.largest is not None:
            self.slowness = float(self.largest.clamp(1.0, _MOST_SLOWNESS).max())
        super()._end_stage(verdict)
        if self.anchor is None or self.finished is not None:
            return
        apart = ((self.mean - self.anchor[0]).abs() / self.variances().sqrt()).max()
        if float(apart) > _MOVED_SDS:
            self._set_anchor()

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return the anchor, and the running largest eigenvalue."""
        out = {} if self.anchor is None else {f"anchor/{i}": part for i, part in enumerate(self.anchor)}
        return out if self.largest is None else {**out, "largest": self.largest}

    def take_extra(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up :meth:`extra_tensors`."""
        self.largest = tensors["largest"].clone() if "largest" in tensors else None
        if "anchor/0" in tensors:
            at, slope, bend = (tensors[f"anchor/{i}"].clone() for i in range(3))
            self.anchor = (at, slope, bend)


def derivatives(
    log_density: Callable[[Tensor], Tensor], points: Tensor, rows: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and exact Hessians of a log density at points.

    Args:
        log_density: ``(restart, n, dim) -> (restart, n)``, twice differentiable.
        points: ``(restart, n, dim)``.
        rows: Data per point, which bounds how many points are evaluated at once.

    Returns:
        ``(restart, n)``, ``(restart, n, dim)`` and ``(restart, n, dim, dim)``, in float64.

    Example:
        >>> z = torch.ones(1, 1, 2, dtype=torch.float64)
        >>> value, gradient, hessian = derivatives(lambda z: -z[..., 0] * z[..., 1] ** 2, z)
        >>> gradient[0, 0].tolist(), hessian[0, 0].tolist()
        ([-1.0, -2.0], [[0.0, -2.0], [-2.0, -2.0]])
    """
    restarts, count, dim = points.shape
    copies = points.detach().repeat_interleave(dim, dim=1)
    directions = torch.eye(dim, dtype=points.dtype, device=points.device).repeat(count, 1)
    width = max(1, _MOST_NUMBERS // (max(rows, 1) * restarts))
    values, gradients, products = [], [], []
    with torch.enable_grad():
        for first in range(0, copies.shape[1], width):
            at = copies[:, first : first + width].clone().requires_grad_()
            value = log_density(at)
            (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=True)
            along = (gradient * directions[first : first + width]).sum()
            # a log density that is linear, or does not depend on the points, has no second derivative to take
            (product,) = (
                torch.autograd.grad(along, at, allow_unused=True) if along.requires_grad else (torch.zeros_like(at),)
            )
            values.append(value.detach())
            gradients.append(gradient.detach())
            products.append(torch.zeros_like(at) if product is None else product)
    shape = (restarts, count, dim, dim)
    hessian = torch.cat(products, 1).reshape(shape).double()
    value, gradient = torch.cat(values, 1).reshape(shape[:3])[..., 0], torch.cat(gradients, 1).reshape(shape)[..., 0, :]
    return value.double(), gradient.double(), 0.5 * (hessian + hessian.mT)


def positive(change: Tensor) -> Tensor:
    """Return ``1 + change`` where that is at least 1/2, and a smooth continuation above 1/4 below.

    Example:
        >>> [round(v, 4) for v in positive(torch.tensor([1.0, 0.0, -0.5, -1.0, -3.0])).tolist()]
        [2.0, 1.0, 0.5, 0.2838, 0.25]
    """
    below = 0.25 + 0.25 * (4 * (change.clamp_max(-0.5) + 0.5)).exp()
    return torch.where(change < -0.5, below, 1 + change)


def _bounded(move: Tensor) -> Tensor:
    """Shorten moves beyond ten sds per coordinate."""
    longest = _MOST_SDS * move.shape[-1] ** 0.5
    shortened: Tensor = move * (longest / move.norm(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)
    return shortened
