"""Three ways to the same numbers: dense matrices, products alone, and Gram matrices of rows."""

from __future__ import annotations

import abc
import dataclasses
import math

import torch
from torch import Tensor

from vifamily.diagnostics._stability_units import Curvature
from vifamily.errors import ConfigError, NotAvailableError
from vifamily.numerics.lanczos import Eigenpair, conjugate_gradients, lanczos

__all__ = ["Critical", "Dense", "Free", "Gram", "Route"]

_PROBES = 32
"""Random signs from which the trace of V is estimated, where only products with it are there (Hutchinson 1990)."""
_SINGULAR = 1e-8
"""Smallest eigenvalue of V, relative to its largest, below which its inverse says nothing."""


@dataclasses.dataclass(frozen=True)
class Critical:
    """The critical alpha with its direction.

    Attributes:
        alpha_star: ``1 / lambda_max(V^-1 J)``; 0 where V itself is not positive definite.
        direction: ``(dim,)``, of length one.
        curvature: ``d^T V d`` along it.
        residual: How far the eigenvalue is from converged, relative; 0 where it was computed directly.
    """

    alpha_star: float
    direction: Tensor
    curvature: float
    residual: float = 0.0


class Route(abc.ABC):
    """V and J in one of their forms; ``added`` is what goes onto the diagonal of V.

    Args:
        scores: ``(unit, dim)``.
    """

    name: str

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.num_units = scores, len(scores)

    @abc.abstractmethod
    def singular(self) -> bool:
        """Whether V may be singular without anything added."""

    @abc.abstractmethod
    def mean_diagonal(self) -> float:
        """Mean of the diagonal of V, in which relative damping is measured."""

    @abc.abstractmethod
    def critical(self, added: Tensor | float) -> Critical:
        """Return the critical alpha for ``V + added``."""

    @abc.abstractmethod
    def smallest(self, alpha: float, added: Tensor | float) -> Eigenpair:
        """Smallest eigenvalue of ``V + added - alpha J``."""

    def covariance(self, alpha: float, added: Tensor | float) -> Tensor | None:
        """Inverse of ``V + added - alpha J`` where it is positive definite and small enough to form, else None."""
        return None

    def _moment(self, vector: Tensor) -> Tensor:
        return self.scores.T @ (self.scores @ vector) / self.num_units


class Dense(Route):
    """The matrices themselves; for up to a thousand or so coordinates."""

    name = "dense"

    def __init__(self, scores: Tensor, curvature: Curvature) -> None:
        super().__init__(scores)
        if curvature.factor is not None:
            rows = curvature.factor()
            matrix = rows.T @ rows / self.num_units
        else:
            eye = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
            matrix = torch.stack([curvature.product(row) for row in eye])
        self.v = 0.5 * (matrix + matrix.T)
        self.j = scores.T @ scores / self.num_units

    def singular(self) -> bool:
        values = torch.linalg.eigvalsh(self.v)
        # a V that is negative somewhere is another matter: nothing should hide it
        return bool(values[0].abs() <= _SINGULAR * values.abs().max())

    def mean_diagonal(self) -> float:
        return float(self.v.diagonal().mean())

    def _raised(self, added: Tensor | float) -> Tensor:
        return self.v + torch.diag(torch.as_tensor(added, dtype=self.v.dtype, device=self.v.device).expand(len(self.v)))

    def critical(self, added: Tensor | float) -> Critical:
        matrix = self._raised(added)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            values, vectors = torch.linalg.eigh(matrix)
            return Critical(0.0, vectors[:, 0], float(values[0]))
        half = torch.linalg.solve_triangular(factor, self.scores.T, upper=False)
        values, vectors = torch.linalg.eigh(half @ half.T / self.num_units)
        direction = torch.linalg.solve_triangular(factor.T, vectors[:, -1:], upper=True).squeeze(-1)
        direction = direction / direction.norm()
        return Critical(_inverse(float(values[-1])), direction, float(direction @ matrix @ direction))

    def smallest(self, alpha: float, added: Tensor | float) -> Eigenpair:
        values, vectors = torch.linalg.eigh(self._raised(added) - alpha * self.j)
        return Eigenpair(float(values[0]), vectors[:, 0], 0.0, 0)

    def covariance(self, alpha: float, added: Tensor | float) -> Tensor | None:
        factor, info = torch.linalg.cholesky_ex(self._raised(added) - alpha * self.j)
        return None if int(info) else torch.cholesky_inverse(factor)


class Free(Route):
    """Products alone: Lanczos on ``S V^-1 S^T / n``, with conjugate gradients for ``V^-1``.

    Args:
        scores: ``(unit, dim)``, called S.
        curvature: V.
        generator: Randomness of the starting vectors.
        tolerance: Relative residual of eigenvalues; that of linear solves is ten thousand times smaller, as far as the
            arithmetic allows.
        max_steps: Steps of Lanczos' method at most, and a tenth of those of a linear solve.
    """

    name = "matrix_free"

    def __init__(
        self, scores: Tensor, curvature: Curvature, generator: torch.Generator, tolerance: float, max_steps: int
    ) -> None:
        super().__init__(scores)
        rounding = 10 * torch.finfo(curvature.dtype).eps
        self.tolerance, self.solve_tolerance = max(tolerance, rounding), max(1e-4 * tolerance, rounding)
        self.max_steps = max_steps
        self.product, self.trace = curvature.product, curvature.trace
        self._starts = {
            size: torch.randn(size, generator=generator, dtype=torch.float64).to(scores)
            for size in sorted({self.num_units, scores.shape[1]})
        }
        self._probes = torch.randint(2**31, (1,), generator=generator)

    def singular(self) -> bool:
        return True  # finding out costs as much as the answer

    def mean_diagonal(self) -> float:
        if self.trace is not None:
            return self.trace() / self.scores.shape[1]
        generator = torch.Generator().manual_seed(int(self._probes))
        total = 0.0
        for _ in range(_PROBES):
            signs = torch.randint(2, (self.scores.shape[1],), generator=generator).to(self.scores) * 2 - 1
            total += float(signs @ self.product(signs))
        return total / _PROBES / self.scores.shape[1]

    def critical(self, added: Tensor | float) -> Critical:
        def raised(vector: Tensor) -> Tensor:
            return self.product(vector) + added * vector

        left: list[float] = []

        def solve(right: Tensor) -> Tensor:
            solved = conjugate_gradients(raised, right, max_steps=10 * self.max_steps, tolerance=self.solve_tolerance)
            left.append(solved.residual)
            if solved.downhill is not None:
                raise _NotPositiveError
            return solved.solution

        def operator(units: Tensor) -> Tensor:
            return self.scores @ solve(self.scores.T @ units) / self.num_units

        start = self._starts[self.num_units]
        try:
            top = lanczos(operator, start, max_steps=self.max_steps, tolerance=self.tolerance)
            direction = solve(self.scores.T @ top.vector)
        except _NotPositiveError:
            lowest = self.smallest(0.0, added)
            return Critical(0.0, lowest.vector, lowest.value, lowest.residual)
        direction = direction / direction.norm()
        residual = max(top.residual / max(abs(top.value), 1e-300), *left)
        return Critical(_inverse(top.value), direction, float(direction @ raised(direction)), residual)

    def smallest(self, alpha: float, added: Tensor | float) -> Eigenpair:
        def product(vector: Tensor) -> Tensor:
            return self.product(vector) + added * vector - alpha * self._moment(vector)

        start = self._starts[self.scores.shape[1]]
        return lanczos(product, start, largest=False, max_steps=self.max_steps, tolerance=self.tolerance)


class _NotPositiveError(Exception):
    """Conjugate gradients met a direction in which V curves downwards."""


class Gram(Route):
    """Inner products of rows alone, for fewer units than parameters, by Woodbury's identity.

    With ``V = F^T F / n + b I``, ``S V^-1 S^T = (S S^T - S F^T (n b I + F F^T)^-1 F S^T) / b``.
    """

    name = "gram"

    def __init__(self, scores: Tensor, curvature: Curvature) -> None:
        super().__init__(scores)
        if curvature.factor is None:
            raise NotAvailableError(
                f"the Gram route needs a curvature with a factor, and {curvature.name!r} has none: use "
                "curvature='fisher' or 'gauss_newton', or route='matrix_free'."
            )
        self.rows = curvature.factor()
        self.ss, self.sf, self.ff = scores @ scores.T, scores @ self.rows.T, self.rows @ self.rows.T

    def singular(self) -> bool:
        return True

    def mean_diagonal(self) -> float:
        return float(self.ff.diagonal().sum()) / self.num_units / self.scores.shape[1]

    def _number(self, added: Tensor | float) -> float:
        if isinstance(added, Tensor) and added.numel() > 1:
            raise ConfigError("the Gram route takes one prior precision for all parameters: use route='matrix_free'.")
        number = float(added)
        if not number > 0:
            raise ConfigError("the Gram route needs damping or a prior precision above zero.")
        return number

    def critical(self, added: Tensor | float) -> Critical:
        base = self._number(added)
        inner = self.ff + self.num_units * base * torch.eye(len(self.ff), dtype=self.ff.dtype, device=self.ff.device)
        factor = torch.linalg.cholesky(inner)
        half = torch.linalg.solve_triangular(factor, self.sf.T, upper=False)
        values, vectors = torch.linalg.eigh((self.ss - half.T @ half) / (self.num_units * base))
        unit = vectors[:, -1]
        through = torch.cholesky_solve((self.sf.T @ unit)[:, None], factor).squeeze(-1)
        direction = self.scores.T @ unit - self.rows.T @ through
        length = direction.norm()
        direction = direction / length if float(length) > 0 else direction
        curved = float((self.rows @ direction).square().sum() / self.num_units) + base
        return Critical(_inverse(float(values[-1])), direction, curved)

    def smallest(self, alpha: float, added: Tensor | float) -> Eigenpair:
        base = self._number(added)
        gram = torch.cat([torch.cat([self.ss, self.sf], 1), torch.cat([self.sf.T, self.ff], 1)])
        sign = torch.cat([self.ss.new_full((len(self.ss),), -alpha), self.ff.new_ones(len(self.ff))]) / self.num_units
        values, vectors = torch.linalg.eigh(gram)
        kept = values > 1e-13 * values[-1]
        half = vectors[:, kept] * values[kept].sqrt()  # rows = half U^T with orthonormal U
        inside, within = torch.linalg.eigh(half.T @ (sign[:, None] * half))
        rows = torch.cat([self.scores, self.rows])
        if not len(inside) or (float(inside[0]) > 0 and rows.shape[1] > len(inside)):
            return Eigenpair(base, torch.zeros_like(rows[0]), 0.0, 0)  # nothing but the diagonal outside the rows
        vector = rows.T @ (vectors[:, kept] / values[kept].sqrt() @ within[:, 0])
        return Eigenpair(base + float(inside[0]), vector / vector.norm(), 0.0, 0)


def _inverse(value: float) -> float:
    return 1 / value if value > 0 else math.inf
