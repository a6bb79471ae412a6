"""Arguments of transformers that an ensemble cannot have."""

from __future__ import annotations

import math
from typing import Any

from vifamily.errors import ConfigError
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.stochastic import StochasticCausalLM

__all__ = ["check_arguments", "check_draws", "check_engines", "check_reference"]

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
    if not 0 <= args.learning_rate < math.inf:
        raise ConfigError(f"learning_rate must be a finite number from 0, got {args.learning_rate!r}.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} must be from 1, got {getattr(args, name)!r}.")
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} devices in one process cannot be used: start one process each, with torchrun or accelerate "
            "launch."
        )


def check_draws(model: StackedCausalLM, options: EnsembleOptions) -> None:
    """Refuse options that act on members where members are draws of one adapter.

    Raises:
        ConfigError: If there is one, or mean field has no prior.
    """
    if not isinstance(model, StochasticCausalLM):
        return
    for name in ("learn_weights", "routing_entropy", "reseed_below"):
        if getattr(options, name):
            raise ConfigError(
                f"{name}={getattr(options, name)!r} acts on members, which are draws of one adapter here: leave it out."
            )
    if model.family == "mean_field" and not options.prior_weight:
        raise ConfigError(
            "without a prior the standard deviations of mean field shrink to nothing: give prior_weight=, for the ELBO "
            "one over the number of scored tokens, or of pairs."
        )


def check_reference(options: EnsembleOptions, *, pairs: bool, known: bool) -> None:
    """Refuse an adapter as reference where there is none to have, or where another is known.

    Args:
        options: The ensemble's options.
        pairs: Whether preferences are trained on.
        known: Whether records say log probabilities under a reference.

    Raises:
        ConfigError: If it cannot be the reference.
    """
    folder = options.reference_adapter
    if folder is not None and not pairs:
        raise ConfigError("reference_adapter= is the reference policy of preferences: leave it out for answers.")
    if folder is not None and known:
        raise ConfigError(
            f"the records have ref_chosen_logps and ref_rejected_logps, and reference_adapter={folder!r} is another "
            "reference: leave one of them out."
        )


def check_engines(trainer: Any, *, sharded: bool, options: EnsembleOptions) -> None:
    """Refuse engines that an ensemble cannot be trained by, and groups over a base that is shared out.

    Args:
        trainer: A trainer of transformers.
        sharded: Whether the base is shared out over processes.
        options: The ensemble's options.

    Raises:
        ConfigError: If it cannot be trained so.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError(
            "ensembles are trained data-parallel: leave DeepSpeed and transformers' FSDP out. "
            "vifamily.llm.shard_base shares a base out over processes."
        )
    if sharded and options.unit == "group" and options.route != "ranks":
        raise ConfigError(
            "processes that share a base must take the same number of micro-batches, which groups of unequal size "
            "do not give: use route='ranks'."
        )
