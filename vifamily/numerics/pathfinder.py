"""Gaussians along an optimisation path, from the inverse-Hessian estimates of L-BFGS.

Zhang, Carpenter, Gelman and Vehtari (2022), "Pathfinder: parallel quasi-Newton variational inference", JMLR 23(306).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["PathGaussians", "path_gaussians"]

_CURVATURE = 1e-12
"""A pair of differences counts when ``s . z`` is above this part of ``|z|^2`` (section 2.1 of the paper)."""


@dataclasses.dataclass(frozen=True)
class PathGaussians:
    r"""Normal laws :math:`N(\mu, A A^\top)` with :math:`A = D^{1/2} (I + Q (L - I) Q^\top)`.

    ``D`` is diagonal, the columns of ``Q`` are orthonormal, and ``L`` is a small lower triangular matrix, so a draw and
    its density cost ``O(dim rank)``.

    Attributes:
        mean: ``(law, dim)``.
        diagonal: Diagonal of ``D``, ``(law, dim)``.
        basis: ``Q``, ``(law, dim, rank)``.
        inner: ``L``, ``(law, rank, rank)``.
    """

    mean: Tensor
    diagonal: Tensor
    basis: Tensor
    inner: Tensor

    def __len__(self) -> int:
        """Number of laws."""
        return self.mean.shape[0]

    def __getitem__(self, which: slice | list[int] | Tensor) -> PathGaussians:
        """Return some of the laws."""
        return PathGaussians(self.mean[which], self.diagonal[which], self.basis[which], self.inner[which])

    @classmethod
    def joined(cls, parts: list[PathGaussians]) -> PathGaussians:
        """Return the laws of several, which must be of one rank."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))

    def draw(self, noise: Tensor) -> Tensor:
        """Map standard normal noise ``(draw, dim)`` or ``(law, draw, dim)`` to draws ``(law, draw, dim)``."""
        along = noise @ self.basis
        moved = noise + (along @ self.inner.mT - along) @ self.basis.mT
        return self.mean[:, None] + self.diagonal.sqrt()[:, None] * moved

    def _log_det(self) -> Tensor:
        """Log determinant of ``A``."""
        return 0.5 * self.diagonal.log().sum(-1) + self.inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of every law at points ``(point, dim)``, ``(law, point)``."""
        r = (z - self.mean[:, None]) * self.diagonal.rsqrt()[:, None]
        along = r @ self.basis
        solved = torch.linalg.solve_triangular(self.inner, along.mT, upper=False).mT
        square = r.square().sum(-1) - along.square().sum(-1) + solved.square().sum(-1)
        out: Tensor = -0.5 * square - self._log_det()[:, None] - 0.5 * z.shape[-1] * math.log(2 * math.pi)
        return out

    def log_prob_of_draws(self, noise: Tensor) -> Tensor:
        """Log density of the draws made from noise, by their own law, ``(law, draw)``."""
        square = noise.square().sum(-1)
        return -0.5 * square - self._log_det()[:, None] - 0.5 * noise.shape[-1] * math.log(2 * math.pi)

    def factor(self, law: int) -> Tensor:
        """Lower-triangular factor of the covariance of one law, ``(dim, dim)``."""
        basis, inner = self.basis[law], self.inner[law]
        eye = torch.eye(basis.shape[0], dtype=basis.dtype)
        square = self.diagonal[law].sqrt()[:, None] * (
            eye + basis @ (inner - torch.eye(len(inner), dtype=inner.dtype)) @ basis.mT
        )
        # A = R^T Q^T, so A A^T = R^T R: no covariance is formed, and none of its digits are lost
        upper = torch.linalg.qr(square.mT).R
        lower: Tensor = (upper * upper.diagonal().sign()[:, None]).mT
        return lower

    def conditional_sd(self, law: int) -> Tensor:
        """Sd of each coordinate given all others, ``diag(precision) ** -0.5``, ``(dim,)``."""
        basis, inner = self.basis[law], self.inner[law]
        inverse = torch.cholesky_inverse(inner) - torch.eye(len(inner), dtype=inner.dtype)
        share = 1 + ((basis @ inverse) * basis).sum(-1)
        return (self.diagonal[law] / share).sqrt()


def _next_diagonal(diagonal: np.ndarray, step: np.ndarray, change: np.ndarray, product: float) -> np.ndarray:
    """Update the diagonal inverse-Hessian estimate (Gilbert and Lemaréchal 1989; the paper's section 2.1)."""
    a = float(change @ (diagonal * change))
    c = float(step @ (step / diagonal))
    inverse = a / (product * diagonal) + change**2 / product - a * step**2 / (product * c * diagonal**2)
    updated = 1 / inverse
    usable = bool(np.isfinite(updated).all() and (updated > 0).all())
    return updated if usable else diagonal


def path_gaussians(points: np.ndarray, gradients: np.ndarray, history: int) -> tuple[PathGaussians, np.ndarray]:
    r"""Gaussians at the points of one path.

    At each point the inverse Hessian of :math:`f = -\log p` is estimated from the last ``history`` differences of
    points :math:`S` and gradients :math:`Z` in the compact form of Byrd, Nocedal and Schnabel (1994),

    .. math:: \Sigma = \mathrm{diag}(\alpha) + \beta \gamma \beta^\top, \qquad
        \beta = [\mathrm{diag}(\alpha) Z, S], \qquad
        \gamma = \begin{pmatrix} 0 & -R^{-1} \\ -R^{-\top} & R^{-\top} (E + Z^\top \mathrm{diag}(\alpha) Z) R^{-1}
        \end{pmatrix}

    with :math:`R` the upper triangle of :math:`S^\top Z` and :math:`E` its diagonal; the mean is the point moved by one
    quasi-Newton step, :math:`x - \Sigma \nabla f`.

    Args:
        points: ``(point, dim)``, in the order in which they were accepted.
        gradients: Gradients of ``f`` there, ``(point, dim)``.
        history: Number of pairs of differences that count.

    Returns:
        The laws that are positive definite, and the positions of their points.

    Example:
        >>> x = np.array([[2.0, 2.0], [1.0, -0.5], [0.2, 0.1], [0.0, 0.0]])
        >>> laws, _ = path_gaussians(x, x * np.array([1.0, 4.0]), history=6)  # sds 1 and 1/2
        >>> [round(v, 6) for v in laws.factor(len(laws) - 1).diagonal().tolist()]
        [1.0, 0.5]
    """
    count, dim = points.shape
    diagonal = np.ones(dim)
    diagonals = np.ones((count, dim))
    # pairs that are missing are columns of zeros with a unit diagonal in R: they change nothing
    steps, changes = np.zeros((count, dim, history)), np.zeros((count, dim, history))
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for i in range(1, count):
        step, change = points[i] - points[i - 1], gradients[i] - gradients[i - 1]
        product = float(step @ change)
        if product > _CURVATURE * float(change @ change) and product > 0:
            diagonal = _next_diagonal(diagonal, step, change, product)
            held = [*held, (step, change)][-history:]
        diagonals[i] = diagonal
        for j, (s, z) in enumerate(held):
            steps[i, :, j], changes[i, :, j] = s, z
    return _assemble(*(torch.from_numpy(a) for a in (points, gradients, diagonals, steps, changes)))


def _assemble(
    x: Tensor, gradient: Tensor, diagonal: Tensor, steps: Tensor, changes: Tensor
) -> tuple[PathGaussians, np.ndarray]:
    products = steps.mT @ changes
    lengths = products.diagonal(dim1=-2, dim2=-1)
    missing = torch.diag_embed((lengths == 0).to(x))
    upper = products.triu() + missing
    scaled = diagonal[..., None] * changes
    eye = torch.eye(steps.shape[-1], dtype=x.dtype).expand_as(products)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    corner = inverse.mT @ (torch.diag_embed(lengths) + changes.mT @ scaled) @ inverse
    gamma = torch.cat([torch.cat([torch.zeros_like(inverse), -inverse], -1), torch.cat([-inverse.mT, corner], -1)], -2)
    beta = torch.cat([scaled, steps], -1)
    basis, triangle = torch.linalg.qr(beta * diagonal.rsqrt()[..., None])
    middle = triangle @ gamma @ triangle.mT
    middle = torch.eye(middle.shape[-1], dtype=x.dtype) + 0.5 * (middle + middle.mT)
    inner, info = torch.linalg.cholesky_ex(middle)
    newton = diagonal * gradient + (beta @ (gamma @ (beta.mT @ gradient[..., None])))[..., 0]
    mean = x - newton
    good = (info == 0) & torch.isfinite(mean).all(-1) & torch.isfinite(inner).flatten(1).all(-1)
    good &= torch.isfinite(basis).flatten(1).all(-1) & (inner.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    return PathGaussians(mean, diagonal, basis, inner)[good], good.nonzero()[:, 0].numpy()
