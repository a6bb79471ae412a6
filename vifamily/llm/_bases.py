"""The base of a run and its tokenizer, loaded as the settings say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vifamily.errors import ConfigError
from vifamily.llm._extra import pretrained, require

if TYPE_CHECKING:
    from vifamily.llm.running import RunSettings

__all__ = ["load_base", "load_tokenizer", "quantisation", "quantised"]

_QUANTISED = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
)
"""Settings of bitsandbytes on which the numbers of a base depend."""


def load_base(settings: RunSettings, name: str, where: Mapping[str, Any], device: torch.device) -> Any:
    """Load the base, quantised where that is asked for.

    Args:
        settings: Those of the run.
        name: Name or path of the base.
        where: Its revision, where it has one.
        device: Where a quantised base goes at once, since it is not moved later.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    how: dict[str, Any] = {"dtype": settings.dtype, **where}
    if settings.attn_implementation is not None:
        how["attn_implementation"] = settings.attn_implementation
    if settings.load_in_4bit or settings.load_in_8bit:
        asked: dict[str, Any] = {"load_in_4bit": settings.load_in_4bit, "load_in_8bit": settings.load_in_8bit}
        if settings.load_in_4bit:
            computed = "bfloat16" if settings.dtype == "auto" else settings.dtype
            asked |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computed}
        how |= quantised(asked, device)
    return pretrained("AutoModelForCausalLM", name, "the base", **how)


def quantised(asked: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments that load a base as bitsandbytes quantises it.

    Args:
        asked: What :func:`quantisation` gives.
        device: Where it goes at once, since it is not moved later.

    Raises:
        MissingExtraError: If bitsandbytes is not installed.
    """
    require("bitsandbytes", "loading a base in 4 or 8 bits")
    config = require("transformers", "loading a base").BitsAndBytesConfig
    known = {name: asked[name] for name in _QUANTISED if name in asked}
    return {"device_map": {"": device}, "quantization_config": config(**known)}


def quantisation(base: Any) -> dict[str, Any] | None:
    """How bitsandbytes quantised a base that is loaded, as plain values; None where it did not."""
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None or not any(getattr(config, name, False) for name in _QUANTISED[:2]):
        return None
    found = {name: getattr(config, name, None) for name in _QUANTISED}
    return {name: str(v).rpartition(".")[2] if isinstance(v, torch.dtype) else v for name, v in found.items()}


def load_tokenizer(settings: RunSettings, name: str, where: Mapping[str, Any]) -> Any:
    """Load the base's tokenizer, with what is given in the place of its own.

    Args:
        settings: Those of the run.
        name: Name or path of the base.
        where: Its revision, where it has one.

    Raises:
        ConfigError: If it cannot be loaded, or has no pad token.
    """
    tokenizer = pretrained("AutoTokenizer", name, "the tokenizer of the base", **where)
    for part in ("pad_token", "eos_token"):
        token = getattr(settings, part)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ConfigError(f"--{part} {token!r} is not in the tokenizer's vocabulary: choose a token that is.")
        setattr(tokenizer, part, token)
    if settings.chat_template_path is not None:
        try:
            tokenizer.chat_template = Path(settings.chat_template_path).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read --chat_template_path {settings.chat_template_path}: {error}.") from error
    if tokenizer.pad_token_id is None:
        hint = f" {tokenizer.eos_token!r}, its end-of-sequence token" if tokenizer.eos_token else ""
        raise ConfigError(
            f"the tokenizer of {name} has no pad token, which batches of unequal rows need: give --pad_token{hint}."
        )
    return tokenizer
