"""A loss as a function of the outputs of a network: its gradient and its curvature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vifamily.errors import DataError, ShapeError

__all__ = ["OutputLoss", "curvature_of", "gradient_of", "values_of"]

OutputLoss = Callable[[Tensor], Tensor]
"""From outputs ``(N, q)`` to the loss of each input ``(N,)``; input ``i`` sees row ``i`` alone."""


def values_of(loss: OutputLoss, outputs: Tensor) -> Tensor:
    """Loss of each input, ``(N,)``.

    Raises:
        ShapeError: If the loss has another shape.
        DataError: If it is not finite.
    """
    found = loss(outputs)
    if not isinstance(found, torch.Tensor) or found.shape != outputs.shape[:1]:
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ShapeError(
            f"the loss must map outputs {tuple(outputs.shape)} to one number for each input, "
            f"{tuple(outputs.shape[:1])}, got {got}. Leave out the mean."
        )
    if not bool(found.isfinite().all()):
        raise DataError(
            "the loss is not finite at the outputs reached: they left its domain. Take a shorter time or a smaller "
            "step, or a link that keeps outputs inside."
        )
    return found


def gradient_of(loss: OutputLoss, outputs: Tensor) -> Tensor:
    """Gradient of each input's loss by its outputs, ``(N, q)``."""
    at = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(values_of(loss, at).sum(), at)
    return found


def curvature_of(loss: OutputLoss, outputs: Tensor) -> Tensor:
    """Second derivatives of each input's loss by its outputs, ``(N, q, q)``; zero where there are none."""
    at = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(values_of(loss, at).sum(), at, create_graph=True)
        if not slope.requires_grad:  # linear in the outputs
            return outputs.new_zeros(*outputs.shape, outputs.shape[1])
        rows = [
            torch.autograd.grad(slope[:, i].sum(), at, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
            for i in range(outputs.shape[1])
        ]
    bend = torch.stack(rows, dim=1)
    return 0.5 * (bend + bend.transpose(1, 2))
