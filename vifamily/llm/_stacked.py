"""Members of an ensemble of low-rank adapters, stacked over one frozen language model and evaluated in one pass."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vifamily.errors import ConfigError, DataError, IncompatibleError, ShapeError
from vifamily.llm._head import Head, token_log_prob
from vifamily.llm._layers import StackedAdapter, StackedLoRA
from vifamily.llm._selection import Selection
from vifamily.llm._targets import adapter_scale, check_lora_config, refuse_packed, target_names

__all__ = ["StackedCausalLM", "StackedLoRA", "completion_rows"]

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.")


class StackedCausalLM(nn.Module):
    """An ensemble of low-rank adapters over one frozen causal language model.

    The base is changed in place: layers that are adapted are wrapped, its parameters are frozen and its dropout is
    set to zero. Members are evaluated in one pass, with the frozen layers below the first adapted one run once.

    Args:
        base: A causal language model of transformers.
        config: A ``peft.LoraConfig``: which layers, rank and scale.
        num_members: Number of members.
        seed: Seed of the members' first matrices; each member has a stream of its own.
        adapter_dtype: Dtype of the adapters; float32 over half precision, otherwise that of the base.

    Attributes:
        base: The frozen model.
        adapter: The kind of its adapters.
        adapter_config: What was given.
        num_members: Number of members.
        log_weight: Log weights of the members, ``(member,)``; equal at first.
        known_digest: Digest of the base, where its numbers are no longer all here; None otherwise.

    Raises:
        ConfigError: If the settings cannot be those of an ensemble, or match no layer.
        IncompatibleError: If the model's logits are not those of its output layer.

    Example:
        >>> from peft import LoraConfig  # doctest: +SKIP
        >>> base = AutoModelForCausalLM.from_pretrained("my-model")  # doctest: +SKIP
        >>> model = StackedCausalLM(base, LoraConfig(r=8, target_modules="all-linear"), 4)  # doctest: +SKIP
    """

    accepts_loss_kwargs = True
    adapter: ClassVar[str] = "lora"
    log_weight: Tensor

    def __init__(
        self,
        base: nn.Module,
        config: Any,
        num_members: int,
        *,
        seed: int = 0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_members, bool) or not isinstance(num_members, int) or num_members < 1:
            raise ConfigError(f"num_members must be an integer from 1, got {num_members!r}.")
        if any(isinstance(module, StackedAdapter) for module in base.modules()):
            raise ConfigError("this base has members already: load it again for another ensemble.")
        names = self._matched(base, config)
        self.adapter_config, self.num_members = config, num_members
        self.known_digest: str | None = None
        self.selection = Selection(num_members)
        self._head = Head(base)
        _freeze(base)
        dtype = adapter_dtype or _adapter_dtype(base)
        for index, name in enumerate(names):
            layer = base.get_submodule(name)
            wrapped = self._wrapped(layer, seed, index, dtype)
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, wrapped)
        self.target_names = tuple(names)
        self.base = base
        self.register_buffer("log_weight", torch.full((num_members,), -math.log(num_members), dtype=torch.float64))
        self._repeats_inside = self._install_repeat(names)
        self._check_head()

    # --- what others look for ---

    @property
    def config(self) -> Any:
        """The configuration of the base."""
        return self.base.config

    @property
    def lora_config(self) -> Any:
        """The settings of the adapters, by their name for LoRA: ``adapter_config``."""
        return self.adapter_config

    @property
    def generation_config(self) -> Any:
        """The generation settings of the base."""
        return getattr(self.base, "generation_config", None)

    @property
    def device(self) -> torch.device:
        """Where the adapters are."""
        return next(self.adapters())[1].trained[0].device

    def adapters(self) -> Iterator[tuple[str, StackedAdapter]]:
        """Names of the adapted layers in the base, each with its adapters."""
        for name in self.target_names:
            layer = self.base.get_submodule(name)
            if isinstance(layer, StackedAdapter):
                yield name, layer

    def lora_adapters(self) -> Iterator[tuple[str, StackedLoRA]]:
        """The same, for what is made of two matrices.

        Raises:
            ConfigError: If members are adapters of another kind.
        """
        for name, layer in self.adapters():
            if not isinstance(layer, StackedLoRA):
                raise ConfigError(f"this needs LoRA adapters, and members here are of the kind {self.adapter!r}.")
            yield name, layer

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained of all members, member first."""
        for _, layer in self.adapters():
            yield from layer.trained

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Compute layers again in the backward pass rather than keep what they need.

        Each layer is computed again under the members of its forward pass, whichever are chosen by then.

        Args:
            gradient_checkpointing_kwargs: As in transformers; ``use_reentrant`` must not be True.

        Raises:
            ConfigError: If the reentrant kind is asked for.
        """
        given = dict(gradient_checkpointing_kwargs or {})
        if given.pop("use_reentrant", False):
            raise ConfigError("gradient checkpointing of an ensemble must not be reentrant: use use_reentrant=False.")
        given |= {"use_reentrant": False, "context_fn": self.selection.checkpoint_contexts}
        self.base._set_gradient_checkpointing(  # type: ignore[operator]
            enable=True, gradient_checkpointing_func=functools.partial(checkpoint, **given)
        )

    def gradient_checkpointing_disable(self) -> None:
        """Keep what layers need for the backward pass."""
        self.base._set_gradient_checkpointing(enable=False)  # type: ignore[operator]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Do the same, under the name and with the arguments that transformers has for it from version 5.

        Raises:
            ConfigError: If layers are to be skipped or activations moved to the CPU.
        """
        if every_n_layers != 1 or offload:
            raise ConfigError("an ensemble checkpoints every layer, where it is: leave every_n_layers and offload out.")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    # --- log probabilities ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        members: tuple[int, int] | None = None,
        *,
        adapters: bool = True,
    ) -> Tensor:
        """Log probabilities of the tokens that are scored, in the order of rows and positions.

        Args:
            input_ids: ``(row, position)``.
            attention_mask: The same shape; padding is on the right.
            completion_mask: The same shape, true where a token is scored; the first of a row never is.
            members: The first member and the one after the last; None takes all.
            adapters: False scores the base, as one member.

        Returns:
            ``(member, token)``, in float32 or better. :func:`completion_rows` tells the row of each token.
        """
        if torch.is_grad_enabled():
            refuse_packed((name, layer.base_layer) for name, layer in self.adapters())
        chosen = (members or (0, self.num_members)) if adapters else None
        count = 1 if chosen is None else chosen[1] - chosen[0]
        scored = completion_mask[:, 1:].bool()
        with self.selection.using(chosen, len(input_ids)):
            outside = 1 if self._repeats_inside else count
            hidden = self.base.base_model(  # type: ignore[operator]
                input_ids=input_ids.repeat(outside, 1),
                attention_mask=attention_mask.repeat(outside, 1),
                use_cache=False,
            ).last_hidden_state
        if len(hidden) != count * len(input_ids):
            raise ShapeError(f"the model gave {len(hidden)} rows for {count} members of {len(input_ids)}.")
        hidden = hidden.unflatten(0, (count, -1))[:, :, :-1][:, scored]
        token = input_ids[:, 1:][scored]
        value = token_log_prob(
            hidden.flatten(0, 1), token.repeat(count), self._head, num_tokens=int(self.config.vocab_size)
        )
        return value.reshape(count, len(token))

    def row_log_prob(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, **options: Any
    ) -> Tensor:
        """Log probability of each row's completion, ``(member, row)``; arguments are those of :meth:`forward`."""
        value: Tensor = self(input_ids, attention_mask, completion_mask, **options)
        out = value.new_zeros(len(value), len(input_ids))
        return out.index_add(1, completion_rows(completion_mask), value)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states; all of them, so for few positions."""
        out: Tensor = self._head(hidden)
        return out

    # --- construction ---

    def _matched(self, base: nn.Module, config: Any) -> list[str]:
        """Names of the layers that are adapted, once the settings are known to be those of an ensemble."""
        check_lora_config(config)
        return target_names(base, config)

    def _wrapped(self, layer: nn.Module, seed: int, index: int, dtype: torch.dtype) -> StackedAdapter:
        """A layer with adapters as they start."""
        config = self.adapter_config
        out = StackedLoRA(layer, self.num_members, config.r, adapter_scale(config), self.selection, dtype)
        out.start(seed, index, config.init_lora_weights)
        return out

    def _install_repeat(self, names: list[str]) -> bool:
        """Repeat rows at the first decoder layer that is adapted, when there are layers below it."""
        found = [_LAYER.match(name) for name in names]
        stacks = {match["stack"] for match in found if match}
        if len(stacks) != 1 or not all(found):
            return False
        first = min(int(match["index"]) for match in found if match)
        layers = self.base.get_submodule(stacks.pop())
        if not first or not isinstance(layers, nn.ModuleList):
            return False
        for layer in list(layers)[first:]:
            layer.register_forward_pre_hook(self._repeat, with_kwargs=True)
        return True

    def _repeat(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        count, rows = self.selection.count, self.selection.rows
        if count == 1:
            return None

        def repeat(value: Any, name: str = "") -> Any:
            if isinstance(value, tuple):
                return tuple(repeat(v, name) for v in value)
            # matrices are left alone unless they are known to have rows: a table of positions may be as long by chance
            wide = isinstance(value, Tensor) and (value.dim() > 2 or name in ("position_ids", "attention_mask"))
            return value.repeat(count, *[1] * (value.dim() - 1)) if wide and value.shape[0] == rows else value

        return repeat(args), {name: repeat(value, name) for name, value in kwargs.items()}

    @torch.no_grad()
    def _check_head(self) -> None:
        if self.device.type == "meta":
            return  # a base without weights, whose sizes alone are asked for
        token = torch.arange(2, device=self.device).unsqueeze(0) % int(self.config.vocab_size)
        asked = {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": False}
        with self.selection.using(None, 1), _training(self.base):
            hidden = self.base.base_model(**asked).last_hidden_state  # type: ignore[operator]
            theirs = self.base(**asked).logits.float()
            ours = self._head(hidden).float()
        if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
            raise IncompatibleError(
                f"the logits of {type(self.base).__name__} are not those of its output layer, so log probabilities "
                "cannot be computed in parts. Use another base."
            )


def completion_rows(completion_mask: Tensor) -> Tensor:
    """Row of each scored token, ``(token,)``, in the order of rows and positions.

    Raises:
        DataError: If a row has no token to score.

    Example:
        >>> completion_rows(torch.tensor([[False, True, True], [False, False, True]]))
        tensor([0, 0, 1])
    """
    scored = completion_mask[:, 1:].bool()
    empty = (~scored.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(f"rows {empty[:5]} have no token to score: each needs an answer after its prompt.")
    return scored.nonzero()[:, 0]


@contextlib.contextmanager
def _training(base: nn.Module) -> Iterator[None]:
    """Put a base in training mode, in which some quantised layers keep the form that they are trained in."""
    modes = {module: module.training for module in base.modules()}
    base.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _freeze(base: nn.Module) -> None:
    base.requires_grad_(requires_grad=False)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _adapter_dtype(base: nn.Module) -> torch.dtype:
    kinds = {p.dtype for p in base.parameters() if p.is_floating_point()}
    return torch.float64 if kinds == {torch.float64} else torch.float32
