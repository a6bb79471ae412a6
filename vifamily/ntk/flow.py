"""Training as a flow of functions: what a tangent kernel that stays predicts, for any loss of the outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.ntk._loss import OutputLoss, curvature_of, gradient_of, values_of
from vifamily.ntk._tables import checked_gram

__all__ = ["PredictedFlow", "predicted_flow"]

Kernel = Tensor | Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class PredictedFlow:
    r"""A path of outputs under a kernel that stays.

    Attributes:
        times: Times ``(T,)``.
        outputs: Outputs at the inputs of training ``(T, N, q)``.
        loss: Mean loss ``(T,)``; never rises.
        pull: Gradients gathered so far, ``(T, N, q)``: the integral of each input's gradient over time, over ``N``.
    """

    times: Tensor
    outputs: Tensor
    loss: Tensor
    pull: Tensor

    def elsewhere(self, rows: Tensor, start: Tensor) -> Tensor:
        r"""Outputs at other inputs, ``f_0(x') - K(x', X) times the pull``.

        Args:
            rows: Kernel between them and the inputs of training, ``(M q, N q)``.
            start: Their outputs at the start, ``(M, q)``.

        Returns:
            ``(T, M, q)``.

        Raises:
            ShapeError: If the shapes do not fit.
        """
        flat = self.pull.flatten(1)
        if start.ndim != 2 or rows.shape != (start.numel(), flat.shape[1]):
            raise ShapeError(
                f"rows must have shape ({start.numel()}, {flat.shape[1]}), outputs there by outputs of training, "
                f"got {tuple(rows.shape)}."
            )
        return start - (flat @ rows.T).reshape(-1, *start.shape)


def predicted_flow(
    kernel: Kernel, loss: OutputLoss, start: Tensor, times: Sequence[float] | Tensor, *, tolerance: float = 1e-8
) -> PredictedFlow:
    r"""Path of the outputs when parameters follow the gradient of the mean loss and the kernel stays.

    .. math:: \dot f_t(x) = -\frac1N \sum_{i} K(x, x_i) \nabla \ell_i(f_t(x_i))

    What is integrated are the gradients gathered, so that outputs elsewhere cost no more. With the matrix, implicit
    steps are taken where the flow is stiff, of order ``(N q)^3`` each; with products alone explicit ones, whose number
    is of order of the time times the largest rate.

    Args:
        kernel: Gram matrix ``(N q, N q)``, or its product with vectors ``(N, q) -> (N, q)``, as of
            :func:`ntk_product`.
        loss: From outputs ``(N, q)`` to the loss of each input ``(N,)``, by rows; differentiable twice.
        start: Outputs at the start ``(N, q)``.
        times: Times to report, ascending from zero or later.
        tolerance: Relative error of the integration.

    Raises:
        ConfigError: If times do not ascend or `tolerance` is out of range.
        ShapeError: If kernel, start and loss do not fit.
        DataError: If the loss is not finite on the way.
        NotAvailableError: If the integration does not reach the last time.

    Source: Jacot, Gabriel and Hongler (2018), section 4; McNamara, Loper and Regier (2024) for losses other than
    squares.

    Example:
        >>> y = torch.tensor([[1.0]], dtype=torch.float64)
        >>> flow = predicted_flow(torch.ones(1, 1).double(), lambda f: 0.5 * (f - y).square().sum(1), 0 * y, [0.0, 1.0])
        >>> round(float(flow.outputs[-1]), 6)  # 1 - exp(-1)
        0.632121
    """
    at = _checked_times(times)
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance must lie in (0, 1), got {tolerance!r}. Take 1e-8.")
    if start.ndim != 2:
        raise ShapeError(f"outputs at the start must have shape (inputs, outputs), got {tuple(start.shape)}.")
    size = len(start)
    push = _product_of(kernel, start)

    def outputs_at(pull: Tensor) -> Tensor:
        return start - push(pull)

    def slope(_: float, state: Any) -> Any:
        pull = torch.as_tensor(state, dtype=start.dtype, device=start.device).reshape(start.shape)
        return _numbers(gradient_of(loss, outputs_at(pull)) / size)

    options: dict[str, Any] = {"method": "DOP853"}
    if isinstance(kernel, torch.Tensor):
        blocks = kernel.detach().reshape(*start.shape, -1)

        def bend(_: float, state: Any) -> Any:
            pull = torch.as_tensor(state, dtype=start.dtype, device=start.device).reshape(start.shape)
            change = torch.einsum("iab,ibk->iak", curvature_of(loss, outputs_at(pull)), blocks)
            return _numbers(-change / size).reshape(start.numel(), -1)

        options = {"method": "LSODA", "jac": bend}
    zero = np.zeros(start.numel())
    scale = float(gradient_of(loss, start).abs().max()) / size or 1.0
    found = integrate.solve_ivp(
        slope, (0.0, float(at[-1])), zero, t_eval=at, rtol=max(tolerance, 1e-12), atol=tolerance * scale, **options
    )
    if not found.success:
        raise NotAvailableError(f"the flow could not be followed to time {at[-1]:g}: {found.message}")
    pulls = torch.as_tensor(found.y.T.copy(), dtype=start.dtype, device=start.device).reshape(-1, *start.shape)
    outputs = torch.stack([outputs_at(pull) for pull in pulls])
    losses = torch.stack([values_of(loss, out).mean().detach() for out in outputs])
    return PredictedFlow(torch.as_tensor(at, dtype=start.dtype, device=start.device), outputs, losses, pulls)


def _checked_times(times: Sequence[float] | Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    at = np.asarray(times.detach().cpu() if isinstance(times, torch.Tensor) else times, dtype=np.float64)
    if at.ndim != 1 or not at.size or not np.isfinite(at).all() or at[0] < 0 or (np.diff(at) <= 0).any():
        raise ConfigError(f"times must ascend from zero or later and be finite, got {at.tolist()}.")
    if at[-1] == 0:
        raise ConfigError("the last time must be later than zero.")
    return at


def _product_of(kernel: Kernel, start: Tensor) -> Callable[[Tensor], Tensor]:
    """Product of the kernel with ``(N, q)``.

    Raises:
        ShapeError: If the kernel does not fit the outputs.
    """
    if not isinstance(kernel, torch.Tensor):
        return lambda v: kernel(v).detach()
    gram = checked_gram(kernel.detach(), len(start))
    if len(gram) != start.numel():
        raise ShapeError(
            f"the kernel has {len(gram)} rows and the outputs {start.numel()} entries {tuple(start.shape)}. For a "
            "scalar kernel times the identity take torch.kron(kernel, torch.eye(outputs))."
        )
    return lambda v: (gram @ v.reshape(-1)).reshape(v.shape)


def _numbers(value: Tensor) -> Any:
    return value.detach().double().cpu().numpy().ravel()


def scaled_gap(found: Tensor, known: Tensor) -> Tensor:
    """Distances between two paths ``(T, N, q)`` over the way that the second makes, ``(T,)``."""
    way = float((known[-1] - known[0]).norm())
    gap: Tensor = (found - known).flatten(1).norm(dim=1) / (way if way > 0 else math.inf)
    return gap
