"""Modes of a log density by Newton's method, from many starting points side by side.

A small model costs as much to evaluate at a hundred points as at one, so each iteration spends two evaluations of
whole batches: one gives gradients and Hessians (by differences of gradients) at every point that is still on its way,
the other tries steps of several lengths and dampings at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from vifamily.errors import ModelError

__all__ = ["Modes", "is_numerical", "newton_modes", "tolerant", "value_and_gradient"]

LogDensity = Callable[[Tensor], Tensor]

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_ITERATIONS = 50
_ACCURACY = 1e-10
"""Squared Newton decrement below which a point is at its mode: half of it is the log density still to be gained."""
_FLAT = 1e-9
"""Smallest eigenvalue of the scaled Hessian that counts as curved."""
_DAMPING = (0.0, 1e-3, 1e-2, 0.1, 0.5, 2.0, 10.0, 100.0)
_LENGTHS = (0.25, 4.0)


@dataclasses.dataclass(frozen=True)
class Modes:
    """Where Newton's method ended, one row for each start.

    Attributes:
        point: ``(row, dim)``, the best point seen.
        factor: Lower-triangular factors of the inverse negative Hessian there, ``(row, dim, dim)``; meaningless where
            not ``found``.
        found: ``(row,)``, whether the point is a mode with a positive definite negative Hessian.
    """

    point: Tensor
    factor: Tensor
    found: Tensor


def value_and_gradient(log_density: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``(n,)`` and gradients ``(n, dim)`` of a log density at points ``(n, dim)``.

    Raises:
        ModelError: If the density does not depend on its points as far as torch can tell.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value = log_density(point)
        if not value.requires_grad:
            raise ModelError(
                "the log density gives no gradient with respect to its points: compute it with torch operations "
                "throughout, without detach(), item() or numpy."
            )
        (gradient,) = torch.autograd.grad(value.sum(), point)
    return value.detach(), gradient.detach()


def is_numerical(error: BaseException) -> bool:
    """Whether a model failed because of where it was evaluated: a matrix without a factor, a value out of range."""
    cause = error.__cause__ if isinstance(error, ModelError) else error
    if isinstance(cause, ValueError):
        # how torch's distributions refuse parameters and values that overflowed
        return any(words in str(cause) for words in ("to satisfy the constraint", "to be within the support"))
    return isinstance(cause, (LinAlgError, ArithmeticError))


def tolerant(log_density: LogDensity) -> LogDensity:
    """Make NaN of single points at which a log density raises a numerical error, instead of failing for the batch.

    Args:
        log_density: ``(n, dim) -> (n,)``.

    Returns:
        The same function where nothing is raised.
    """

    def outer(z: Tensor) -> Tensor:
        try:
            return log_density(z)
        except (ModelError, LinAlgError, ValueError, ArithmeticError) as error:
            if not is_numerical(error):
                raise
        if len(z) == 1:
            return (z * torch.nan).sum(-1)
        return torch.cat([outer(part) for part in z.chunk(2)])

    return outer


def newton_modes(log_density: LogDensity, starts: Tensor, *, iterations: int = _ITERATIONS) -> Modes:
    """Find modes from several starts at once.

    Each row takes damped Newton steps with the absolute values of the Hessian's eigenvalues, in coordinates scaled by
    its diagonal, so the method does not depend on units and leaves saddles; the best of ten steps is taken.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        starts: ``(row, dim)``.
        iterations: Bound on iterations.

    Returns:
        Points and factors; rows without a mode (degenerate, or not reached) say so.

    Example:
        >>> normal = lambda z: -0.5 * ((z - 1) ** 2 / torch.tensor([4.0, 1e-4], dtype=z.dtype)).sum(-1)
        >>> modes = newton_modes(normal, torch.zeros(1, 2, dtype=torch.float64))
        >>> bool(modes.found), [round(v, 6) for v in modes.factor[0].diagonal().tolist()]
        (True, [2.0, 0.01])
    """
    x = starts.detach().clone()
    rows, dim = x.shape
    factor = torch.zeros(rows, dim, dim, dtype=x.dtype, device=x.device)
    found = torch.zeros(rows, dtype=torch.bool, device=x.device)
    active = torch.arange(rows, device=x.device)
    steps = torch.full_like(x, 1e-4)
    for _ in range(iterations):
        if len(active) == 0:
            break
        point, step = x[active], steps[active]
        value, gradient, hessian = _expand(log_density, point, step)
        model = _Quadratic(gradient, hessian)
        steps[active] = model.steps
        decrement = model.decrement()
        here = model.curved & (decrement < _ACCURACY) & model.settled(step)
        trial, best = _best_step(log_density, point, model)
        gain = best > value
        # no step gains: at the rounding floor, which is convergence unless far from a stationary point
        floor = model.curved & ~gain & (decrement < 1e-4)
        done = here | floor
        found[active[done]] = True
        factor[active[done]] = model.factor()[done]
        move = gain & ~here
        x[active[move]] = trial[move]
        retry = model.curved & (decrement < _ACCURACY) & ~here  # again, with steps that fit the curvature
        active = active[(move | retry) & ~done]
    return Modes(x, factor, found & torch.isfinite(factor).all(-1).all(-1))


def _expand(log_density: LogDensity, x: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and negative Hessians at ``(row, dim)``, in one evaluation of ``row (2 dim + 1)`` points."""
    rows, dim = x.shape
    offsets = torch.diag_embed(steps)
    points = torch.cat([x[:, None], x[:, None] + offsets, x[:, None] - offsets], dim=1)
    value, gradient = value_and_gradient(log_density, points.reshape(-1, dim))
    gradient = gradient.reshape(rows, 2 * dim + 1, dim)
    up, down = gradient[:, 1 : dim + 1], gradient[:, dim + 1 :]
    hessian = -(up - down) / (2 * steps[..., None])
    return value.reshape(rows, -1)[:, 0], gradient[:, 0], 0.5 * (hessian + hessian.mT)


class _Quadratic:
    """The quadratic models of some rows, in coordinates scaled by the diagonals of their Hessians."""

    def __init__(self, gradient: Tensor, hessian: Tensor) -> None:
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        self.finite = torch.isfinite(hessian).all(-1).all(-1) & torch.isfinite(gradient).all(-1)
        size = diagonal.abs().nan_to_num(1.0, 1.0, 1.0)
        # a coordinate without curvature is scaled by its slope instead
        size = torch.where(size > 1e-12 * gradient.square().nan_to_num(0.0), size, gradient.square().nan_to_num(0.0))
        self.unit = torch.where(size > 0, size, torch.ones_like(size)).rsqrt()
        scaled = self.unit[..., None] * hessian * self.unit[..., None, :]
        eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
        self.scaled = torch.where(self.finite[:, None, None], scaled, eye)
        self.gradient = torch.where(self.finite[:, None], self.unit * gradient, torch.zeros_like(gradient))
        self.values, self.vectors = torch.linalg.eigh(self.scaled)
        self.curved = self.finite & (diagonal > 0).all(-1) & (self.values[:, 0] > _FLAT)
        self.along = (self.vectors.mT @ self.gradient[..., None])[..., 0]
        # differences at a hundredth of each posterior sd once there is one: right for any units of the parameters
        sd = (self.vectors.square() / self.values.clamp_min(_FLAT)[:, None]).sum(-1).sqrt()
        small = torch.where(self.curved[:, None], 1e-2 * sd, torch.full_like(sd, 1e-3)) * self.unit
        self.steps = torch.where(self.curved[:, None], small, small.clamp(1e-8, 1e-2))

    def decrement(self) -> Tensor:
        out: Tensor = (self.along.square() / self.values.clamp_min(_FLAT)).sum(-1)
        return out

    def settled(self, used: Tensor) -> Tensor:
        """Whether the differences were taken at steps that fit the curvature found."""
        ratio = used / self.steps
        return ((ratio > 0.1) & (ratio < 10)).all(-1)

    def factor(self) -> Tensor:
        """Factors of the inverse Hessians."""
        inverse = (self.vectors / self.values.clamp_min(_FLAT)[:, None]) @ self.vectors.mT
        covariance = self.unit[..., None] * inverse * self.unit[..., None, :]
        lower, info = torch.linalg.cholesky_ex(0.5 * (covariance + covariance.mT))
        return torch.where((info == 0)[:, None, None], lower, torch.full_like(lower, torch.nan))

    def candidates(self) -> Tensor:
        """Steps to try, ``(row, candidate, dim)``."""
        absolute = self.values.abs()
        damping = absolute.new_tensor(_DAMPING)[:, None]
        moves = self.along[:, None] / (absolute[:, None] + damping).clamp_min(_FLAT)
        moves = torch.cat([moves, *(length * moves[:, :1] for length in _LENGTHS)], dim=1)
        out: Tensor = self.unit[:, None] * (moves @ self.vectors.mT)
        return out


def _best_step(log_density: LogDensity, x: Tensor, model: _Quadratic) -> tuple[Tensor, Tensor]:
    points = x[:, None] + model.candidates()
    with torch.no_grad():
        value = log_density(points.reshape(-1, x.shape[-1])).reshape(points.shape[:2])
    value = torch.where(torch.isfinite(value), value, torch.full_like(value, -torch.inf))
    best = value.argmax(dim=1)
    rows = torch.arange(len(x), device=x.device)
    return points[rows, best], value[rows, best]
