"""Covariances from how the fitted means answer to a small push: right where a factorised family's own are too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import NotAvailableError, VifamilyError
from vifamily.models._base import Model
from vifamily.rng import draw_noise, generator
from vifamily.types import Capability

__all__ = ["linear_response_covariance"]

_DENSE = 400
"""Parameters up to which the Hessian is formed; above, conjugate gradients solve for each mean."""
_ACCURACY = 1e-10


def linear_response_covariance(
    model: Model, family: Any, objective: Any, constrain: Callable[[Tensor], Tensor] | None, *,
    num_draws: int, seed: int,
) -> Tensor:  # fmt: skip
    r"""Linear-response covariance of a fit (Giordano, Broderick and Jordan 2018; Giordano, Ingram and Broderick 2024).

    If the log joint is tilted by :math:`t^\top\theta`, the exact posterior mean moves by :math:`\Sigma t`. The fitted
    mean :math:`\mu(\lambda)` moves with its optimum, by the implicit function theorem at the rate

    .. math:: \hat\Sigma = J H^{-1} J^\top, \qquad J = \partial\mu/\partial\lambda, \quad
              H = \partial^2 L/\partial\lambda^2,

    for the loss L on fixed draws.

    Args:
        model: The model; twice differentiable.
        family: The fitted family.
        objective: The objective it was fitted with; one whose gradient follows its value on fixed draws.
        constrain: ``(draw, dim) -> (draw, column)``, or None for the unconstrained coordinates.
        num_draws: Fixed draws.
        seed: Seed of the draws.

    Returns:
        ``(column, column)``.

    Raises:
        NotAvailableError: If something needed is missing, or the fit is not at a minimum.
    """
    loss, parameters = _fixed_loss(model, family, objective, num_draws, seed)
    kept = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)  # noqa: FBT003
        with torch.enable_grad():
            value, z = loss()
            mean = (z if constrain is None else constrain(z)).mean(0)
            try:
                gradient = _slope(value, parameters, create_graph=True)
            except RuntimeError as error:
                raise NotAvailableError(f"linear responses need second derivatives of the model: {error}.") from error
            jacobian = torch.stack([_slope(m, parameters) for m in mean]).detach()

            def product(vector: Tensor) -> Tensor:
                return _slope(gradient @ vector, parameters).detach()

            solve = _solve if gradient.numel() <= _DENSE else _conjugate_gradients
            solved = solve(product, torch.cat([jacobian, gradient.detach()[None]]))
            left = 0.5 * float(gradient.detach() @ solved[-1])
            if left > 0.05 + 2 * gradient.numel() / num_draws:
                raise NotAvailableError(
                    f"the fit is not at a minimum: a Newton step would still gain {left:.3g} nats. Fit to the end "
                    "(stop reason 'converged') first."
                )
    finally:
        for p, requires in zip(parameters, kept, strict=True):
            p.requires_grad_(requires)
    covariance = jacobian @ solved[:-1].T
    return 0.5 * (covariance + covariance.T)


def _fixed_loss(
    model: Model, family: Any, objective: Any, num_draws: int, seed: int
) -> tuple[Callable[[], tuple[Tensor, Tensor]], list[Tensor]]:
    what = "a linear-response covariance"
    missing = [str(c) for c in (Capability.REPARAMETERISED,) if c not in family.capabilities]
    missing += [str(c) for c in (Capability.SECOND_ORDER,) if c not in model.capabilities]
    if missing or Capability.LOCAL in model.capabilities:
        raise NotAvailableError(f"{what} needs {', '.join(missing) or 'a model without local latents'}.")
    if objective is None:
        raise NotAvailableError(f"{what} needs the objective of the fit, which this posterior does not hold.")
    try:
        plain = type(objective)() if getattr(objective, "estimator", None) else objective
        plain = plain.for_fixed_draws("lbfgs").resolve(model, family)
    except VifamilyError as error:
        raise NotAvailableError(
            f"{what} needs an objective that is a smooth function on fixed draws: {error}"
        ) from error
    if not plain.linear_in_draws or plain.renyi_order != 1:
        raise NotAvailableError(f"{what} needs an objective that is the reverse KL as a mean over draws, such as elbo.")
    options: dict[str, Any] = {"dtype": family.latent.dtype, "device": family.latent.device}
    half = draw_noise(family.noise_spec, (num_draws // 2,), generator(seed, "linear response"), **options)
    noise = torch.cat([half, -half if family.noise_spec.law == "normal" else 1 - half])

    def loss() -> tuple[Tensor, Tensor]:
        return plain.loss(family, model, noise).surrogate.sum(), family(noise).z

    return loss, list(family.parameters())


def _slope(value: Tensor, parameters: list[Tensor], *, create_graph: bool = False) -> Tensor:
    parts = torch.autograd.grad(value, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
    return torch.cat([g.reshape(-1) for g in filled])


def _solve(product: Callable[[Tensor], Tensor], jacobian: Tensor) -> Tensor:
    eye = torch.eye(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)
    hessian = torch.stack([product(row) for row in eye])
    factor, info = torch.linalg.cholesky_ex(0.5 * (hessian + hessian.T))
    if int(info):
        raise NotAvailableError(
            "the loss is not curved upwards at the fit in every direction, so the fit is not at a minimum: fit to the "
            "end (stop reason 'converged'), or ask for more num_draws."
        )
    return torch.cholesky_solve(jacobian.T, factor).T


def _conjugate_gradients(product: Callable[[Tensor], Tensor], jacobian: Tensor) -> Tensor:
    """Solve for each row of the Jacobian by products with the Hessian alone."""
    out = []
    for row in jacobian:
        x, residual = torch.zeros_like(row), row.clone()
        direction, size = residual.clone(), float(residual @ residual)
        goal = _ACCURACY * size
        for _ in range(4 * len(row)):
            if size <= goal:
                break
            moved = product(direction)
            curvature = float(direction @ moved)
            if not curvature > 0:
                raise NotAvailableError(
                    "the loss is not curved upwards at the fit in every direction, so the fit is not at a minimum."
                )
            x = x + size / curvature * direction
            residual = residual - size / curvature * moved
            before, size = size, float(residual @ residual)
            direction = residual + size / before * direction
        out.append(x)
    return torch.stack(out)
