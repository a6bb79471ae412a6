"""Gaussian approximations to start from: at the mode, or by Newton's method on the bound from a few fixed draws.

Everything here sees a log density as a function ``(n, dim) -> (n,)`` of a whole batch of points, so user code that
cannot be vmapped serves as well. Starts of several restarts are found side by side, and those that end at the same
Gaussian are one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from vifamily.numerics.gaussian_newton import bounds, bounds_at, gaussian_newton
from vifamily.numerics.newton import Modes, newton_modes, tolerant, value_and_gradient

__all__ = [
    "GaussianStart",
    "best_start",
    "best_starts",
    "laplace",
    "mean_field_fixed_draws",
    "negative_curvature",
    "value_and_gradient",
]

LogDensity = Callable[[Tensor], Tensor]

_HEAVY = 3e8
"""Numbers touched by one evaluation of Hessians at eight draws (data times coordinates times points) above which
Hessians are formed once, at the mode, and never averaged."""
_GAUSSIAN = 1.0
"""Variance of the log weights on 64 draws below which the Laplace approximation is near enough to improve from; half
of it is about the Kullback-Leibler divergence."""
_FEW = 1e7
"""Numbers that one evaluation of Hessians may touch for the sake of further starting points."""
_SAME = 0.3
"""Distance of means (in sds) and of log sds below which two starts lie in one basin of the bound."""
_SPREADS = (1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3)


@dataclasses.dataclass(frozen=True)
class GaussianStart:
    """A Gaussian to start from.

    Attributes:
        mean: ``(dim,)``.
        scale: ``(dim,)`` standard deviations or ``(dim, dim)`` lower-triangular factor of the covariance.
        elbo: Evidence lower bound of this Gaussian, estimated on fixed draws.
        method: How it was found.
        covariance: Inverse of the averaged negative Hessian ``(dim, dim)``, which tells a factorised family how its
            means depend on one another; None where no Hessian was formed.
    """

    mean: Tensor
    scale: Tensor
    elbo: float
    method: str
    covariance: Tensor | None = None


def _minimise(fun: Callable[[np.ndarray], tuple[float, np.ndarray]], x0: np.ndarray, iterations: int) -> np.ndarray:
    """L-BFGS that treats a non-finite value as a wall and always returns the best finite point seen."""
    lowest, at = np.inf, x0

    def guarded(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal lowest, at
        value, gradient = fun(x)
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            # a finite wall: the line search backs off from it, and an infinite one would end the run
            return (abs(lowest) + 1.0) * 1e3 if np.isfinite(lowest) else 1e12, np.zeros_like(x)
        if value < lowest:
            lowest, at = value, x.copy()
        return value, gradient

    options = {"maxiter": iterations, "maxcor": 20, "maxls": 30}
    scipy.optimize.minimize(guarded, x0, jac=True, method="L-BFGS-B", options=options)
    return at


def negative_curvature(log_density: LogDensity, x: Tensor, step: Tensor | float = 1e-4) -> Tensor:
    """Negative Hessian by central differences of gradients, all points in one batch.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        x: ``(dim,)``.
        step: Step per coordinate.

    Returns:
        Symmetric ``(dim, dim)``, accurate to about the square of the step.

    Example:
        >>> h = negative_curvature(lambda z: -0.5 * 4.0 * (z**2).sum(-1), torch.zeros(2, dtype=torch.float64))
        >>> [round(float(v), 6) for v in h.diagonal()]
        [4.0, 4.0]
    """
    steps = torch.as_tensor(step, dtype=x.dtype, device=x.device).expand(x.shape[0])
    offsets = torch.diag(steps)
    _, gradient = value_and_gradient(log_density, torch.cat([x + offsets, x - offsets]))
    up, down = gradient.chunk(2)
    hessian = -(up - down) / (2 * steps.unsqueeze(-1))
    return 0.5 * (hessian + hessian.T)


def laplace(log_density: LogDensity, start: Tensor, *, iterations: int = 300) -> tuple[Tensor, Tensor] | None:
    """Mode and covariance factor of the Laplace approximation.

    Newton's method from the start point, and where it does not arrive, L-BFGS with Newton steps at the end. A mode is
    reached when the squared Newton decrement is below 1e-10 (half of it is the log density still to be gained).

    Args:
        log_density: ``(n, dim) -> (n,)``.
        start: ``(dim,)``.
        iterations: Bound on L-BFGS iterations.

    Returns:
        Mode ``(dim,)`` and lower-triangular factor ``(dim, dim)``, or None where the mode is degenerate (no
        positive definite curvature, or no convergence).
    """
    value_and_gradient(log_density, start[None])
    log_density = tolerant(log_density)
    modes = newton_modes(log_density, start[None])
    if not bool(modes.found):
        modes = newton_modes(log_density, _climb(log_density, start, iterations)[None], iterations=20)
    return (modes.point[0], modes.factor[0]) if bool(modes.found) else None


def _climb(log_density: LogDensity, start: Tensor, iterations: int) -> Tensor:
    """Highest point that L-BFGS comes to."""

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_gradient(
            log_density, torch.as_tensor(x, dtype=start.dtype, device=start.device).unsqueeze(0)
        )
        return -float(value), -gradient[0].cpu().double().numpy()

    best = _minimise(fun, start.detach().cpu().double().numpy(), iterations)
    return torch.as_tensor(best, dtype=start.dtype, device=start.device)


def mean_field_fixed_draws(
    log_density: LogDensity, start: Tensor, log_sd: Tensor, noise: Tensor, *, iterations: int = 200
) -> tuple[Tensor, Tensor]:
    """Mean-field Gaussian by deterministic optimisation on fixed draws (Giordano, Ingram and Broderick 2024).

    Minimises ``-mean_s log p(m + exp(r) e_s) - sum r`` over ``(m, r)`` with L-BFGS.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        start: Starting mean, ``(dim,)``.
        log_sd: Starting log standard deviations, ``(dim,)``.
        noise: Fixed draws ``(n, dim)``, best antithetic.
        iterations: Bound on L-BFGS iterations.

    Returns:
        Mean and log standard deviations, each ``(dim,)``.
    """
    dim = start.shape[0]

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        both = torch.as_tensor(x, dtype=start.dtype, device=start.device)
        mean, log_scale = both[:dim], both[dim:]
        deviation = log_scale.exp() * noise
        value, gradient = value_and_gradient(log_density, mean + deviation)
        loss = -value.mean() - log_scale.sum()
        slopes = torch.cat([-gradient.mean(0), -(gradient * deviation).mean(0) - 1])
        return float(loss), slopes.cpu().double().numpy()

    x0 = torch.cat([start, log_sd]).detach().cpu().double().numpy()
    out = torch.as_tensor(_minimise(fun, x0, iterations), dtype=start.dtype, device=start.device)
    return out[:dim], out[dim:]


def best_start(
    log_density: LogDensity, start: Tensor, *, generator: torch.Generator, full: bool = True, work: float = 0.0,
    longest_hessian: int = 300,
) -> GaussianStart | None:  # fmt: skip
    """:func:`best_starts` from one point.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        start: ``(dim,)``.
        generator: Randomness of the fixed draws.
        full: Whether a full covariance may be returned; otherwise per-coordinate sds.
        work: Numbers touched by one evaluation at one point (data times coordinates).
        longest_hessian: Above this dimension no Hessian is formed.

    Returns:
        The start, or None when no candidate has a finite bound.
    """
    return best_starts(log_density, start[None], generator=generator, full=full, work=work,
                       longest_hessian=longest_hessian)[0][0]  # fmt: skip


def best_starts(
    log_density: LogDensity, starts: Tensor, *, generator: torch.Generator, full: bool = True, work: float = 0.0,
    longest_hessian: int = 300, others: Tensor | None = None,
) -> tuple[list[GaussianStart | None], list[int]]:  # fmt: skip
    """Gaussians with a high evidence lower bound, from several points side by side.

    The mode and its curvature (Laplace) come first. Where the log weights on 64 draws show that the posterior is
    nearly Gaussian there, Newton's method on the bound (:func:`~vifamily.numerics.gaussian_newton.gaussian_newton`, 16
    draws) polishes it; elsewhere, as at the degenerate mode of a funnel, the same method also begins at the raw start,
    first with independent coordinates, and the better bound wins. Rows that meet at one mode or at one Gaussian are
    one from there on. Where the density has several modes, the first row takes the best of those that ``others`` lead
    to as well.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        starts: ``(row, dim)``.
        generator: Randomness of the fixed draws.
        full: Whether full covariances may be returned; otherwise per-coordinate sds.
        work: Numbers touched by one evaluation at one point (data times coordinates). Where Hessians at several draws
            would touch too many, only the one at the mode is formed.
        longest_hessian: Above this dimension no Hessian is formed.
        others: Further points ``(other, dim)`` from which modes are looked for on behalf of the first row; as many are
            used as touch few numbers.

    Returns:
        The distinct starts, None for one without a finite bound; and for each row which of them is its own.
    """
    rows, dim = starts.shape
    # a model that fails where it starts fails for a reason that should be seen
    value_and_gradient(log_density, starts[:1])
    log_density = tolerant(log_density)
    half = torch.randn(32, dim, generator=generator, dtype=torch.float64).to(starts)
    noise = torch.stack([half, -half], dim=1).reshape(-1, dim)
    if dim > longest_hessian:
        found = [_without_hessian(log_density, start, noise) for start in starts]
        return found, list(range(rows))
    touched = max(work, dim) * (2 * dim + 1)
    heavy = touched * 8 > _HEAVY
    if others is not None and not heavy:
        starts = torch.cat([starts, others[: max(int(_FEW / touched) - rows, 0)]])
    modes = _modes(log_density, starts, heavy=heavy)
    which, first = _same_mode(modes)
    point, factor, has = modes.point[first], modes.factor[first], modes.found[first]
    near = has & (_log_weight_variance(log_density, point, factor, noise, has) < _GAUSSIAN)
    out: list[GaussianStart | None] = [None] * len(first)
    if bool(has.any()):
        _keep(out, has, _at_modes(log_density, point[has], factor[has], noise, full=full, heavy=heavy))
    # the other points serve by the modes they lead to
    raw = ~near & (first < rows)
    if bool(raw.any()) and not heavy:
        _keep(out, raw, _from_raw(log_density, starts[first][raw], noise, full=full))
    for row in torch.arange(len(first))[raw.cpu()].tolist() if heavy else ():
        _keep(out, torch.arange(len(first)) == row, [_without_hessian(log_density, starts[first][row], noise)])
    out, which = _same_start(out, which)
    return _best_for_first(out, which, rows)


def _best_for_first(
    found: list[GaussianStart | None], which: list[int], rows: int
) -> tuple[list[GaussianStart | None], list[int]]:
    """Give the first row the best of its own start and those of the rows beyond ``rows``, and drop what is not used."""

    def bound(place: int) -> float:
        start = found[place]
        return -np.inf if start is None else start.elbo

    which = [max([which[0], *which[rows:]], key=bound), *which[1:rows]]
    used = list(dict.fromkeys(which))
    return [found[place] for place in used], [used.index(place) for place in which]


def _keep(out: list[GaussianStart | None], rows: Tensor, found: list[GaussianStart | None]) -> None:
    """Put what was found for some rows in place where it is better than what is there."""
    for row, start in zip(torch.arange(len(out))[rows.cpu()].tolist(), found, strict=True):
        held = out[row]
        if start is not None and (held is None or start.elbo > held.elbo):
            out[row] = start


def _modes(log_density: LogDensity, starts: Tensor, *, heavy: bool) -> Modes:
    if not heavy:
        return newton_modes(log_density, starts)
    climbed = torch.stack([_climb(log_density, start, 200) for start in starts])
    return newton_modes(log_density, climbed, iterations=6)


def _same_mode(modes: Modes) -> tuple[list[int], Tensor]:
    """For each row its group, and the first row of each group; rows that are not at a mode stay apart."""
    which: list[int] = []
    first: list[int] = []
    for row in range(len(modes.point)):
        for group, other in enumerate(first):
            if bool(modes.found[row]) and bool(modes.found[other]):
                apart = torch.linalg.solve_triangular(
                    modes.factor[other], (modes.point[row] - modes.point[other])[:, None], upper=False
                )
                if float(apart.abs().max()) < 1e-3:
                    which.append(group)
                    break
        else:
            which.append(len(first))
            first.append(row)
    return which, torch.tensor(first, device=modes.point.device)


def _same_start(found: list[GaussianStart | None], which: list[int]) -> tuple[list[GaussianStart | None], list[int]]:
    """Make one of the starts that are nearly the same Gaussian."""
    distinct: list[GaussianStart | None] = []
    place = []
    for start in found:
        for index, other in enumerate(distinct):
            if start is not None and other is not None and _alike(start, other):
                place.append(index)
                if start.elbo > other.elbo:
                    distinct[index] = start
                break
        else:
            place.append(len(distinct))
            distinct.append(start)
    return distinct, [place[group] for group in which]


def _alike(a: GaussianStart, b: GaussianStart) -> bool:
    one, other = (s.scale if s.scale.dim() == 1 else s.scale.norm(dim=-1) for s in (a, b))
    return float(((a.mean - b.mean) / other).abs().max()) < _SAME and float((one / other).log().abs().max()) < _SAME


def _log_weight_variance(log_density: LogDensity, point: Tensor, factor: Tensor, noise: Tensor, has: Tensor) -> Tensor:
    """Variance of the log weights of the Laplace approximations; infinity where there is none."""
    out = torch.full_like(point[:, 0], torch.inf)
    if bool(has.any()):
        z = point[has][:, None] + noise @ factor[has].mT
        with torch.no_grad():
            value = log_density(z.reshape(-1, z.shape[-1])).reshape(z.shape[:2])
        variance = (value + 0.5 * noise.square().sum(-1)).var(1)
        out[has] = torch.where(torch.isfinite(variance), variance, torch.full_like(variance, torch.inf))
    return out


def _at_modes(
    log_density: LogDensity, point: Tensor, factor: Tensor, noise: Tensor, *, full: bool, heavy: bool
) -> list[GaussianStart | None]:
    hessian = torch.cholesky_inverse(factor)
    root = factor if full else torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1).rsqrt())
    at_mode = bounds(log_density, point, root, noise)
    if heavy:
        return _pack(point, root, hessian, at_mode, "laplace", full=full)
    mean, better, averaged = gaussian_newton(log_density, point, root, noise[:16], full=full)
    improved = bounds(log_density, mean, better, noise)
    # on other draws than those it was found on the polished one may be the worse
    wins = improved > at_mode
    mean = torch.where(wins[:, None], mean, point)
    root = torch.where(wins[:, None, None], better, root)
    hessian = torch.where(wins[:, None, None], averaged, hessian)
    packed = _pack(mean, root, hessian, torch.maximum(improved, at_mode), "newton from the mode", full=full)
    plain = _pack(mean, root, hessian, at_mode, "laplace", full=full)
    return [a if w else b for a, b, w in zip(packed, plain, wins.tolist(), strict=True)]


def _from_raw(log_density: LogDensity, starts: Tensor, noise: Tensor, *, full: bool) -> list[GaussianStart | None]:
    rows, dim = starts.shape
    spread = starts.new_tensor(_SPREADS)
    roots = (spread[:, None, None] * torch.eye(dim, dtype=starts.dtype, device=starts.device)).expand(rows, -1, -1, -1)
    few = noise[:16]
    widest = bounds_at(log_density, starts[:, None].expand(-1, len(spread), -1), roots, few).argmax(1)
    root = roots[torch.arange(rows, device=starts.device), widest]
    mean, root, hessian = gaussian_newton(log_density, starts, root, few, full=False)
    method = "newton from the start"
    if full:
        mean, root, hessian = gaussian_newton(log_density, mean, root, few, full=True)
    return _pack(mean, root, hessian, bounds(log_density, mean, root, noise), method, full=full)


def _pack(
    mean: Tensor, root: Tensor, hessian: Tensor, elbo: Tensor, method: str, *, full: bool
) -> list[GaussianStart | None]:
    out: list[GaussianStart | None] = []
    for row in range(len(mean)):
        value = float(elbo[row])
        scale = _lower(root[row]) if full else root[row].diagonal().clone()
        fine = np.isfinite(value) and bool(torch.isfinite(scale).all())
        start = GaussianStart(mean[row], scale, value, method, _inverse(hessian[row]))
        out.append(start if fine else None)
    return out


def _lower(root: Tensor) -> Tensor:
    """Lower-triangular factor with a positive diagonal of ``root root^T``, without squaring it."""
    upper = torch.linalg.qr(root.mT)[1]
    out: Tensor = (upper * upper.diagonal().sign()[:, None]).mT
    return out


def _inverse(hessian: Tensor) -> Tensor | None:
    """Inverse of a symmetric matrix with its eigenvalues made positive, in coordinates scaled by its diagonal."""
    diagonal = hessian.diagonal().abs()
    if not bool(torch.isfinite(hessian).all()) or not bool((diagonal > 0).all()):
        return None
    unit = diagonal.rsqrt()
    values, vectors = torch.linalg.eigh(unit[:, None] * hessian * unit)
    inverse: Tensor = (vectors / values.abs().clamp_min(1e-6)) @ vectors.mT
    return unit[:, None] * inverse * unit


def _without_hessian(log_density: LogDensity, start: Tensor, noise: Tensor) -> GaussianStart | None:
    """Mean field on 16, then on all fixed draws, by L-BFGS: for more coordinates than a Hessian is formed for."""
    # mirror images stay in pairs
    mean, log_sd = mean_field_fixed_draws(log_density, start, torch.full_like(start, -1.0), noise[:16])
    mean, log_sd = mean_field_fixed_draws(log_density, mean, log_sd, noise, iterations=100)
    with torch.no_grad():
        value = float(log_density(mean + log_sd.exp() * noise).mean() + log_sd.sum())
    elbo = value + 0.5 * start.shape[0] * (1 + float(np.log(2 * np.pi)))
    return GaussianStart(mean, log_sd.exp(), elbo, "mean field on fixed draws") if np.isfinite(elbo) else None
