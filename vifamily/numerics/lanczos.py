"""Extreme eigenvalues and linear solves from products with a symmetric matrix alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Eigenpair", "Solved", "conjugate_gradients", "lanczos"]

Product = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue with its vector.

    Attributes:
        value: The eigenvalue.
        vector: ``(dim,)``, of length one.
        residual: Length of ``A v - value v``, as the recurrence knows it: an eigenvalue lies that near.
        steps: Products that were taken.
    """

    value: float
    vector: Tensor
    residual: float
    steps: int


def lanczos(
    product: Product, start: Tensor, *, largest: bool = True, max_steps: int = 300, tolerance: float = 1e-12
) -> Eigenpair:
    """Largest or smallest eigenvalue of a symmetric matrix, by Lanczos' method with full reorthogonalisation.

    The vectors of all steps are kept, ``(steps, dim)``, so that rounding does not make copies of eigenvalues that have
    converged.

    Args:
        product: ``v -> A v``, ``(dim,) -> (dim,)``.
        start: ``(dim,)``; what it is orthogonal to is not found, so a random vector.
        largest: Whether the largest is wanted.
        max_steps: Products at most.
        tolerance: Residual at which to stop, in units of the largest absolute eigenvalue seen.

    Returns:
        The eigenvalue (from below for the largest, from above for the smallest, where steps ran out).

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64))
        >>> start = torch.ones(3, dtype=torch.float64)
        >>> [round(lanczos(lambda v: matrix @ v, start, largest=up).value, 10) for up in (True, False)]
        [3.0, -2.0]
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        moved = product(basis[-1])
        diagonal.append(float(moved @ basis[-1]))
        every = torch.stack(basis)
        for _ in range(2):  # once is not enough where most of the vector is removed
            moved = moved - every.T @ (every @ moved)
        left = float(moved.norm())
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            next_to = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
            small = small + next_to + next_to.T
        values, vectors = torch.linalg.eigh(small)
        at = -1 if largest else 0
        residual = left * abs(float(vectors[-1, at]))
        size = float(values.abs().max())
        done = residual <= tolerance * size or left <= 1e-14 * size
        if done or len(basis) >= min(max_steps, start.numel()):
            vector = vectors[:, at].to(every) @ every
            return Eigenpair(float(values[at]), vector / vector.norm(), residual, len(basis))
        beside.append(left)
        basis.append(moved / left)


@dataclasses.dataclass(frozen=True)
class Solved:
    """The solution of a linear system.

    Attributes:
        solution: ``(dim,)``.
        residual: Length of what is left of the right-hand side, relative to it.
        downhill: A direction of zero or negative curvature that was met, ``(dim,)``, in which case there is no
            solution; None where there was none.
    """

    solution: Tensor
    residual: float
    downhill: Tensor | None = None


def conjugate_gradients(
    product: Product, right: Tensor, *, start: Tensor | None = None, max_steps: int = 1000, tolerance: float = 1e-13
) -> Solved:
    """Solve ``A x = b`` for a positive definite matrix.

    Args:
        product: ``v -> A v``, ``(dim,) -> (dim,)``.
        right: ``b``, ``(dim,)``.
        start: First guess, or None for zero.
        max_steps: Products at most.
        tolerance: Relative residual at which to stop.

    Example:
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> right = torch.tensor([3.0, 4.0], dtype=torch.float64)
        >>> conjugate_gradients(lambda v: matrix @ v, right).solution.round(decimals=10).tolist()
        [1.0, 1.0]
    """
    x = torch.zeros_like(right) if start is None else start
    residual = right.clone() if start is None else right - product(x)
    size, goal = float(residual @ residual), (tolerance * float(right.norm())) ** 2
    direction = residual.clone()
    for _ in range(max_steps):
        if size <= goal:
            break
        moved = product(direction)
        curvature = float(direction @ moved)
        if not curvature > 0:
            return Solved(x, 1.0, direction / direction.norm())
        x = x + size / curvature * direction
        residual = residual - size / curvature * moved
        before, size = size, float(residual @ residual)
        direction = residual + size / before * direction
    return Solved(x, (size / max(float(right @ right), 1e-300)) ** 0.5)
