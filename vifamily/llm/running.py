"""Training runs from flags named as in TRL and PEFT, or from one YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vifamily.checkpoint import prepare
from vifamily.errors import ConfigError, VifamilyError
from vifamily.llm._bases import load_base, load_tokenizer
from vifamily.llm._extra import pretrained, require
from vifamily.llm._formats import as_pairs, as_supervised, groups_of
from vifamily.llm._parsing import flag_parser, given_names, merged_words
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.adapter_files import start_from_adapter
from vifamily.llm.cost import step_cost
from vifamily.llm.data import prepare_pairs, prepare_sft
from vifamily.llm.laplace import adapter_laplace
from vifamily.llm.named_sets import converted
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.reading import read_records
from vifamily.llm.sharding import shard_base
from vifamily.llm.sizes import base_size
from vifamily.llm.stochastic import FAMILIES, StochasticCausalLM
from vifamily.llm.walsh import WalshCausalLM, WalshConfig
from vifamily.rng import generator

__all__ = ["RunSettings", "flags", "parse", "run_training"]

_ADAPTERS = ("lora", "walsh_hadamard")

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass
class RunSettings:
    """What a run from the command line needs beside :class:`EnsembleOptions` and ``TrainingArguments``.

    Attributes:
        model_name_or_path: The base: a folder, or a name on the hub.
        model_revision: Its branch, tag or commit.
        dtype: Its dtype: auto, float32, bfloat16 or float16.
        load_in_4bit: Whether bitsandbytes loads its linear layers in four bits (nf4, computed in dtype).
        load_in_8bit: Whether it does in eight.
        attn_implementation: How it computes attention, such as eager, sdpa or flash_attention_2; None leaves that to
            transformers.
        pad_token: A token of the tokenizer's vocabulary that fills up batches, where it has none; its end-of-sequence
            token will do, since what fills up is never scored.
        eos_token: A token that ends answers, in the place of the tokenizer's.
        chat_template_path: A file with a chat template, in the place of the tokenizer's.
        dataset_name: A file (.jsonl, .json, .parquet) or the name of a data set on the hub.
        dataset_config: Which of several data sets under one name on the hub.
        dataset_format: How records become ones of TRL: mmlu or or_bench; none is needed for TRL's formats.
        dataset_train_split: Split to train on, of a data set on the hub.
        dataset_test_split: Split to evaluate on, of the same.
        eval_file: A file to evaluate on.
        num_members: Number of members.
        member_seed: Seed of the members' first matrices.
        adapter: Kind of the adapters: lora, or walsh_hadamard (changes of full rank by three numbers for each input and
            square block; no PEFT adapters when they are saved).
        walsh_scale: Factor of the change that a Walsh-Hadamard adapter makes.
        lora_r: Rank of the adapters.
        lora_alpha: Their scale is this over the rank.
        lora_target_modules: Layers that are adapted, by either kind, separated by spaces or commas; all-linear takes
            every linear layer.
        use_rslora: Whether the scale is over the root of the rank.
        shard_base: Whether processes share out the weights of the base.
        dry_run: Whether to stop once the data are read and the cost of a step is counted; the weights of the base are
            not loaded, and nothing is written.
        initial_adapter: Folder of a PEFT adapter that members start near; for preferences it is the reference too,
            unless reference_adapter names another.
        initial_noise: Size of the noise by which they differ there, relative to the adapter's matrices.
        family: points (members of their own), or a baseline with one adapter whose draws are the members: mean_field
            (Bayes by backprop), dropout (Monte-Carlo dropout on the adapter's inputs), laplace (a Gaussian fitted after
            training). With these, renyi_alpha is 0 unless it is given.
        lora_dropout: Probability for family dropout.
    """

    model_name_or_path: str = ""
    model_revision: str = "main"
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    attn_implementation: str | None = None
    pad_token: str | None = None
    eos_token: str | None = None
    chat_template_path: str | None = None
    dataset_name: str = ""
    dataset_config: str | None = None
    dataset_format: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_file: str | None = None
    num_members: int = 4
    member_seed: int = 0
    adapter: str = "lora"
    walsh_scale: float = 1.0
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: list[str] = dataclasses.field(default_factory=lambda: ["all-linear"])
    use_rslora: bool = False
    shard_base: bool = False
    dry_run: bool = False
    initial_adapter: str | None = None
    initial_noise: float = 0.1
    family: str = "points"
    lora_dropout: float = 0.1


def flags() -> list[tuple[str, str]]:
    """Flags of a run that are not those of ``TrainingArguments``, each with its default.

    Example:
        >>> dict(flags())["num_members"]
        '4'
    """
    out = []
    for kind in (RunSettings, EnsembleOptions):
        for field in dataclasses.fields(kind):
            default = " ".join(field.default_factory()) if callable(field.default_factory) else field.default
            out.append((field.name, "" if default in (None, "") else str(default)))
    return out


def parse(arguments: Sequence[str], config: Path | None = None) -> tuple[RunSettings, EnsembleOptions, Any]:
    """Read flags, and a YAML file whose values they override.

    Args:
        arguments: Flags with their values, such as ``["--num_members", "8"]``.
        config: A YAML file of the same names, or the name of one of :func:`~vifamily.llm.ready.configs`.

    Returns:
        Settings of the run, options of the ensemble, and ``transformers.TrainingArguments``.

    Raises:
        ConfigError: If a flag or a name in the file is unknown, or a value cannot be used.
    """
    transformers = require("transformers", "training an ensemble")
    parser = flag_parser((RunSettings, EnsembleOptions, transformers.TrainingArguments))
    given = merged_words(arguments, config, parser)
    try:
        settings, options, training = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        said = str(error).replace("Some specified arguments are not used by the HfArgumentParser", "of no flag are")
        raise error if isinstance(error, ConfigError) else ConfigError(said) from error
    for name in ("model_name_or_path", "dataset_name"):
        if not getattr(settings, name):
            raise ConfigError(f"--{name} is missing: give it, or write it in the file of --config.")
    if settings.family not in ("points", "laplace", *FAMILIES):
        raise ConfigError(f"--family must be points, laplace or one of {', '.join(FAMILIES)}, got {settings.family!r}.")
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ConfigError("--load_in_4bit and --load_in_8bit exclude each other: choose one.")
    if settings.dtype not in _DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(_DTYPES)}, got {settings.dtype!r}.")
    _check_adapter(settings, given)
    if settings.family != "points":
        if settings.initial_adapter is not None:
            raise ConfigError("--initial_adapter starts members of their own: leave it out, or use --family points.")
        if "renyi_alpha" not in given_names(given):
            options = dataclasses.replace(options, renyi_alpha=0.0)
    return settings, options, training


def run_training(
    kind: str,
    settings: RunSettings,
    options: EnsembleOptions,
    training: Any,
    say: Callable[[str], None] = print,
) -> Path:
    """Train an ensemble and save it.

    Args:
        kind: ``"sft"`` or ``"dpo"``.
        settings: What to train, and on what.
        options: The ensemble's objective.
        training: ``transformers.TrainingArguments``.
        say: Called with a line on what is being done.

    Returns:
        The folder that :meth:`~vifamily.llm.ensemble.Ensemble.from_pretrained` reads.

    Raises:
        ConfigError: If something cannot be used.
        DataError: If the data cannot.
    """
    trainer = require("vifamily.llm.trainer", "training an ensemble")
    if training.process_index:
        say = _nothing  # the first process speaks for all
    if not settings.dry_run:
        prepare(training.output_dir)
    records = _records(settings, settings.dataset_name, settings.dataset_train_split)
    held = None
    if settings.eval_file is not None:
        held = _records(settings, settings.eval_file, "train")
    elif settings.dataset_test_split is not None:
        held = _records(settings, settings.dataset_name, settings.dataset_test_split)
    for some in (records, held or []):  # before the base is loaded, which may take minutes
        _check_records(kind, some, options)
    name = settings.model_name_or_path
    where: dict[str, Any] = {} if Path(name).exists() else {"revision": settings.model_revision}
    tokenizer = load_tokenizer(settings, name, where)
    if settings.dry_run:
        config = pretrained("AutoConfig", name, "the settings of the base", **where)
        _rehearse(kind, settings, options, training, records, tokenizer, config, say)
        return Path(training.output_dir)
    base = load_base(settings, name, where, training.device)
    model = _stack(settings, base)
    if settings.initial_adapter is not None:
        start_from_adapter(model, settings.initial_adapter, noise=settings.initial_noise, seed=settings.member_seed)
        if kind == "dpo" and options.reference_adapter is None:
            options = dataclasses.replace(options, reference_adapter=settings.initial_adapter)
    if settings.shard_base:
        _ = training.device  # processes meet when it is asked for
        shard_base(model)
    maker = trainer.DPOEnsembleTrainer if kind == "dpo" else trainer.SFTEnsembleTrainer
    try:
        run = maker(model, training, records, held, tokenizer, options=options)
    except VifamilyError:
        raise
    except (ValueError, RuntimeError, ImportError, OSError) as error:  # what transformers says of its own arguments
        raise ConfigError(f"the run cannot be set up: {error}") from error
    say(f"data: {run.prepared}")
    longest = max(row.length for row in run.prepared)
    each = sum(p.numel() for p in model.adapter_parameters()) // model.num_members
    precision = next(p.dtype for p in model.base.parameters() if p.is_floating_point())
    say(_cost(model.config, model.target_names, each, precision, settings, options, training, longest, kind))
    again = training.resume_from_checkpoint
    run.train(resume_from_checkpoint=str(again).lower() == "true" or again if again else None)
    if settings.family == "laplace":
        source = generator(settings.member_seed, "llm/laplace")
        found = adapter_laplace(model, list(run.prepared), generator=source, beta=options.beta)
        say(str(found))
        found.draw_members(model, settings.num_members, generator=source)
    if held is not None:
        run.evaluate()
    run.save_model(training.output_dir)
    say(f"wrote {training.output_dir}")
    return Path(training.output_dir)


# --- parts ---


def _records(settings: RunSettings, name: str, split: str) -> list[dict[str, Any]]:
    found = read_records(name, split=split, subset=settings.dataset_config)
    return found if settings.dataset_format is None else converted(found, settings.dataset_format)


def _check_records(kind: str, records: list[dict[str, Any]], options: EnsembleOptions) -> None:
    """Refuse records that are in no format of the kind of training."""
    if records:
        (as_pairs if kind == "dpo" else as_supervised)(records)
        groups_of(records, options.group_column)


def _check_adapter(settings: RunSettings, given: Sequence[str]) -> None:
    """Refuse flags that do not go with the kind of adapters."""
    if settings.adapter not in _ADAPTERS:
        raise ConfigError(f"--adapter must be one of {', '.join(_ADAPTERS)}, got {settings.adapter!r}.")
    names = given_names(given)
    if settings.family != "dropout" and "lora_dropout" in names and settings.lora_dropout:
        raise ConfigError(
            f"--lora_dropout {settings.lora_dropout:g} is for --family dropout alone: responsibilities and gradients "
            "must see the same members. Leave it out."
        )
    if settings.adapter == "lora":
        return
    if settings.family != "points":
        raise ConfigError(
            f"--family {settings.family} is made for LoRA adapters: leave it out, or use --adapter lora. A small model "
            "with uncertain Walsh-Hadamard weights is vifamily.models.CausalLM."
        )
    if settings.initial_adapter is not None:
        raise ConfigError("--initial_adapter is a LoRA adapter, which others cannot start from: leave it out.")
    for name in ("lora_r", "lora_alpha", "use_rslora"):
        if name in names:
            raise ConfigError(f"--{name} is of LoRA adapters: with --adapter {settings.adapter} leave it out.")


def _stack(settings: RunSettings, base: Any) -> StackedCausalLM:
    """Members of their own, draws of one adapter, or the one member at which Laplace's approximation is made."""
    names = [name.strip() for word in settings.lora_target_modules for name in word.split(",") if name.strip()]
    targets = "all-linear" if names == ["all-linear"] else names
    if settings.adapter == WalshCausalLM.adapter:
        walsh = WalshConfig(targets, scale=settings.walsh_scale)
        return WalshCausalLM(base, walsh, settings.num_members, seed=settings.member_seed)
    config = require("peft", "training an ensemble").LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if settings.family in FAMILIES:
        return StochasticCausalLM(
            base,
            config,
            settings.num_members,
            family=settings.family,
            dropout=settings.lora_dropout,
            seed=settings.member_seed,
        )
    members = 1 if settings.family == "laplace" else settings.num_members
    return StackedCausalLM(base, config, members, seed=settings.member_seed)


def _rehearse(
    kind: str,
    settings: RunSettings,
    options: EnsembleOptions,
    training: Any,
    records: list[dict[str, Any]],
    tokenizer: Any,
    config: Any,
    say: Callable[[str], None],
) -> None:
    """Read the data and count the cost, over a base without weights."""
    prepare_rows: Any = prepare_pairs if kind == "dpo" else prepare_sft
    more = {} if kind == "dpo" else {"completion_only_loss": options.completion_only_loss}
    shared = {"max_length": options.max_length, "overlong": options.overlong, "group_column": options.group_column}
    rows = prepare_rows(records, tokenizer, **shared, **more)
    dtype = config.dtype or torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with torch.device("meta"):
        auto = require("transformers", "counting the cost of a step").AutoModelForCausalLM
        base = auto.from_config(config, dtype=dtype)
    model = _stack(settings, base)
    say(f"data: {rows}")
    each = sum(p.numel() for p in model.adapter_parameters()) // model.num_members
    longest = max(row.length for row in rows)
    say(_cost(config, model.target_names, each, dtype, settings, options, training, longest, kind))
    say("a dry run: the weights of the base were not loaded, nothing was trained, and nothing is written.")


def _precision(settings: RunSettings, dtype: torch.dtype) -> str:
    """What the weights of the base are held in, as the cost model calls it."""
    if settings.load_in_4bit:
        return "nf4"
    return "int8" if settings.load_in_8bit else str(dtype).rpartition(".")[2]


def _nothing(_: str) -> None:
    """Say nothing."""


def _cost(
    config: Any,
    targets: Sequence[str],
    each: int,
    precision: torch.dtype,
    settings: RunSettings,
    options: EnsembleOptions,
    training: Any,
    longest: int,
    kind: str,
) -> str:
    """What a step takes, counted before the first one; a sentence where the sizes of the base cannot be read."""
    if settings.adapter != "lora":
        return f"cost of a step: counted for LoRA alone. Members have {each} numbers each."
    try:
        size = base_size(config)
        rows = training.per_device_train_batch_size
        return str(
            step_cost(
                size,
                num_members=settings.num_members,
                lora_r=settings.lora_r,
                batch_size=rows * (2 if kind == "dpo" else 1) * max(1, training.world_size),
                length=max(2, longest),
                target_modules=tuple(sorted({name.rpartition(".")[2] for name in targets})),
                gradient_checkpointing=bool(training.gradient_checkpointing),
                route="two_pass" if options.route == "two_pass" else "stacked",
                base_precision=_precision(settings, precision),
                preferences=kind == "dpo",
                devices=max(1, training.world_size),
                sharded=settings.shard_base,
            )
        )
    except VifamilyError as error:
        return f"cost of a step: not counted. {error}"
