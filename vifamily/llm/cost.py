r"""What a step of training costs, before it is run: memory and arithmetic against members, rank and base.

For a token that passes through P weights of the base's matrices, a forward pass takes :math:`2P` operations. The
gradient in what flows through takes as many again, and that in the weights is not formed where they are frozen. An
adapter of rank r on a matrix from :math:`d` to :math:`e` has :math:`r(d + e)` weights, whose own gradients are formed.
Attention over T tokens with queries of width q takes :math:`4 T q` operations more for each token and layer, twice that
backwards; a causal mask is not made use of. Memory is that of weights, gradients, the optimiser's two moments, and of
what is kept for the backward pass with fused attention; what frameworks and drivers take comes on top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vifamily.diagnostics._tables import render
from vifamily.errors import ConfigError
from vifamily.llm.sizes import BaseSize

__all__ = ["PRECISIONS", "ROUTES", "StepCost", "step_cost"]

ROUTES = ("stacked", "two_pass")
"""How members are evaluated: all of them on one micro-batch, or one after the other with responsibilities first."""

PRECISIONS: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.53}
"""Bytes of a weight of the base. Four bits cost a little more than half a byte, for the scale of each block."""

_FLOATS = 4
_HEAD_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Memory and arithmetic of one step; prints as a table.

    Attributes:
        num_members: K.
        adapter_weights: Trained weights of one member.
        base_weights: Weights of the base.
        base_bytes: Memory of the base.
        adapter_bytes: Memory of all members' weights and gradients.
        optimiser_bytes: Memory of the two moments of AdamW.
        activation_bytes: Memory kept for the backward pass of one micro-batch.
        logit_bytes: Memory of the part of the logits that is held at once.
        forward_flops: Operations of all forward passes of a step.
        backward_flops: Operations of all backward passes.
        tokens: Tokens of a step, each seen by every member.
        devices: Devices that share the batch.
        sharded: Whether the base is shared out among them.
        settings: What was asked for, in words.
    """

    num_members: int
    adapter_weights: int
    base_weights: int
    base_bytes: float
    adapter_bytes: float
    optimiser_bytes: float
    activation_bytes: float
    logit_bytes: float
    forward_flops: float
    backward_flops: float
    tokens: int
    devices: int
    sharded: bool
    settings: str

    @property
    def total_bytes(self) -> float:
        """Memory of one device, without what frameworks and drivers take."""
        base = self.base_bytes / (self.devices if self.sharded else 1)
        return base + self.adapter_bytes + self.optimiser_bytes + self.activation_bytes + self.logit_bytes

    @property
    def flops(self) -> float:
        """Operations of a step, over all devices."""
        return self.forward_flops + self.backward_flops

    def seconds(self, flops_per_second: float) -> float:
        """Time of a step at so many operations a second on each device.

        Args:
            flops_per_second: What a device reaches; 30 to 50 % of what its maker states is usual.

        Raises:
            ConfigError: If the rate is not positive.
        """
        if not flops_per_second > 0:
            raise ConfigError(f"flops_per_second must be positive, got {flops_per_second!r}.")
        return self.flops / self.devices / flops_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes, "flops": self.flops}

    def __str__(self) -> str:
        """Return the figures as a table."""
        where = f" over {self.devices} devices" if self.sharded and self.devices > 1 else ""
        rows = [
            (f"base, {_count(self.base_weights, ' weights')}{where}", _memory(self.total_bytes - self._rest)),
            (
                f"{self.num_members} members, {_count(self.adapter_weights, ' weights')} each",
                _memory(self.adapter_bytes),
            ),
            ("moments of AdamW", _memory(self.optimiser_bytes)),
            ("kept for the backward pass", _memory(self.activation_bytes)),
            ("logits held at once", _memory(self.logit_bytes)),
            ("memory of a device", _memory(self.total_bytes)),
            ("forward passes of a step", _count(self.forward_flops, "FLOP")),
            ("backward passes of a step", _count(self.backward_flops, "FLOP")),
            ("tokens of a step", str(self.tokens)),
        ]
        note = "Counted, not measured: frameworks, drivers and fragmentation take more memory."
        return render(f"cost of a step ({self.settings})", ("of", "amount"), rows, note)

    @property
    def _rest(self) -> float:
        return self.adapter_bytes + self.optimiser_bytes + self.activation_bytes + self.logit_bytes


def step_cost(
    size: BaseSize,
    *,
    num_members: int,
    lora_r: int,
    batch_size: int,
    length: int,
    target_modules: tuple[str, ...] | None = None,
    first_layer: int = 0,
    micro_batch_size: int | None = None,
    route: str = "stacked",
    gradient_checkpointing: bool = False,
    scored_share: float = 0.5,
    base_precision: str = "bfloat16",
    preferences: bool = False,
    devices: int = 1,
    sharded: bool = False,
) -> StepCost:
    """Count what a step of an ensemble takes.

    Args:
        size: The base; see :func:`~vifamily.llm.sizes.base_size`.
        num_members: K.
        lora_r: Rank of the adapters.
        batch_size: Rows of a step over all devices; pairs are two rows each.
        length: Tokens of a row, padding included.
        target_modules: Which matrices are adapted, by name; None takes all in every layer.
        first_layer: First layer that is adapted; those below run once for all members.
        micro_batch_size: Rows evaluated at once on a device, under every member; None takes a device's batch over K, so
            that memory does not grow with K.
        route: One of :data:`ROUTES`.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        scored_share: Share of the tokens that are scored, which alone need logits.
        base_precision: One of float32, bfloat16, float16, int8 and nf4.
        preferences: Whether rows are pairs with a reference, for which the base runs once more.
        devices: Devices that share the batch; each holds all members.
        sharded: Whether the base is shared out among them.

    Returns:
        Memory and operations.

    Raises:
        ConfigError: If a value is out of range, or a name is of no matrix.

    Example:
        >>> from vifamily.llm import base_size
        >>> size = base_size({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        ...                   "num_attention_heads": 32, "vocab_size": 32000})
        >>> cost = step_cost(size, num_members=8, lora_r=16, batch_size=8, length=512)
        >>> round(cost.base_weights / 1e9, 2), cost.adapter_weights, round(cost.total_bytes / 1e9, 1)
        (6.74, 39976960, 54.7)
    """
    for name, value in (
        ("num_members", num_members),
        ("lora_r", lora_r),
        ("batch_size", batch_size),
        ("length", length),
        ("devices", devices),
        ("micro_batch_size", 1 if micro_batch_size is None else micro_batch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    if route not in ROUTES or base_precision not in PRECISIONS:
        raise ConfigError(
            f"route must be one of {', '.join(ROUTES)} and base_precision one of {', '.join(PRECISIONS)}, got "
            f"{route!r} and {base_precision!r}."
        )
    if not 0 < scored_share <= 1 or not 0 <= first_layer < size.num_layers:
        raise ConfigError(
            f"scored_share must be above 0 and at most 1 and first_layer from 0 to {size.num_layers - 1}, got "
            f"{scored_share!r} and {first_layer!r}."
        )
    chosen = _targets(size, target_modules)
    above = size.num_layers - first_layer
    adapter = above * lora_r * sum(size_in + size_out for size_in, size_out in chosen.values())
    own_rows = math.ceil(batch_size / devices)
    micro = micro_batch_size or max(1, own_rows // num_members)
    rows_at_once = min(micro, own_rows) * (num_members if route == "stacked" else 1)
    tokens = batch_size * length
    forward, backward = _flops(size, num_members, adapter, first_layer, tokens, length, scored_share)
    if route == "two_pass":
        forward *= 2
    if gradient_checkpointing:  # what is above the first adapter runs once more
        backward += num_members * tokens * above * _layer_flops(size, length) + 2 * num_members * tokens * adapter
    if preferences:
        forward += tokens * (size.num_layers * _layer_flops(size, length) + scored_share * 2 * size.vocab * size.hidden)
    width = PRECISIONS[base_precision]
    at_once = rows_at_once * length
    layer = _layer_bytes(size, lora_r, chosen, width)
    number = _number(width)
    # with checkpointing each layer keeps what flows into it, and one at a time all of the rest
    kept = above * number * size.hidden + layer if gradient_checkpointing else above * layer
    return StepCost(
        num_members=num_members,
        adapter_weights=adapter,
        base_weights=size.num_weights,
        base_bytes=size.num_weights * width,
        adapter_bytes=2 * _FLOATS * num_members * adapter,
        optimiser_bytes=2 * _FLOATS * num_members * adapter,
        activation_bytes=at_once * (kept + scored_share * number * size.hidden),
        logit_bytes=2 * _FLOATS * min(_HEAD_CHUNK, math.ceil(at_once * scored_share) * size.vocab),
        forward_flops=forward,
        backward_flops=backward,
        tokens=tokens,
        devices=devices,
        sharded=sharded,
        settings=f"K = {num_members}, r = {lora_r}, {batch_size} rows of {length}, {route.replace('_', ' ')}, "
        f"{base_precision}",
    )


def _targets(size: BaseSize, names: tuple[str, ...] | None) -> dict[str, tuple[int, int]]:
    known = size.matrices()
    if names is None:
        return known
    out = {k: v for k, v in known.items() if any(k == name or k.endswith(f".{name}") for name in names)}
    missing = [name for name in names if not any(k == name or k.endswith(f".{name}") for k in known)]
    if missing or not names:
        raise ConfigError(
            f"target_modules must be among {', '.join(known)}, got {', '.join(map(str, names)) or 'none'}."
        )
    return out


def _layer_flops(size: BaseSize, length: int) -> float:
    """Operations of one layer for one token, forward."""
    return 2 * size.active_layer_weights + 4 * length * size.query


def _flops(
    size: BaseSize, members: int, adapter: int, first: int, tokens: int, length: int, scored: float
) -> tuple[float, float]:
    layer, head = _layer_flops(size, length), 2 * size.vocab * size.hidden * scored
    above = size.num_layers - first
    forward = tokens * (first * layer + members * (above * layer + head + 2 * adapter))
    # attention is differentiated in three inputs and frozen matrices in one; adapters in input and weights
    attention = 4 * length * size.query
    backward = tokens * members * (above * (layer + attention) + head + 4 * adapter)
    return forward, backward


def _number(width: float) -> float:
    """Bytes of a number that flows through; quantised bases compute in half precision."""
    return 4.0 if width >= 4 else 2.0


def _layer_bytes(size: BaseSize, rank: int, chosen: Mapping[str, Any], width: float) -> float:
    """Bytes that one layer keeps for each token that passes it, as fused attention and autograd keep them."""
    number, experts = _number(width), size.experts_per_token
    if size.layout == "gpt2":
        norms = 2 * number * (size.hidden + 2)
        inside = 4 * number * size.intermediate  # the steps of its activation
    else:
        norms = 2 * _FLOATS * (size.hidden + 1)  # taken in single precision
        inside = 3 * number * size.intermediate  # the gate before and after its activation, and what it gates
    attention = number * (2 * size.query + 2 * size.key_value) + _FLOATS * size.heads
    inputs = 0.0
    for place, group in enumerate(size.groups()):
        adapted = [name for name in group if name in chosen]
        wide = next(iter(group.values()))[0] * (experts if place == 3 else 1)
        if number < _FLOATS:
            inputs += len(adapted) * _FLOATS * wide  # each adapter reads a copy in its own precision
        elif adapted and place != 1:  # the answer of the attention is kept as it is
            inputs += number * wide
    return norms + attention + experts * inside + inputs + _FLOATS * rank * len(chosen)


def _count(number: float, unit: str) -> str:
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit.strip()}"


def _memory(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
