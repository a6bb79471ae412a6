"""Bijections that torch lacks, or that do not pass through ``vmap`` there.

Ordered vectors, Cholesky factors, positive-definite and correlation matrices. All are
:class:`torch.distributions.transforms.Transform`; log Jacobians are with respect to the free entries of the result (the
lower triangle of a symmetric matrix, the strictly lower triangle of a correlation matrix), which is the measure that
torch's densities use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

__all__ = [
    "Angle",
    "CircleConstraint",
    "CorrCholesky",
    "CorrMatrix",
    "CorrMatrixConstraint",
    "LowerCholesky",
    "Ordered",
    "OrderedConstraint",
    "PositiveDefinite",
    "PositiveOrdered",
    "PositiveOrderedConstraint",
    "matrix_size",
]


class CircleConstraint(constraints.Constraint):
    """Angles in radians, any number of turns."""

    def check(self, value: Tensor) -> Tensor:
        """Return whether each angle is finite."""
        return value.isfinite()


class OrderedConstraint(constraints.Constraint):
    """Vectors with strictly increasing entries."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Return whether each vector increases."""
        increasing: Tensor = (value[..., 1:] > value[..., :-1]).all(-1)
        return increasing


class PositiveOrderedConstraint(OrderedConstraint):
    """Vectors with strictly increasing positive entries."""

    def check(self, value: Tensor) -> Tensor:
        """Return whether each vector is positive and increases."""
        positive: Tensor = (value > 0).all(-1)
        return positive & super().check(value)


class CorrMatrixConstraint(constraints.Constraint):
    """Symmetric positive-definite matrices with ones on the diagonal."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        """Return whether each matrix is a correlation matrix."""
        unit: Tensor = ((value.diagonal(dim1=-2, dim2=-1) - 1).abs() < 1e-6).all(-1)
        definite: Tensor = constraints.positive_definite.check(value)
        return definite & unit


class _Bijection(Transform):
    bijective = True
    domain = constraints.real_vector
    codomain: constraints.Constraint

    def __init__(self) -> None:
        super().__init__(cache_size=0)


class Angle(Transform):
    """Any number to the angle in ``(-pi, pi]`` that it stands for: a bijection of the circle, with Jacobian one.

    Example:
        >>> Angle()(torch.tensor([0.5, 2 * math.pi + 0.5, -math.pi])).numpy().round(4)
        array([0.5   , 0.5   , 3.1416], dtype=float32)
    """

    bijective = True
    domain = constraints.real
    codomain = CircleConstraint()

    def __init__(self) -> None:
        super().__init__(cache_size=0)

    def _call(self, x: Tensor) -> Tensor:
        inside: Tensor = math.pi - torch.remainder(math.pi - x, 2 * math.pi)
        # angles that are there already stay as they are, to the last digit
        return torch.where((x > -math.pi) & (x <= math.pi), x, inside)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(x)


class Ordered(_Bijection):
    """Real vector to ordered vector, ``y_0 = x_0``, ``y_i = y_{i-1} + exp(x_i)``.

    Example:
        >>> Ordered()(torch.tensor([1.0, 0.0, 0.0]))
        tensor([1., 2., 3.])
    """

    codomain = OrderedConstraint()

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x[..., 1:].exp()], -1).cumsum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :1], y.diff(dim=-1).log()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log steps."""
        return x[..., 1:].sum(-1)


class PositiveOrdered(_Bijection):
    """Real vector to positive ordered vector: the exponential of :class:`Ordered`."""

    codomain = PositiveOrderedConstraint()

    def _call(self, x: Tensor) -> Tensor:
        return Ordered()._call(x).exp()

    def _inverse(self, y: Tensor) -> Tensor:
        return Ordered()._inverse(y.log())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the ordered vector, and of its exponential."""
        ordered = Ordered()._call(x)
        return ordered.sum(-1) + x[..., 1:].sum(-1)


def matrix_size(entries: int, *, diagonal: bool) -> int:
    """Side of a matrix whose (strictly, without ``diagonal``) lower triangle has this many entries.

    Example:
        >>> matrix_size(6, diagonal=True), matrix_size(6, diagonal=False)
        (3, 4)
    """
    side = (math.isqrt(8 * entries + 1) - 1) // 2
    return side if diagonal else side + 1


class _Triangular(_Bijection):
    """Vector of the lower triangle, row by row, to a matrix.

    Entries are gathered by an index made once, not written in place: ``vmap`` and tracing can follow.
    """

    diagonal = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.rows, self.columns = torch.tril_indices(size, size, 0 if self.diagonal else -1)
        entries = len(self.rows)
        index = torch.full((size, size), entries)  # the upper triangle reads the appended zero
        index[self.rows, self.columns] = torch.arange(entries)
        if not self.diagonal:
            index.fill_diagonal_(entries + 1)  # and the diagonal the appended one
        self.index = index

    def _matrix(self, entries: Tensor) -> Tensor:
        lead = entries.shape[:-1]
        constants = [entries.new_zeros((*lead, 1))] + ([] if self.diagonal else [entries.new_ones((*lead, 1))])
        return torch.cat([entries, *constants], -1)[..., self.index]

    def _entries(self, matrix: Tensor) -> Tensor:
        return matrix[..., self.rows, self.columns]

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """Shape of the matrix for a shape of vectors."""
        return torch.Size((*shape[:-1], self.size, self.size))

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """Shape of the vectors for a shape of matrices."""
        return torch.Size((*shape[:-2], len(self.rows)))


class LowerCholesky(_Triangular):
    """Vector of ``n (n + 1) / 2`` numbers to a lower-triangular matrix with the exponential on the diagonal.

    Args:
        size: Side of the matrix.
    """

    codomain: constraints.Constraint = constraints.lower_cholesky

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.on_diagonal = self.rows == self.columns

    def _call(self, x: Tensor) -> Tensor:
        on = self.on_diagonal.to(x.device)
        # zero before the exponential: an overflow off the diagonal would otherwise give a NaN gradient
        return self._matrix(torch.where(on, torch.where(on, x, 0.0).exp(), x))

    def _inverse(self, y: Tensor) -> Tensor:
        on, entries = self.on_diagonal.to(y.device), self._entries(y)
        return torch.where(on, torch.where(on, entries, 1.0).log(), entries)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log diagonal."""
        diagonal: Tensor = x * self.on_diagonal.to(x)
        return diagonal.sum(-1)


class PositiveDefinite(LowerCholesky):
    """Vector of ``n (n + 1) / 2`` numbers to ``L Lᵀ`` with ``L`` from :class:`LowerCholesky`.

    The log Jacobian adds ``n log 2 + sum_i (n - i) log L_ii`` (i from 0) to that of ``L``.
    """

    codomain = constraints.positive_definite

    def _call(self, x: Tensor) -> Tensor:
        factor = super()._call(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the factor, and of its square."""
        weight: Tensor = self.on_diagonal.to(x) * (self.size - self.rows + 1).to(x)
        return (x * weight).sum(-1) + self.size * math.log(2)


class CorrCholesky(_Triangular):
    """Vector of ``n (n - 1) / 2`` numbers to the Cholesky factor of a correlation matrix.

    With canonical partial correlations ``r_ij = tanh(x_ij)``: ``L_ij = r_ij sqrt(prod_{k<j} (1 - r_ik²))`` and
    ``r_ii = 1`` (Lewandowski, Kurowicka and Joe 2009). The map is that of torch's
    :class:`~torch.distributions.transforms.CorrCholeskyTransform`; products are taken in logs, so that large ``x``
    stays exact.
    """

    codomain: constraints.Constraint = constraints.corr_cholesky
    diagonal = False

    def _call(self, x: Tensor) -> Tensor:
        log_rest = torch.cat([_log_sech_squared(x), x.new_zeros((*x.shape[:-1], 2))], -1)[..., self.index]
        return self._matrix(x.tanh()) * (0.5 * (log_rest.cumsum(-1) - log_rest)).exp()

    def _inverse(self, y: Tensor) -> Tensor:
        square = y.square()
        tail = square.flip(-1).cumsum(-1).flip(-1) - square  # what is left of the unit row to the right of each entry
        return (self._entries(y) / self._entries(tail).sqrt()).asinh()

    def _weight(self, x: Tensor) -> Tensor:
        weight: Tensor = 1 + 0.5 * (self.rows - 1 - self.columns)
        return weight.to(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum over entries of ``(1 + (i - 1 - j) / 2) log(1 - r_ij²)``."""
        return (_log_sech_squared(x) * self._weight(x)).sum(-1)


class CorrMatrix(CorrCholesky):
    """Vector of ``n (n - 1) / 2`` numbers to a correlation matrix, ``L Lᵀ`` with ``L`` from :class:`CorrCholesky`."""

    codomain = CorrMatrixConstraint()

    def _call(self, x: Tensor) -> Tensor:
        factor = super()._call(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def _weight(self, x: Tensor) -> Tensor:
        # the square adds (n - 1 - i) log L_ii to row i, and log L_ii is half the sum of its log(1 - r²)
        more: Tensor = 0.5 * (self.size - 1 - self.rows)
        return super()._weight(x) + more.to(x)


def _log_sech_squared(x: Tensor) -> Tensor:
    return 2 * (math.log(2) - x + torch.nn.functional.logsigmoid(2 * x))
