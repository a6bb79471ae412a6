"""The commands ``vifamily llm ...``; transformers is imported when one of them needs it."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vifamily.errors import VifamilyWarning
from vifamily.llm import ready, running
from vifamily.llm._extra import require
from vifamily.llm.manifest import read_manifest
from vifamily.llm.reading import read_records
from vifamily.llm.serving import vllm_command
from vifamily.report import png, write_bytes
from vifamily.rng import generator

__all__ = ["llm_app"]

_RUN_EXAMPLE = (
    "vifamily llm sft --model_name_or_path Qwen/Qwen2-1.5B --dataset_name answers.jsonl --num_members 4 "
    "--renyi_alpha 0.8 --renyi_alpha_start 0.01 --renyi_alpha_warmup_steps 200 --output_dir results/ensemble"
)
_DPO_EXAMPLE = (
    "vifamily llm dpo --model_name_or_path Qwen/Qwen2-1.5B --dataset_name pairs.jsonl --unit group "
    "--group_column annotator --beta 0.1 --output_dir results/ensemble"
)
_FREE = {"allow_extra_args": True, "ignore_unknown_options": True}

Folder = Annotated[Path, typer.Argument(help="Folder of a saved ensemble.")]
Data = Annotated[str, typer.Argument(help="A file (.jsonl, .json, .parquet) or a data set on the hub.")]
Base = Annotated[str | None, typer.Option(help="The base, where it is not the one that the folder names.")]
Reference = Annotated[
    str | None,
    typer.Option(help="Adapter that preferences are scored against; by default that of training."),
]
Beta = Annotated[
    float | None, typer.Option(help="Beta of preferences; by default the one that the ensemble was trained with.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="A YAML file of the same names, or a name of `vifamily llm configs`; flags override it."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def llm_app(clean: Callable[[Callable[..., int]], Callable[..., None]]) -> typer.Typer:
    """Make the sub-commands.

    Args:
        clean: Turns the package's errors into one line and an exit code.

    Returns:
        What ``vifamily llm`` runs.
    """
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Language models: train and use ensembles of LoRA adapters. Needs: pip install 'vifamily[llm]'.",
        epilog="Example:  vifamily llm demo --out results/demo",
    )
    for name, command, example, free in (
        ("sft", _sft, _RUN_EXAMPLE, True),
        ("dpo", _dpo, _DPO_EXAMPLE, True),
        ("eval", _eval, "vifamily llm eval results/ensemble held_out.jsonl", False),
        ("generate", _generate, 'vifamily llm generate results/ensemble "Question: ..." --speaker mixture', False),
        ("route", _route, "vifamily llm route results/ensemble held_out.jsonl --out routing.png", False),
        ("inspect", _inspect, "vifamily llm inspect results/ensemble", False),
        ("configs", _configs, "vifamily llm sft --config mmlu-qwen2-1.5b", False),
        ("demo", _demo, "vifamily llm demo --out results/demo", False),
    ):
        settings = _FREE if free else None
        app.command(name, epilog=f"Example:  {example}", context_settings=settings)(clean(_warned(command)))
    return app


def _warned(command: Callable[..., int]) -> Callable[..., int]:
    """Say the package's warnings as sentences, without the line of code that they come from."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> int:
        with warnings.catch_warnings():
            usual = warnings.showwarning

            def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, VifamilyWarning):
                    typer.echo(f"warning: {message}", err=True)
                else:
                    usual(message, category, *where, **more)

            warnings.showwarning = show
            return command(*args, **kwargs)

    return run


# --- training ---


def _sft(context: typer.Context, *, config: Config = None, debug: Debug = False) -> int:
    """Fine-tune an ensemble on answers.

    Flags are named as in TRL and PEFT: --model_name_or_path, --dataset_name, --num_members, --lora_r, --lora_alpha,
    --lora_target_modules, --renyi_alpha, --routing_entropy (moves alpha to hold it), --reseed_below (members that
    died are put beside live ones), --adapter (lora, walsh_hadamard), --family (mean_field, dropout, laplace: baselines
    whose draws are members), --unit, --group_column and all of transformers' TrainingArguments, such as --output_dir,
    --learning_rate, --report_to (tensorboard, wandb and others, where they are installed) and --resume_from_checkpoint
    (true for the newest one).
    `vifamily llm sft --flags` lists ours with their defaults.
    """
    return _train("sft", context.args, config)


def _dpo(context: typer.Context, *, config: Config = None, debug: Debug = False) -> int:
    """Fine-tune an ensemble on preferences, against the base as reference, or against a trained adapter.

    Flags are those of `vifamily llm sft`, with --beta; --unit is sequence (a pair) or group. --reference_adapter names
    the folder of a PEFT adapter that is the reference; --initial_adapter one that members start near, too.
    """
    return _train("dpo", context.args, config)


def _train(kind: str, arguments: list[str], config: Path | None) -> int:
    if "--flags" in arguments:
        for name, default in running.flags():
            typer.echo(f"--{name} {default}".rstrip())
        return 0
    settings, options, training = running.parse(arguments, config)
    running.run_training(kind, settings, options, training, typer.echo)
    return 0


# --- using an ensemble ---


def _loaded(folder: Path, base: str | None) -> Any:
    return require("vifamily.llm.ensemble", "loading an ensemble").Ensemble.from_pretrained(folder, base=base)


def _eval(
    folder: Folder,
    data: Data,
    *,
    base: Base = None,
    split: str = "test",
    beta: Beta = None,
    reference_adapter: Reference = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Score held-out answers or preferences under the mixture and under each member."""
    from vifamily.diagnostics.routing import mixture_log_score

    records, ensemble = read_records(data, split=split), _loaded(folder, base)
    ll, _ = _scored(ensemble, records, beta, reference_adapter, None)
    score = mixture_log_score(ll, ensemble.log_weight)
    if as_json:
        typer.echo(json.dumps({**score.to_dict(), "member_scores": ll.mean(1).tolist()}, indent=1))
    else:
        typer.echo(str(score))
    return 0


def _scored(ensemble: Any, records: list[Any], beta: float | None, reference: str | None, column: str | None) -> Any:
    """Log likelihoods of answers, or of preferences against the reference they were trained with, and the rows."""
    from vifamily.llm.data import prepare_pairs, prepare_sft

    pairs = "chosen" in records[0]
    prepare: Any = prepare_pairs if pairs else prepare_sft
    rows = list(prepare(records, ensemble.tokenizer, max_length=None, group_column=column))
    if not pairs:
        return ensemble.log_likelihood(rows), rows
    told = ensemble.manifest.training
    beta = told.get("beta", 0.1) if beta is None else beta
    adapter = reference if reference is not None else told.get("reference_adapter")
    return ensemble.preference_log_likelihood(rows, beta=beta, reference_adapter=adapter), rows


def _generate(
    folder: Folder,
    prompts: Annotated[list[str], typer.Argument(help="Prompts, each of them answered.")],
    *,
    base: Base = None,
    speaker: Annotated[str, typer.Option(help="draw, mixture or member.")] = "draw",
    member: Annotated[int | None, typer.Option(help="Who speaks, for --speaker member.")] = None,
    num_answers: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="1 draws as members predict; 0 takes the likeliest token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    debug: Debug = False,
) -> int:
    """Answer prompts: by a member drawn for each answer, by the mixture, or by a named member."""
    ensemble = _loaded(folder, base)
    answers = ensemble.generate(
        prompts,
        speaker=speaker,
        member=member,
        num_answers=num_answers,
        generator=generator(seed, "llm/answers"),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    for answer in answers:
        typer.echo(str(answer.text))
    return 0


def _route(
    folder: Folder,
    data: Data,
    *,
    base: Base = None,
    split: str = "test",
    alpha: Annotated[float, typer.Option(help="The power at which answers are routed.")] = 1.0,
    group_column: Annotated[
        str | None, typer.Option(help="Route all records that share a value of this column as one.")
    ] = None,
    beta: Beta = None,
    reference_adapter: Reference = None,
    out: Annotated[Path | None, typer.Option(help="File for the heat map, PNG.")] = None,
    debug: Debug = False,
) -> int:
    """Show which member explains which answer, preference, or group of them."""
    from vifamily.diagnostics.routing import responsibilities
    from vifamily.llm._answers import group_sums

    records, ensemble = read_records(data, split=split), _loaded(folder, base)
    ll, rows = _scored(ensemble, records, beta, reference_adapter, group_column)
    if group_column is None:
        found = responsibilities(ll, ensemble.log_weight, alpha, unit="pair" if "chosen" in records[0] else "answer")
    else:
        summed, names = group_sums(ll, rows)
        found = responsibilities(summed, ensemble.log_weight, alpha, unit="group", unit_names=names)
    typer.echo(str(found))
    if out is not None:
        typer.echo(f"wrote {write_bytes(out, png(found.plot()))}")
    return 0


def _inspect(
    folder: Folder,
    *,
    as_json: Json = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="Print the command that serves the members with vLLM.")] = False,
    base: Base = None,
    debug: Debug = False,
) -> int:
    """Show what a saved ensemble says of itself, and check its files; loads no model."""
    if vllm:
        typer.echo(vllm_command(folder, base=base))
        return 0
    manifest = read_manifest(folder)
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
        return 0
    typer.echo(f"{manifest.num_members} members over {manifest.base or 'a base without a name'}; files are complete")
    typer.echo(f"adapter: {manifest.adapter}")
    typer.echo(f"weights: {', '.join(f'{w:.3f}' for w in manifest.weights)}")
    for name, value in sorted(manifest.training.items()):
        typer.echo(f"{name}: {value}")
    typer.echo("versions: " + ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())))
    return 0


def _configs(
    name: Annotated[str | None, typer.Argument(help="Print this one, to change a copy of it.")] = None,
    *,
    debug: Debug = False,
) -> int:
    """List the configurations that come with the package, for --config; or print one."""
    if name is None:
        for known, what in ready.configs().items():
            typer.echo(f"{known}: {what}")
    else:
        typer.echo(ready.config_path(name).read_text("utf-8"), nl=False)
    return 0


def _demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the ensemble, the pictures and the figures.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Far too few steps, to see that it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    debug: Debug = False,
) -> int:
    """Train a small base from scratch, then an ensemble on contradictory answers, without a download.

    Two minutes on a CPU: members share the contradiction out among themselves and agree on the rest, which two pictures
    show.
    """
    from vifamily.llm import demo

    found, written = demo.run(out, quick=quick, seed=seed, say=typer.echo)
    Console(width=110, highlight=False).print(demo.table(found))
    for path in written:
        typer.echo(f"wrote {path}")
    return 0
