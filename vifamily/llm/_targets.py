"""Which layers of a model get adapters, and which settings of PEFT an ensemble can have."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from vifamily.errors import ConfigError, IncompatibleError
from vifamily.llm._extra import require

__all__ = ["adapter_scale", "check_lora_config", "features", "is_linear", "matching", "refuse_packed", "target_names"]

_UNSET: tuple[Any, ...] = (None, False, "none", "", (), [], {})
_REASONS = {
    "use_dora": "DoRA rescales the merged weight of each member, which stacked adapters do not form",
    "modules_to_save": "a module trained whole would be a copy of it for each member",
    "bias": "biases belong to the base, which members share",
    "lora_bias": "members are stacked as two matrices each",
    "rank_pattern": "members and layers share one rank",
    "alpha_pattern": "members and layers share one scale",
    "trainable_token_indices": "embeddings belong to the base, which members share",
    "layer_replication": "members share the layers of the base",
    "target_parameters": "only linear layers can be adapted",
    "use_qalora": "it changes the form of the adapters",
    "alora_invocation_tokens": "members are active at every token",
    "monteclora_config": "it changes the form of the adapters",
    "arrow_config": "it is another way to route",
    "velora_config": "it changes how gradients are computed",
    "kasa_config": "it changes the form of the adapters",
    "use_bdlora": "it changes the form of the adapters",
}


def check_lora_config(config: Any) -> None:
    """Refuse settings of a PEFT ``LoraConfig`` that stacked members cannot have.

    Raises:
        ConfigError: If a setting asks for what an ensemble of plain adapters is not.
    """
    for name, reason in _REASONS.items():
        value = getattr(config, name, None)
        if value not in _UNSET:
            raise ConfigError(f"LoraConfig({name}={value!r}) cannot be used for an ensemble: {reason}. Leave it out.")
    if getattr(config, "lora_dropout", 0.0):
        raise ConfigError(
            f"LoraConfig(lora_dropout={config.lora_dropout!r}) cannot be used for an ensemble: responsibilities and "
            "gradients must see the same members. Use lora_dropout=0.0."
        )
    if config.init_lora_weights not in (True, "gaussian"):
        raise ConfigError(
            f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) cannot be used for an ensemble: members must "
            "start apart, with a base that stays as it is. Use True or 'gaussian'."
        )
    if isinstance(config.r, bool) or not isinstance(config.r, int) or config.r < 1:
        raise ConfigError(f"LoraConfig(r={config.r!r}) must be an integer from 1.")
    scale = config.lora_alpha
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ConfigError(f"LoraConfig(lora_alpha={scale!r}) must be a positive number, or adapters change nothing.")


def adapter_scale(config: Any) -> float:
    """Factor of the product of the two matrices: ``lora_alpha / r``, or over its root with ``use_rslora``."""
    return float(config.lora_alpha) / (math.sqrt(config.r) if config.use_rslora else config.r)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer maps its last axis linearly: ``nn.Linear`` and its kin, GPT-2's ``Conv1D``, or a quantised one.

    Quantised layers need not be of ``nn.Linear``; like PEFT, this goes by the sizes they state.
    """
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)


def features(module: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    size_in, size_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(size_in, int) and isinstance(size_out, int):
        return size_in, size_out
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise IncompatibleError(f"a layer of class {type(module).__name__} has no weight to read its size from.")
    return int(weight.shape[0]), int(weight.shape[1])


def refuse_packed(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to train over layers of four bits that bitsandbytes has packed anew for evaluation on a CPU.

    It packs them when they are evaluated without gradients, and the gradients that pass through them later are wrong.

    Raises:
        IncompatibleError: If there is such a layer.
    """
    for name, layer in layers:
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise IncompatibleError(
                f"bitsandbytes has packed {name} for evaluation on the CPU, and gradients through it would be wrong: "
                "train in 8 bits, on a GPU, or without evaluations before the end."
            )


def target_names(base: nn.Module, config: Any) -> list[str]:
    """Names of the layers that get adapters, matched as PEFT matches them.

    Args:
        base: A causal language model of transformers.
        config: A ``LoraConfig``; its ``target_modules`` may be None, a list, a pattern, or ``"all-linear"``.

    Returns:
        Names in the order of the model.

    Raises:
        ConfigError: If nothing matches, or the output head or an embedding does.
    """
    config = copy.copy(config)
    if config.target_modules is None:
        known = require("peft.utils.constants", "matching layers by name")
        kind = getattr(getattr(base, "config", None), "model_type", None)
        found = known.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if found is None:
            raise ConfigError(
                f"PEFT has no default layers for models of type {kind!r}: give LoraConfig(target_modules=...), for "
                "example 'all-linear'."
            )
        config.target_modules = set(found)
    tuners = require("peft.tuners.tuners_utils", "matching layers by name")
    config = tuners._maybe_include_all_linear_layers(config, base)
    modules = dict(base.named_modules())
    names = matching(
        [name for name, module in modules.items() if name and not isinstance(module, nn.ModuleList)], config
    )
    for name in names:
        module = modules[name]
        if module is _head(base):
            raise ConfigError(
                f"target_modules must not name the output head ({name}): servers do not apply adapters on it when "
                "they score prompts, and the head is evaluated in parts. Leave it out."
            )
        if not is_linear(module):
            raise ConfigError(
                f"target_modules names {name}, a {type(module).__name__}: only linear layers can be adapted."
            )
    if not names:
        raise ConfigError(
            f"target_modules={_shown(config.target_modules)} matches no layer of {type(base).__name__}. Linear layers "
            f"are called {', '.join(_linear_endings(base))}."
        )
    return names


def matching(names: Sequence[str], config: Any) -> list[str]:
    """Those of some names that PEFT would adapt under a ``LoraConfig`` with a list or pattern of layers."""
    check = require("peft.tuners.tuners_utils", "matching layers by name").check_target_module_exists
    return [name for name in names if check(config, name)]


def _head(base: nn.Module) -> nn.Module | None:
    getter = getattr(base, "get_output_embeddings", None)
    return None if getter is None else getter()


def _linear_endings(base: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in base.named_modules() if is_linear(module)})


def _shown(targets: Any) -> str:
    return repr(sorted(targets)) if isinstance(targets, (set, list, tuple)) else repr(targets)
