r"""Ensembles whose members change frozen layers by products of diagonals and Walsh-Hadamard transforms.

A member has :math:`3 P` numbers for each square block of side P, where a LoRA adapter of rank r has :math:`2 r P`, and
its change has full rank. The transforms take :math:`O(P \log P)` for a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vifamily.errors import ConfigError
from vifamily.llm._extra import require
from vifamily.llm._layers import StackedAdapter
from vifamily.llm._selection import Selection
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm._targets import features, target_names
from vifamily.numerics.hadamard import next_power_of_two
from vifamily.numerics.walsh_hadamard import walsh_matrix, walsh_product
from vifamily.rng import generator

__all__ = ["StackedWalsh", "WalshCausalLM", "WalshConfig"]


@dataclasses.dataclass(frozen=True)
class WalshConfig:
    """Which layers Walsh-Hadamard adapters change, and by how much.

    Args:
        target_modules: Layers, matched as PEFT matches them: endings of names, a pattern, or ``"all-linear"``.
        layers_to_transform: Numbers of the decoder layers that are adapted; None takes all.
        scale: Factor of the change. With 1, an output moves by about as much as the core's numbers do, relative to the
            root mean square of the inputs.

    Raises:
        ConfigError: If there is no layer, or the scale is not positive.

    Example:
        >>> WalshConfig(("q_proj", "v_proj")).plain()
        {'target_modules': ['q_proj', 'v_proj'], 'layers_to_transform': None, 'scale': 1.0}
    """

    target_modules: str | Sequence[str] = "all-linear"
    layers_to_transform: Sequence[int] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.target_modules:
            raise ConfigError("target_modules must name layers, or be 'all-linear', got nothing.")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not 0 < self.scale < 1e30:
            raise ConfigError(f"scale must be a positive number, got {self.scale!r}.")

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        targets, layers = self.target_modules, self.layers_to_transform
        return {
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "layers_to_transform": None if layers is None else list(layers),
            "scale": float(self.scale),
        }


class StackedWalsh(StackedAdapter):
    r"""A frozen linear layer with the Walsh-Hadamard adapters of all members.

    Rows come member-major, and block k leaves with :math:`W x + s\, \Delta_k x`, where

    .. math:: \Delta_k = \operatorname{diag}(a_k)\, H \operatorname{diag}(g_k)\, H \operatorname{diag}(b_k)

    by square blocks above each other, of side P, the power of two from the number of inputs on. Inputs are padded with
    zeros and surplus outputs dropped. H is orthonormal.

    Args:
        base_layer: The frozen layer.
        num_members: K.
        scale: s.
        selection: The members that rows belong to.
        dtype: Dtype of the adapters.

    Attributes:
        walsh_left: a, ``(member, block, P)``.
        walsh_core: g, the same shape; zero at first, so that the layer is what it was.
        walsh_right: b, the same shape.

    Source: Rossi, Marmin and Filippone (2020), "Walsh-Hadamard variational inference for Bayesian deep learning", for
    the product; that it is added to a frozen layer is ours.

    Example:
        >>> layer = StackedWalsh(nn.Linear(3, 6), 2, 1.0, Selection(2), torch.float32)
        >>> layer(torch.zeros(8, 5, 3)).shape, layer.walsh_core.shape
        (torch.Size([8, 5, 6]), torch.Size([2, 2, 4]))
    """

    names = ("walsh_left", "walsh_core", "walsh_right")
    saved = names

    def __init__(
        self, base_layer: nn.Module, num_members: int, scale: float, selection: Selection, dtype: torch.dtype
    ) -> None:
        super().__init__(base_layer, selection)
        size_in, self._size_out = features(base_layer)
        side = next_power_of_two(size_in)
        shape = (num_members, -(-self._size_out // side), side)
        self.scale, self._size_in = scale, size_in
        self.walsh_left = self._zeros(*shape, dtype=dtype)
        self.walsh_core = self._zeros(*shape, dtype=dtype)
        self.walsh_right = self._zeros(*shape, dtype=dtype)

    def start(self, seed: int, layer: int) -> None:
        """Draw the signs of each member's outer diagonals from a stream of its own; the core is zero."""
        with torch.no_grad():
            self.walsh_core.zero_()
            for k in range(len(self.walsh_core)):
                source = generator(seed, "llm/adapter", k, layer)
                for diagonal in (self.walsh_left[k], self.walsh_right[k]):
                    diagonal.copy_(2 * torch.randint(0, 2, diagonal.shape, generator=source) - 1)

    def change(self, member: int) -> Tensor:
        r"""The matrix :math:`s\, \Delta_k`, ``(out, in)``."""
        left, core, right = (part[member] for part in self.trained)
        blocks = walsh_matrix(left, core, right)
        return self.scale * blocks.flatten(0, 1)[: self._size_out, : self._size_in]

    def _adapted(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        left, core, right = (part.unsqueeze(1) for part in parts)
        out = self._frozen(x)
        rows = x.reshape(len(left), -1, 1, x.shape[-1]).to(core.dtype)
        padded = pad(rows, (0, core.shape[-1] - x.shape[-1]))
        change = walsh_product(padded, left, core, right).flatten(-2)[..., : self._size_out].mul(self.scale)
        return (out + change.reshape(out.shape)).to(out.dtype)


class WalshCausalLM(StackedCausalLM):
    r"""An ensemble of Walsh-Hadamard adapters over one frozen causal language model.

    All that is said of :class:`~vifamily.llm.StackedCausalLM` holds: routes, trainers, checkpoints and
    :class:`~vifamily.llm.Ensemble` are the same. Members start apart by the signs of their outer diagonals, and with a
    core of zero, so that each is the base. What is of LoRA alone is refused: starting from a PEFT adapter or having one
    as reference, Laplace's approximation, the stability analysis, the merged export, serving by vLLM. Saved members are
    no PEFT adapters, and ``PeftModel`` cannot load them; :class:`~vifamily.llm.Ensemble` does, and
    :func:`~vifamily.llm.export_lora` saves the nearest LoRA adapters of a rank.

    Args:
        base: A causal language model of transformers.
        config: Which layers are adapted.
        num_members: Number of members.
        seed: Seed of the members' signs; each member has a stream of its own.
        adapter_dtype: Dtype of the adapters; float32 over half precision, otherwise that of the base.

    Raises:
        ConfigError: If the settings match no layer.

    Example:
        >>> model = WalshCausalLM(base, WalshConfig("all-linear"), 4)  # doctest: +SKIP
        >>> trainer = SFTEnsembleTrainer(model, args, records, processing_class=tokenizer)  # doctest: +SKIP
    """

    adapter: ClassVar[str] = "walsh_hadamard"

    def _matched(self, base: nn.Module, config: Any) -> list[str]:
        if not isinstance(config, WalshConfig):
            raise ConfigError(f"Walsh-Hadamard adapters are set by a WalshConfig, got a {type(config).__name__}.")
        asked = config.plain()
        del asked["scale"]
        return target_names(base, require("peft", "matching layers by name").LoraConfig(**asked))

    def _wrapped(self, layer: nn.Module, seed: int, index: int, dtype: torch.dtype) -> StackedAdapter:
        out = StackedWalsh(layer, self.num_members, float(self.adapter_config.scale), self.selection, dtype)
        out.start(seed, index)
        return out
