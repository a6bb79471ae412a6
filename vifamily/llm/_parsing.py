"""Flags and files of a run: read into words for a parser, with a sentence for those that an ensemble cannot have."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vifamily.errors import ConfigError
from vifamily.llm._extra import require
from vifamily.llm.ready import config_path, configs

__all__ = ["flag_parser", "given_names", "merged_words"]

_FOREIGN = {
    "packing": "rows must stay apart to be routed",
    "padding_free": "rows must stay apart to be routed",
    "use_dora": "DoRA rescales the merged weight of each member, which stacked adapters do not form",
    "modules_to_save": "a module trained whole would be a copy of it for each member",
    "lora_modules_to_save": "a module trained whole would be a copy of it for each member",
    "loss_type": "preferences have the sigmoid loss, whose likelihood is what is routed",
    "precompute_ref_log_probs": "where all records have ref_chosen_logps and ref_rejected_logps, these are used",
    "dataset_text_field": "the column of texts is called text; rename it",
    "torch_dtype": "its name is --dtype",
    "deepspeed": "ensembles are trained data-parallel, and --shard_base true shares a large base out",
    "fsdp": "ensembles are trained data-parallel, and --shard_base true shares a large base out",
    "trust_remote_code": "code from the hub is not run",
}
"""Flags of TRL that are refused, each with the reason."""
_IMPLIED = ("use_peft", "assistant_only_loss")
"""Flags of TRL for what is done anyway; they may be given, but not be switched off."""
_SAME = {"loss_type": "sigmoid"}
"""Values of refused flags that ask for what is done."""
_OFF = frozenset({"false", "no", "none", "null", "0", "", "[]"})


def flag_parser(kinds: Sequence[type]) -> Any:
    """A parser of dataclasses of transformers that raises an error of the package in the place of printing its usage.

    Raises:
        ConfigError: From its methods, if a value cannot be read.
    """
    parser = require("transformers", "training an ensemble").HfArgumentParser(tuple(kinds))

    def fail(message: str) -> None:
        raise ConfigError(f"{message}. `vifamily llm sft --flags` lists flags with their defaults.")

    parser.error = fail
    return parser


def merged_words(arguments: Sequence[str], config: Path | None, parser: Any) -> list[str]:
    """What a file and flags say together, as words for the parser; flags stand last, and override.

    Args:
        arguments: Flags with their values.
        config: A YAML file, or the name of a configuration that comes with the package.
        parser: What will read them.

    Raises:
        ConfigError: If a name is unknown, or of what an ensemble cannot have, or the file cannot be read.
    """
    actions = {action.dest: action for action in parser._actions}
    options = {option for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    for name, value in _read_yaml(config).items():
        if _dropped(name, value):
            continue
        if name not in actions:
            raise ConfigError(f"{config} has an unknown key {name!r}.{_nearest(name, sorted(actions))}")
        if value is not None and value != []:
            words += [f"--{name}", *_words(value, actions[name])]
    given = _without_foreign(arguments)
    unknown = [word for word in given if word.startswith("--") and word.partition("=")[0] not in options]
    if given and not given[0].startswith("--"):
        raise ConfigError(f"{given[0]!r} belongs to no flag: flags and their values start with two dashes.")
    if unknown:
        raise ConfigError(f"unknown flag {unknown[0]}.{_nearest(unknown[0], sorted(options))}")
    return words + given


def given_names(words: Sequence[str]) -> set[str]:
    """Names of the flags among some words, with underscores."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def _words(value: Any, action: Any) -> list[str]:
    """A value of a file as it would stand on a command line."""
    if isinstance(value, list):
        return [str(v) for v in value]
    if isinstance(value, dict):
        return [json.dumps(value)]
    if value is False and action.choices and "no" in action.choices:
        return ["no"]  # what YAML makes of a plain no
    return [str(value)]


def _without_foreign(arguments: Sequence[str]) -> list[str]:
    out: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in (*_FOREIGN, *_IMPLIED):
            values = [value] if equals else []
            while not equals and left and not left[0].startswith("--"):
                values.append(left.pop(0))
            _dropped(name, " ".join(values) if values else True)
        else:
            out.append(word)
    return out


def _dropped(name: str, value: Any) -> bool:
    """Whether a flag says nothing new and is left out.

    Raises:
        ConfigError: If it stands for what an ensemble cannot do.
    """
    off = str(value).lower() in _OFF or str(value).strip("[]'") == _SAME.get(name)
    if name in _FOREIGN and not off:
        raise ConfigError(f"--{name} cannot be used for an ensemble: {_FOREIGN[name]}. Leave it out.")
    if name in _IMPLIED and off:
        raise ConfigError(f"--{name} cannot be switched off for an ensemble: it is what is done. Leave it out.")
    return name in _FOREIGN or name in _IMPLIED


def _read_yaml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.exists() and str(path) in configs():
        path = config_path(str(path))
    yaml = require("yaml", "reading a configuration")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        hint = "" if path.exists() else f" Configurations that come along: {', '.join(configs())}."
        raise ConfigError(f"cannot read {path}: {error.strerror or error}.{hint}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys with values, such as num_members: 8.")
    return {str(key): value for key, value in content.items()}


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {found[0]!r}?" if found else ""
