"""The sizes of a base language model, read from its configuration without loading it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vifamily.errors import ConfigError

__all__ = ["BaseSize", "base_size"]


@dataclasses.dataclass(frozen=True)
class BaseSize:
    """The sizes of a causal language model that its cost depends on.

    Attributes:
        hidden: Width of what flows between layers.
        intermediate: Width inside the feed-forward part.
        num_layers: Number of layers.
        heads: Heads of queries.
        query: Width of all queries together.
        key_value: Width of all keys together, which is that of the values.
        vocab: Size of the vocabulary.
        layout: Which matrices a layer has: ``"llama"``, seven by their usual names; ``"phi3"``, with queries, keys and
            values in one and the gate with what it gates in one; ``"gpt2"``, without a gate.
        tied: Whether output and input embeddings are one.
        other: Weights of no matrix: norms, biases, learned positions.
        num_experts: Feed-forward parts in a layer; 1 where it is dense.
        experts_per_token: How many of them a token passes.
    """

    hidden: int
    intermediate: int
    num_layers: int
    heads: int
    query: int
    key_value: int
    vocab: int
    layout: str = "llama"
    tied: bool = False
    other: int = 0
    num_experts: int = 1
    experts_per_token: int = 1

    def groups(self) -> tuple[dict[str, tuple[int, int]], ...]:
        """Matrices of one layer by what they read, with their inputs and outputs.

        The four groups read the first norm, the answer of the attention, the second norm, and the inside of the
        feed-forward part.
        """
        d, inner, mixed = self.hidden, self.intermediate, self.query + 2 * self.key_value
        if self.layout == "gpt2":
            names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            sizes = ((d, mixed), (self.query, d), (d, inner), (inner, d))
            return tuple({name: size} for name, size in zip(names, sizes, strict=True))
        last = ({"o_proj": (self.query, d)}, {"down_proj": (inner, d)})
        if self.layout == "phi3":
            return {"qkv_proj": (d, mixed)}, last[0], {"gate_up_proj": (d, 2 * inner)}, last[1]
        first = {"q_proj": (d, self.query), "k_proj": (d, self.key_value), "v_proj": (d, self.key_value)}
        return first, last[0], {"gate_proj": (d, inner), "up_proj": (d, inner)}, last[1]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the matrices of one layer, by the names that adapters are given."""
        return {name: size for group in self.groups() for name, size in group.items()}

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        return self._layer_weights(self.num_experts)

    @property
    def active_layer_weights(self) -> int:
        """Weights in the matrices of one layer that a token passes."""
        return self._layer_weights(self.experts_per_token)

    def _layer_weights(self, experts: int) -> int:
        sums = [sum(size_in * size_out for size_in, size_out in group.values()) for group in self.groups()]
        router = self.hidden * self.num_experts if self.num_experts > 1 else 0
        return sums[0] + sums[1] + experts * (sums[2] + sums[3]) + router

    @property
    def num_weights(self) -> int:
        """All weights of the model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.num_layers * self.layer_weights + embeddings + self.other


def base_size(config: Any) -> BaseSize:
    """Read the sizes of a base from its configuration.

    Args:
        config: A configuration of transformers for a model like Llama, Qwen, Mistral, Phi-3, Gemma or GPT-2, or a
            mapping with the same keys, such as ``config.json`` holds.

    Returns:
        The sizes. Norms and biases are counted from what the configuration says of them, close to one part in a
        thousand; matrices exactly.

    Raises:
        ConfigError: If a size is not there.

    Example:
        >>> size = base_size({"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        ...                   "num_attention_heads": 4, "vocab_size": 512})
        >>> size.layer_weights, size.num_weights
        (65536, 196928)
    """
    read = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kind = str(read.get("model_type") or "")
    hidden = _size(read, "hidden_size", "n_embd")
    layers = _size(read, "num_hidden_layers", "n_layer")
    heads = _size(read, "num_attention_heads", "n_head")
    key_heads = int(read.get("num_key_value_heads") or heads)
    head = int(read.get("head_dim") or hidden // heads)
    gpt2 = kind == "gpt2" or ("n_embd" in read and "n_inner" in read)
    inner = int(read.get("n_inner") or 4 * hidden) if gpt2 else _size(read, "intermediate_size")
    query, key_value = heads * head, key_heads * head
    if gpt2:
        each = 4 * hidden + (query + 2 * key_value) + hidden + inner + hidden  # two norms with biases, four biases
        other = layers * each + 2 * hidden + _size(read, "n_positions", "max_position_embeddings") * hidden
    else:
        each = 2 * hidden
        if read.get("attention_bias") or kind.startswith("qwen2"):
            each += query + 2 * key_value + (hidden if read.get("attention_bias") else 0)
        if kind.startswith("qwen3"):
            each += 2 * head  # norms of queries and keys
        other = layers * each + hidden
    experts = int(read.get("num_local_experts") or read.get("num_experts") or 1)
    return BaseSize(
        hidden=hidden,
        intermediate=int(read.get("moe_intermediate_size") or inner) if experts > 1 else inner,
        num_layers=layers,
        heads=heads,
        query=query,
        key_value=key_value,
        vocab=_size(read, "vocab_size"),
        layout="gpt2" if gpt2 else "phi3" if kind.startswith("phi3") else "llama",
        tied=bool(read.get("tie_word_embeddings", gpt2)),
        other=other,
        num_experts=experts,
        experts_per_token=int(read.get("num_experts_per_tok") or 1) if experts > 1 else 1,
    )


def _size(read: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = read.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ConfigError(f"the configuration of the base has no {' or '.join(names)}: its cost cannot be counted.")
