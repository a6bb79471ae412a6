"""Arguments of transformers that an ensemble cannot have."""

from __future__ import annotations

from typing import Any

from vifamily.errors import ConfigError

__all__ = ["check_arguments"]

_REFUSED = {
    "packing": "rows must stay apart to be routed",
    "padding_free": "rows must stay apart to be routed",
    "use_liger_kernel": "token log probabilities are computed in parts already",
    "label_smoothing_factor": "the loss is a likelihood",
    "neftune_noise_alpha": "members must see the same inputs",
}


def check_arguments(args: Any) -> None:
    """Refuse ``TrainingArguments`` that would change what a row or a likelihood is.

    Raises:
        ConfigError: If there is one.
    """
    for name, reason in _REFUSED.items():
        value = getattr(args, name, None)
        if value:
            raise ConfigError(f"{name}={value!r} cannot be used for an ensemble: {reason}. Leave it out.")
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} devices in one process cannot be used: start one process each, with torchrun or accelerate "
            "launch."
        )
