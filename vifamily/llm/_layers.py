"""Frozen linear layers with the adapters of all members."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vifamily.errors import ShapeError
from vifamily.llm._fused import adapted_linear, plain_weight
from vifamily.llm._selection import Selection
from vifamily.llm._targets import features
from vifamily.rng import generator

__all__ = ["StackedAdapter", "StackedLoRA"]


class StackedAdapter(nn.Module):
    """A frozen linear layer with what members add to it; subclasses say what that is.

    Rows come member-major, K blocks of equal size, and block k leaves with the change of member k added. The frozen
    layer sees all rows at once and is never looked into, so it may be quantised.

    Args:
        base_layer: The frozen layer.
        selection: The members that rows belong to.

    Attributes:
        names: Attributes that hold what is trained, each with the member first.
        saved: The name of each in a file of one member.
        scale: Factor of the change.
    """

    names: ClassVar[tuple[str, ...]]
    saved: ClassVar[tuple[str, ...]]
    scale: float

    def __init__(self, base_layer: nn.Module, selection: Selection) -> None:
        super().__init__()
        self.base_layer, self._selection = base_layer, selection

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained, in the order of ``names``."""
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; see the class."""
        chosen = self._selection.members
        if chosen is None:
            return self._frozen(x)
        first, last = chosen
        if x.shape[0] % (last - first):
            raise ShapeError(
                f"{x.shape[0]} rows cannot be split among {last - first} members: the model reshapes its rows."
            )
        parts: list[Tensor] = list(self.trained)
        if last - first != len(parts[0]):  # a part of them costs a node of the graph more
            parts = [part[first:last] for part in parts]
        return self._adapted(x, parts)

    def change(self, member: int) -> Tensor:
        """The matrix that a member adds, ``(out, in)``, written out."""
        raise NotImplementedError

    def _adapted(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Outputs of blocks of rows under as many members."""
        raise NotImplementedError

    def _frozen(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        return out

    def _zeros(self, *shape: int, dtype: torch.dtype) -> nn.Parameter:
        # a quantised layer may have buffers alone
        device = next(itertools.chain(self.base_layer.parameters(), self.base_layer.buffers())).device
        return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))


class StackedLoRA(StackedAdapter):
    r"""A frozen linear layer with the low-rank adapters of all members.

    Rows come member-major, K blocks of equal size, and block k leaves with :math:`W x + s\, B_k A_k x`. The frozen
    layer sees all rows at once and is never looked into, so it may be quantised.

    Args:
        base_layer: The frozen layer.
        num_members: K.
        r: Rank.
        scale: s, ``lora_alpha / r``.
        selection: The members that rows belong to.
        dtype: Dtype of the adapters.

    Attributes:
        lora_A: ``(member, r, in)``.
        lora_B: ``(member, out, r)``, zero at first.

    Example:
        >>> layer = StackedLoRA(nn.Linear(3, 2), 4, 1, 1.0, Selection(4), torch.float32)
        >>> layer(torch.zeros(8, 5, 3)).shape, layer.lora_B.shape
        (torch.Size([8, 5, 2]), torch.Size([4, 2, 1]))
    """

    names = ("lora_A", "lora_B")
    saved = ("lora_A.weight", "lora_B.weight")

    def __init__(
        self, base_layer: nn.Module, num_members: int, r: int, scale: float, selection: Selection, dtype: torch.dtype
    ) -> None:
        super().__init__(base_layer, selection)
        size_in, size_out = features(base_layer)
        self.scale = scale
        self.lora_A = self._zeros(num_members, r, size_in, dtype=dtype)
        self.lora_B = self._zeros(num_members, size_out, r, dtype=dtype)

    def start(self, seed: int, layer: int, kind: Any) -> None:
        """Draw the first matrix of each member from a stream of its own, as PEFT would; the second is zero."""
        spread = 1.0 / math.sqrt(self.lora_A.shape[-1])
        with torch.no_grad():
            for k, matrix in enumerate(self.lora_A):
                source = generator(seed, "llm/adapter", k, layer)
                if kind == "gaussian":
                    drawn = torch.randn(matrix.shape, generator=source, dtype=torch.float64) / matrix.shape[0]
                else:
                    drawn = torch.rand(matrix.shape, generator=source, dtype=torch.float64).sub_(0.5).mul_(2 * spread)
                matrix.copy_(drawn)
            self.lora_B.zero_()

    def change(self, member: int) -> Tensor:
        r"""The matrix :math:`s\, B_k A_k`, ``(out, in)``."""
        return self.scale * self.lora_B[member] @ self.lora_A[member]

    def _adapted(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        lora_A, lora_B = parts
        plain = plain_weight(self.base_layer)
        if plain and plain[0].dtype == x.dtype == lora_A.dtype and not torch.is_autocast_enabled(x.device.type):
            return adapted_linear(x, *plain, lora_A, lora_B, self.scale)
        out = self._frozen(x)
        low = x.reshape(len(lora_A), -1, x.shape[-1]).to(lora_A.dtype)
        change = torch.bmm(torch.bmm(lora_A, low.mT).mT, lora_B.mT).mul(self.scale)
        return (out + change.reshape(out.shape)).to(out.dtype)
