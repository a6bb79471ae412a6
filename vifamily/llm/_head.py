"""Log probabilities of chosen tokens from hidden states, a part of the logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import IncompatibleError

__all__ = ["Head", "token_log_prob"]

_NUMBERS = 2**24
"""Logits held at once: 64 MiB in float32."""


class Head:
    """The frozen map from hidden states to logits, with what some models do to logits afterwards.

    Args:
        base: A causal language model of transformers.

    Raises:
        IncompatibleError: If the model has no output layer.
    """

    def __init__(self, base: nn.Module) -> None:
        getter = getattr(base, "get_output_embeddings", None)
        layer = None if getter is None else getter()
        if not isinstance(layer, nn.Module):
            raise IncompatibleError(f"{type(base).__name__} has no output layer: give a model of AutoModelForCausalLM.")
        self._layer = layer
        settings = getattr(base, "config", None)
        self._cap = getattr(settings, "final_logit_softcapping", None)
        self._times = float(getattr(settings, "logit_scale", None) or 1.0)
        self._over = float(getattr(settings, "logits_scaling", None) or 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, in float32 or better."""
        logits: Tensor = self._layer(hidden)
        if self._times != 1.0:
            logits = logits * self._times
        if self._over != 1.0:
            logits = logits / self._over
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits if logits.dtype == torch.float64 else logits.float()


class _TokenLogProb(torch.autograd.Function):
    """Each value depends on its own hidden state alone, so its gradient is found beside it and scaled later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token: Tensor, head: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        values, slopes = [], []
        for h, y in zip(hidden.split(rows), token.split(rows), strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                logits = head(leaf)
            log_prob = logits.detach().log_softmax(-1)
            chosen = y.unsqueeze(-1)
            values.append(log_prob.gather(-1, chosen).squeeze(-1))
            # one at the token less the probabilities, made where the log probabilities were
            slope = log_prob.exp_().neg_()
            slope.scatter_add_(-1, chosen, slope.new_ones(chosen.shape))
            slopes.append(torch.autograd.grad(logits, leaf, slope)[0])
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradients[0].unsqueeze(-1)).to(slope.dtype), None, None, None


def _chosen(logits: Tensor, token: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)


def token_log_prob(
    hidden: Tensor, token: Tensor, head: Callable[[Tensor], Tensor], *, num_tokens: int, numbers: int = _NUMBERS
) -> Tensor:
    """Log probability of one token after each hidden state, never holding all logits.

    The head is frozen; with a gradient wanted, that in the hidden states is computed in the same walk.

    Args:
        hidden: ``(row, width)``.
        token: ``(row,)`` integers.
        head: From hidden states to logits.
        num_tokens: Size of the vocabulary.
        numbers: Most logits held at once.

    Returns:
        ``(row,)``, in float32 or better.

    Example:
        >>> hidden = torch.zeros(3, 2, requires_grad=True)
        >>> head = lambda h: h @ torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> value = token_log_prob(hidden, torch.tensor([0, 1, 0]), head, num_tokens=2, numbers=4)
        >>> [round(v, 4) for v in value.tolist()]
        [-0.6931, -0.6931, -0.6931]
        >>> torch.autograd.grad(value.sum(), hidden)[0].tolist()
        [[0.5, -0.5], [-0.5, 0.5], [0.5, -0.5]]
    """
    rows = max(1, numbers // max(1, num_tokens))
    if len(hidden) == 0:
        return hidden.sum(-1).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if torch.is_grad_enabled() and hidden.requires_grad:
        value: Tensor = _TokenLogProb.apply(hidden, token, head, rows)  # type: ignore[no-untyped-call]
        return value
    return torch.cat([_chosen(head(h), y) for h, y in zip(hidden.split(rows), token.split(rows), strict=True)])
