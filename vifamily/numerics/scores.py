"""Scores of log densities that can themselves be differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vifamily.errors import ModelError

__all__ = ["score"]


def score(log_density: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Gradient of a log density at points, part of the graph of the points and of the density's parameters.

    Where the points carry a gradient the result is differentiable in them and in whatever else the density depends on
    (a derivative of the score is a second derivative of the density). Where they do not, or gradients are switched
    off, it is a plain number.

    Args:
        log_density: ``(..., dim) -> (...)``, a function of each point alone.
        z: ``(..., dim)``.

    Returns:
        ``(..., dim)``.

    Raises:
        ModelError: If the density does not depend on its points as far as torch can tell.

    Example:
        >>> z = torch.tensor([[2.0]], requires_grad=True)
        >>> s = score(lambda x: -x.pow(4).sum(-1), z)
        >>> s.item(), torch.autograd.grad(s.sum(), z)[0].item()
        (-32.0, -48.0)
    """
    follow = z.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        point = z if follow else z.detach().requires_grad_()
        value = log_density(point)
        if not value.requires_grad:
            raise ModelError(
                "the log density gives no gradient with respect to its points: compute it with torch operations "
                "throughout, without detach(), item() or numpy."
            )
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=follow, allow_unused=True)
    if gradient is None:
        raise ModelError("the log density gives no gradient with respect to its points: it does not depend on them.")
    return gradient if follow else gradient.detach()
