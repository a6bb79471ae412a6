"""A frozen plain linear layer and the adapters of all members as one node of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["adapted_linear", "plain_weight"]


def plain_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``(out, in)`` and bias of a frozen layer that is nothing but a product; None for any other.

    Subclasses, layers with hooks and weights that are not ordinary dense tensors are left to their own ``forward``.

    Example:
        >>> weight, bias = plain_weight(nn.Linear(3, 2, bias=False).requires_grad_(False))
        >>> weight.shape, bias
        (torch.Size([2, 3]), None)
        >>> plain_weight(nn.Sequential()) is None
        True
    """
    kind = type(layer)
    if kind is not nn.Linear and not (kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"):
        return None
    weight, bias = layer.weight, layer.bias
    # a weight that is shared out or quantised is of a class of its own
    if type(weight) is not nn.Parameter or not isinstance(weight, Tensor) or weight.requires_grad:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    matrix: Tensor = weight if kind is nn.Linear else weight.T
    return matrix, bias if isinstance(bias, Tensor) else None


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    r"""Blocks of rows through :math:`W x + b + s\, B_k A_k x`, block k with the k-th pair.

    The update is added to the product in place, forward and backward. Written as separate calls, each pass over the
    wide outputs costs as much as the adapter.

    Args:
        x: ``(member * row, ..., in)``, member-major.
        weight: ``(out, in)``, frozen.
        bias: ``(out,)``, frozen, or None.
        lora_A: ``(member, r, in)``.
        lora_B: ``(member, out, r)``.
        scale: s.

    Returns:
        ``(member * row, ..., out)``.

    Example:
        >>> x, one = torch.ones(2, 3), torch.ones(1)
        >>> pair = torch.ones(2, 1, 3), torch.tensor([[[1.0]], [[2.0]]])
        >>> adapted_linear(x, torch.zeros(1, 3), None, *pair, 0.5).flatten().tolist()
        [1.5, 3.0]
    """
    value: Tensor = _AdaptedLinear.apply(x, weight, bias, lora_A, lora_B, scale)  # type: ignore[no-untyped-call]
    return value


class _AdaptedLinear(torch.autograd.Function):
    # What is between the two matrices is kept as (member, r, row). With few rows first and many columns, products of
    # such thin matrices take a half to a fifth of the time that they take the other way round on a CPU.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float
    ) -> Tensor:
        out = nn.functional.linear(x, weight, bias)
        blocks = x.reshape(len(lora_A), -1, x.shape[-1])
        low = torch.bmm(lora_A, blocks.mT)
        out.view(len(lora_A), -1, out.shape[-1]).baddbmm_(low.mT, lora_B.mT, alpha=scale)
        ctx.save_for_backward(blocks, weight, lora_A, lora_B, low)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        blocks, weight, lora_A, lora_B, low = ctx.saved_tensors
        (g,) = gradients
        wide = g.reshape(len(lora_A), -1, g.shape[-1])
        g_low = torch.bmm(lora_B.mT, wide.mT).mul_(ctx.scale)
        g_x = g_A = g_B = None
        if ctx.needs_input_grad[4]:
            g_B = torch.bmm(low, wide).mul_(ctx.scale).mT
        if ctx.needs_input_grad[3]:
            g_A = torch.bmm(g_low, blocks)
        if ctx.needs_input_grad[0]:
            g_x = torch.matmul(g, weight)
            g_x.view(len(lora_A), -1, g_x.shape[-1]).baddbmm_(g_low.mT, lora_A)
        return g_x, None, None, g_A, g_B, None
