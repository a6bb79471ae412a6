"""Gaussian approximations by Newton's method on the evidence lower bound itself, several side by side.

The derivatives of the bound of a Gaussian ``N(m, S)`` are averages over it (Bonnet and Price; Opper and Archambeau
2009): the gradient in the mean is the mean gradient of the log density, and the bound is stationary in the covariance
where the precision equals the mean negative Hessian. Replacing the precision by that average and stepping the mean
with it is a natural-gradient step of length one, which is exact in one step for a Gaussian target.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vifamily.numerics.newton import value_and_gradient

__all__ = ["bounds", "gaussian_newton"]

LogDensity = Callable[[Tensor], Tensor]

_ITERATIONS = 60
_ENOUGH = 0.001
"""Gain of the bound, in nats, below which a further iteration is not worth its evaluations."""
_LEAST, _MOST = 0.04, 25.0
"""Bounds on the factor by which one iteration may change a precision."""
_LENGTHS = (1.0, 0.5, 0.2, 0.05, 0.01)
_HESSIANS = 8


def bounds(log_density: LogDensity, mean: Tensor, root: Tensor, noise: Tensor) -> Tensor:
    """Evidence lower bounds of Gaussians on fixed draws.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        mean: ``(row, dim)``.
        root: Square roots of the covariances, ``(row, dim, dim)``; any with ``root root^T`` the covariance.
        noise: Fixed standard normal draws ``(draw, dim)``.

    Returns:
        ``(row,)``; minus infinity where the log density is not finite.
    """
    z = mean[:, None] + noise @ root.mT
    with torch.no_grad():
        value = log_density(z.reshape(-1, z.shape[-1])).reshape(z.shape[:2]).mean(1)
    entropy = torch.linalg.slogdet(root)[1] + 0.5 * mean.shape[-1] * (1 + math.log(2 * math.pi))
    bound = value + entropy
    return torch.where(torch.isfinite(bound), bound, torch.full_like(bound, -torch.inf))


def gaussian_newton(
    log_density: LogDensity, mean: Tensor, root: Tensor, noise: Tensor, *, full: bool, iterations: int = _ITERATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """Improve Gaussians by natural-gradient steps with averaged Hessians and a line search on the bound.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        mean: Starting means, ``(row, dim)``.
        root: Starting square roots of covariances, ``(row, dim, dim)``; diagonal where not ``full``.
        noise: Fixed draws ``(draw, dim)``, best antithetic with the mirror images next to their originals.
        full: Whether covariances may be full; otherwise they stay diagonal, and the mean still takes full Newton
            steps.
        iterations: Bound on iterations.

    Returns:
        Means, square roots, and the average negative Hessians ``(row, dim, dim)`` seen last. A row whose log density
        is not finite at the start stays as it is.

    Example:
        >>> normal = lambda z: -0.5 * (3.0 * z.square().sum(-1) + 4.0 * z.prod(-1))
        >>> noise = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> start = torch.ones(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None]
        >>> _, root, _ = gaussian_newton(normal, *start, noise, full=True)
        >>> [round(v, 6) for v in torch.linalg.inv(root @ root.mT)[0].flatten().tolist()]
        [3.0, 2.0, 2.0, 3.0]
    """
    mean, root = mean.clone(), root.clone()
    bound = bounds_at(log_density, mean[:, None], root[:, None], noise)[:, 0]
    hessian = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device).expand_as(root).clone()
    active = torch.arange(len(mean), device=mean.device)[torch.isfinite(bound)]
    for _ in range(iterations):
        if len(active) == 0:
            break
        slope, curvature = _averages(log_density, mean[active], root[active], noise)
        usable = torch.isfinite(slope).all(-1) & torch.isfinite(curvature).all(-1).all(-1)
        active, slope, curvature = active[usable], slope[usable], curvature[usable]
        if len(active) == 0:
            break
        hessian[active] = curvature
        propose = _full_steps if full else _diagonal_steps
        means, roots = propose(mean[active], root[active], slope, curvature)
        found = bounds_at(log_density, means, roots, noise)
        best = found.argmax(1)
        rows = torch.arange(len(active), device=mean.device)
        gain = found[rows, best] - bound[active]
        better = gain > 0
        chosen = active[better]
        mean[chosen], root[chosen] = means[rows, best][better], roots[rows, best][better]
        bound[chosen] = found[rows, best][better]
        active = active[gain > _ENOUGH]
    return mean, root, hessian


def bounds_at(log_density: LogDensity, means: Tensor, roots: Tensor, noise: Tensor) -> Tensor:
    """Bounds of several candidates of each row, ``(row, candidate)``."""
    flat = bounds(log_density, means.flatten(0, 1), roots.flatten(0, 1), noise)
    return flat.reshape(means.shape[:2])


def _averages(log_density: LogDensity, mean: Tensor, root: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean gradient ``(row, dim)`` over all draws, and mean negative Hessian ``(row, dim, dim)`` over some."""
    rows, dim = mean.shape
    z = mean[:, None] + noise @ root.mT
    some = z[:, : min(_HESSIANS, len(noise))]
    steps = 1e-2 * root.norm(dim=-1)
    offsets = torch.diag_embed(steps)[:, None]
    moved = torch.cat([some[:, :, None] + offsets, some[:, :, None] - offsets], dim=2)
    points = torch.cat([z.reshape(-1, dim), moved.reshape(-1, dim)])
    gradient = value_and_gradient(log_density, points)[1]
    at_draws, beside = gradient[: z[..., 0].numel()], gradient[z[..., 0].numel() :]
    up, down = beside.reshape(rows, -1, 2, dim, dim).unbind(2)
    hessian = (-(up - down) / (2 * steps[:, None, :, None])).mean(1)
    return at_draws.reshape(rows, -1, dim).mean(1), 0.5 * (hessian + hessian.mT)


def _full_steps(mean: Tensor, root: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    whitened = root.mT @ curvature @ root
    values, vectors = torch.linalg.eigh(0.5 * (whitened + whitened.mT))
    values = values.abs().clamp(_LEAST, _MOST)
    length = slope.new_tensor(_LENGTHS)[:, None]
    precision = (1 - length) + length * values[:, None]
    along = (vectors.mT @ (root.mT @ slope[..., None]))[..., 0]
    moves = length * along[:, None] / precision @ vectors.mT
    # the symmetric root: with a step of no length every draw stays where it is
    change = vectors[:, None] * precision.rsqrt()[..., None, :] @ vectors.mT[:, None]
    return mean[:, None] + moves @ root.mT, root[:, None] @ change


def _diagonal_steps(mean: Tensor, root: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    sd = root.diagonal(dim1=-2, dim2=-1)
    scaled = sd[..., None] * curvature * sd[..., None, :]
    values, vectors = torch.linalg.eigh(0.5 * (scaled + scaled.mT))
    values = values.abs().clamp_min(1e-3 * _LEAST)
    along = (vectors.mT @ (sd * slope)[..., None])[..., 0] / values
    length = slope.new_tensor(_LENGTHS)[:, None]
    moves = length * (vectors @ along[..., None])[:, None, :, 0]
    own = scaled.diagonal(dim1=-2, dim2=-1).abs().clamp(_LEAST, _MOST)
    precision = (1 - length) + length * own[:, None]
    return mean[:, None] + sd[:, None] * moves, torch.diag_embed(sd[:, None] * precision.rsqrt())
