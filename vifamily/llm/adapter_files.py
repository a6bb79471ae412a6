"""A trained adapter in PEFT's format: as the reference policy of preferences, and as where members start."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import CheckpointError, ConfigError, ShapeError
from vifamily.llm._extra import require
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm._targets import adapter_scale, check_lora_config
from vifamily.llm.manifest import read_object
from vifamily.rng import generator

__all__ = ["SavedAdapter", "put", "read_lora_config", "read_tensors", "start_from_adapter", "swapped"]

_PREFIX = "base_model.model."


class SavedAdapter:
    """One LoRA adapter read from a folder, over the base of an ensemble.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: An ensemble over the base that the adapter was trained on. Its members' layers must include those of the
            adapter; ranks and scales may differ.

    Attributes:
        matrices: The two matrices of each layer that it changes, ``name -> ((r, in), (out, r))``, in the scale of the
            ensemble.

    Raises:
        CheckpointError: If the folder is incomplete, or the adapter is of another base.
        ConfigError: If it is no plain LoRA adapter, or changes layers that members do not.

    Example:
        >>> reference = SavedAdapter("results/sft-adapter", model)  # doctest: +SKIP
        >>> with reference.on(model):  # doctest: +SKIP
        ...     model.row_log_prob(**batch, members=(0, 1))
    """

    def __init__(self, folder: str | Path, model: StackedCausalLM) -> None:
        self.folder = Path(folder)
        config = read_lora_config(self.folder)
        check_lora_config(config)
        path = self.folder / "adapter_model.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{self.folder} has no adapter_model.safetensors: save the adapter in that format.")
        found = read_tensors(path)
        layers = dict(model.lora_adapters())
        scale = adapter_scale(config)
        self.matrices: dict[str, tuple[Tensor, Tensor]] = {}
        for name in sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in found}):
            if name not in layers:
                raise ConfigError(
                    f"the adapter in {folder} changes the layer {name!r}, which members do not: give them its "
                    "target_modules too, or merge it into the base."
                )
            try:
                a, b = (found[f"{_PREFIX}{name}.lora_{m}.weight"] for m in ("A", "B"))
            except KeyError as error:
                raise CheckpointError(f"{path} lacks {error}: it is no LoRA adapter.") from error
            layer = layers[name]
            if a.shape[1:] != layer.lora_A.shape[2:] or b.shape[:1] != layer.lora_B.shape[1:2]:
                raise CheckpointError(
                    f"the adapter in {folder} has matrices of {tuple(a.shape)} and {tuple(b.shape)} at {name}, where "
                    f"the base maps {layer.lora_A.shape[2]} to {layer.lora_B.shape[1]} numbers: it is of another base."
                )
            self.matrices[name] = (a.double(), b.double() * (scale / layer.scale))
        if not self.matrices:
            raise CheckpointError(f"{path} holds no adapter.")

    @contextlib.contextmanager
    def on(self, model: StackedCausalLM) -> Iterator[None]:
        """Put the adapter in the place of all members, as member 0; put them back after."""
        pairs = {}
        for name, layer in model.lora_adapters():
            a, b = layer.lora_A, layer.lora_B
            near = self.matrices.get(name)
            low, high = (a.new_zeros(1, a.shape[2]), b.new_zeros(b.shape[1], 1)) if near is None else near
            pairs[name] = (low.to(a).unsqueeze(0), high.to(b).unsqueeze(0))
        with swapped(model, pairs, trained=False):
            yield


@contextlib.contextmanager
def swapped(
    model: StackedCausalLM, pairs: Mapping[str, tuple[Tensor, Tensor]], *, trained: bool
) -> Iterator[list[nn.Parameter]]:
    """Put other matrices in the place of those of all members; put back what was there.

    Args:
        model: The ensemble.
        pairs: The two matrices of each layer, ``(k, r, in)`` and ``(k, out, r)``, for any number k.
        trained: Whether they need a gradient.

    Returns:
        The new parameters, layer by layer.
    """
    kept = [(layer, layer.lora_A, layer.lora_B) for _, layer in model.lora_adapters()]
    try:
        new: list[nn.Parameter] = []
        for name, layer in model.lora_adapters():
            a, b = pairs[name]
            layer.lora_A, layer.lora_B = nn.Parameter(a, requires_grad=trained), nn.Parameter(b, requires_grad=trained)
            new += [layer.lora_A, layer.lora_B]
        yield new
    finally:
        for layer, a, b in kept:
            layer.lora_A, layer.lora_B = a, b


@torch.no_grad()
def put(model: StackedCausalLM, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Make matrices the members of an ensemble for good, with equal weights.

    Args:
        model: The ensemble; changed in place.
        pairs: The two matrices of each layer, ``(k, r, in)`` and ``(k, out, r)``; k is the number of members from now.
    """
    count = {len(matrix) for pair in pairs.values() for matrix in pair}
    if len(count) != 1:
        raise ShapeError(f"layers have matrices of {sorted(count)} members: give each as many.")
    for name, layer in model.lora_adapters():
        layer.lora_A, layer.lora_B = (
            nn.Parameter(new.to(old)) for new, old in zip(pairs[name], (layer.lora_A, layer.lora_B), strict=True)
        )
    model.num_members = count.pop()
    model.selection.members = (0, model.num_members)
    model.log_weight = torch.full_like(model.log_weight[:1], -math.log(model.num_members)).repeat(model.num_members)


@torch.no_grad()
def start_from_adapter(model: StackedCausalLM, folder: str | Path, *, noise: float = 0.1, seed: int = 0) -> None:
    """Start all members near a trained adapter, to go on from it.

    An adapter of rank up to the members' fills the first rows of their matrices; what is left keeps its start, which
    changes nothing. Each member's copy has noise of its own, since members that are alike stay alike at every alpha.

    Args:
        model: The ensemble; its adapters are overwritten.
        folder: Folder of a PEFT adapter.
        noise: Size of the noise, relative to the root mean square of each matrix.
        seed: Root seed of the noise.

    Raises:
        CheckpointError: If the folder cannot be read.
        ConfigError: If the adapter cannot be that of a member, or noise is not positive.
    """
    if not noise > 0:
        raise ConfigError(f"noise must be positive, got {noise!r}: members that start alike stay alike.")
    adapter = SavedAdapter(folder, model)
    for index, (name, layer) in enumerate(model.lora_adapters()):
        near = adapter.matrices.get(name)
        if near is None:
            continue
        rank, room = len(near[0]), layer.lora_A.shape[1]
        if rank > room:
            raise ConfigError(f"the adapter in {folder} has rank {rank}, members have {room}: give them lora_r={rank}.")
        for k in range(model.num_members):
            stream = generator(seed, "llm/start", k, index)
            a, b = (_noisy(matrix, noise, stream) for matrix in near)
            layer.lora_B[k].zero_()
            layer.lora_A[k, :rank] = a.to(layer.lora_A)
            layer.lora_B[k, :, :rank] = b.to(layer.lora_B)


def _noisy(matrix: Tensor, noise: float, stream: torch.Generator) -> Tensor:
    drawn = torch.randn(matrix.shape, generator=stream, dtype=torch.float64)
    return matrix + noise * matrix.square().mean().sqrt() * drawn


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is missing or damaged, or holds a number that is not finite.
    """
    safe = require("safetensors.torch", "reading an adapter")
    try:
        found: dict[str, Tensor] = safe.load_file(path)
    except (OSError, ValueError, RuntimeError, MemoryError, require("safetensors", "reading").SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or no safetensors file: {str(error)[:200]}.") from error
    bad = [name for name, value in found.items() if not bool(value.isfinite().all())]
    if bad:
        raise CheckpointError(f"{path} holds numbers that are not finite, first in {bad[0]}.")
    return found


def read_lora_config(folder: Path) -> Any:
    """Read PEFT's settings of a LoRA adapter.

    Args:
        folder: The adapter's folder.

    Returns:
        A ``LoraConfig``, without what says how training began and what was dropped in it.

    Raises:
        CheckpointError: If the settings are missing or cannot be read.
        ConfigError: If the adapter is none of LoRA.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no adapter_config.json: give the folder of a PEFT adapter.")
    read_object(path)  # PEFT has no message for what is no object
    peft = require("peft", "reading an adapter")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(f"{folder} holds a {type(config).__name__}: only LoRA adapters can be read.")
    config.init_lora_weights, config.lora_dropout = True, 0.0
    return config
