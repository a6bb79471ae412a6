"""Gaussian approximations to start a fit from: at the mode, or by mean field on a few fixed draws.

Everything here sees a log density as a function ``(n, dim) -> (n,)`` of a whole batch of points, so user code that
cannot be vmapped serves as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from vifamily.errors import ModelError

__all__ = [
    "GaussianStart",
    "best_start",
    "laplace",
    "mean_field_fixed_draws",
    "negative_curvature",
    "value_and_gradient",
]

LogDensity = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class GaussianStart:
    """A Gaussian to start from.

    Attributes:
        mean: ``(dim,)``.
        scale: ``(dim,)`` standard deviations or ``(dim, dim)`` lower-triangular factor of the covariance.
        elbo: Evidence lower bound of this Gaussian, estimated on fixed draws.
        method: How it was found.
    """

    mean: Tensor
    scale: Tensor
    elbo: float
    method: str


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
    steps = torch.as_tensor(step, dtype=x.dtype).expand(x.shape[0])
    offsets = torch.diag(steps)
    _, gradient = value_and_gradient(log_density, torch.cat([x + offsets, x - offsets]))
    up, down = gradient.chunk(2)
    hessian = -(up - down) / (2 * steps.unsqueeze(-1))
    return 0.5 * (hessian + hessian.T)


def _factor(precision: Tensor) -> Tensor | None:
    """Lower-triangular factor of the inverse of a precision matrix, or None when it is not safely positive definite."""
    diagonal = precision.diagonal()
    if not bool(torch.isfinite(precision).all()) or bool((diagonal <= 0).any()):
        return None
    unit = diagonal.rsqrt()
    scaled = unit.unsqueeze(-1) * precision * unit
    if float(torch.linalg.eigvalsh(scaled)[0]) < 1e-9:
        return None
    covariance = torch.linalg.inv(scaled) * unit.unsqueeze(-1) * unit
    factor, info = torch.linalg.cholesky_ex(0.5 * (covariance + covariance.T))
    return None if int(info) else factor


def laplace(log_density: LogDensity, start: Tensor, *, iterations: int = 300) -> tuple[Tensor, Tensor] | None:
    """Mode and covariance factor of the Laplace approximation.

    L-BFGS from the start point, then Newton steps until the Newton decrement is below 1e-5 (half its square is the
    log density still to be gained).

    Args:
        log_density: ``(n, dim) -> (n,)``.
        start: ``(dim,)``.
        iterations: Bound on L-BFGS iterations.

    Returns:
        Mode ``(dim,)`` and lower-triangular factor ``(dim, dim)``, or None where the mode is degenerate (no
        positive definite curvature, or no convergence).
    """

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_gradient(
            log_density, torch.as_tensor(x, dtype=start.dtype, device=start.device).unsqueeze(0)
        )
        return -float(value), -gradient[0].cpu().double().numpy()

    best = _minimise(fun, start.detach().cpu().double().numpy(), iterations)
    x = torch.as_tensor(best, dtype=start.dtype, device=start.device)
    steps: Tensor | float = 1e-4
    for _ in range(20):
        factor = _factor(negative_curvature(log_density, x, steps))
        if factor is None:
            return None
        value, gradient = value_and_gradient(log_density, x.unsqueeze(0))
        whitened = factor.T @ gradient[0]
        decrement = float(whitened.norm())
        if not np.isfinite(decrement):
            return None
        # differences at a hundredth of each posterior sd: right for any units of the parameters
        steps = 1e-2 * factor.norm(dim=-1)
        if decrement < 1e-5:
            return x, factor
        move = factor @ whitened
        lengths = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.01], dtype=x.dtype, device=x.device).unsqueeze(-1)
        values, _ = value_and_gradient(log_density, x + lengths * move)
        values = torch.where(torch.isfinite(values), values, torch.full_like(values, -torch.inf))
        if float(values.max()) < float(value):
            # no step gains: at the rounding floor, which is convergence unless far from a stationary point
            return (x, factor) if decrement < 1e-2 else None
        x = x + lengths[int(values.argmax())] * move
    return None


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


def _elbo(log_density: LogDensity, mean: Tensor, scale: Tensor, noise: Tensor) -> float:
    deviation = noise * scale if scale.dim() == 1 else noise @ scale.T
    with torch.no_grad():
        values = log_density(mean + deviation)
    diagonal = scale if scale.dim() == 1 else scale.diagonal()
    elbo = float(values.mean() + diagonal.abs().log().sum() + 0.5 * mean.shape[0] * (1 + np.log(2 * np.pi)))
    return elbo if np.isfinite(elbo) else -np.inf


def _averaged_curvature(log_density: LogDensity, mean: Tensor, sd: Tensor, noise: Tensor) -> Tensor | None:
    curvatures = [negative_curvature(log_density, mean + sd * row, 1e-2 * sd) for row in noise]
    return _factor(torch.stack(curvatures).mean(0))


def best_start(
    log_density: LogDensity, start: Tensor, *, generator: torch.Generator, full: bool = True, longest_hessian: int = 300
) -> GaussianStart | None:
    """Return the Gaussian with the best evidence lower bound among a few cheap ones.

    The candidates are the Laplace approximation; mean field on 16, then 64 fixed antithetic draws; and the Gaussian
    around the mean-field one whose precision is the curvature averaged over it (what the best full-rank Gaussian's
    precision equals at its own optimum). The Laplace one is exact for Gaussians and useless at a degenerate mode, such
    as a funnel's; the others survive that.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        start: ``(dim,)``.
        generator: Randomness of the fixed draws.
        full: Whether a full covariance may be returned; otherwise per-coordinate sds.
        longest_hessian: Above this dimension no Hessian is formed.

    Returns:
        The start, or None when no candidate has a finite bound.
    """
    dim = start.shape[0]
    half = torch.randn(32, dim, generator=generator, dtype=torch.float64).to(start)
    noise = torch.cat([half, -half])
    candidates: list[tuple[str, Tensor, Tensor]] = []
    # the raw start as well as the mode: a degenerate mode is a place that mean field does not come back from
    origins = [(start, torch.full_like(start, -1.0))]
    at_mode = laplace(log_density, start) if dim <= longest_hessian else None
    if at_mode is not None:
        mode, factor = at_mode
        conditional = torch.cholesky_inverse(factor).diagonal().rsqrt()
        candidates.append(("laplace", mode, factor if full else conditional))
        origins.append((mode, conditional.log()))
    for first, log_sd in origins:
        mean, log_sd = mean_field_fixed_draws(log_density, first, log_sd, torch.cat([half[:8], -half[:8]]))
        mean, log_sd = mean_field_fixed_draws(log_density, mean, log_sd, noise, iterations=100)
        sd = log_sd.exp()
        candidates.append(("mean field on fixed draws", mean, sd))
        averaged = _averaged_curvature(log_density, mean, sd, noise[::8]) if full and dim <= longest_hessian else None
        if averaged is not None:
            candidates.append(("averaged curvature", mean, averaged))
    scored = [GaussianStart(m, s, _elbo(log_density, m, s, noise), method) for method, m, s in candidates]
    best = max(scored, key=lambda c: c.elbo)
    return best if np.isfinite(best.elbo) else None
