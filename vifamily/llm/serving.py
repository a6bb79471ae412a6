"""What a server is told to serve the members of a saved ensemble."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm.manifest import read_manifest

__all__ = ["RANKS", "vllm_command"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for; an adapter of another rank takes the room of the next one."""


def vllm_command(folder: str | Path, *, base: str | None = None) -> str:
    """The command that serves the members of an ensemble with vLLM, each under the name ``member_k``.

    Args:
        folder: Folder of a saved ensemble; it is not loaded, but its files are checked.
        base: The base, where it is not the one that the folder names.

    Returns:
        One line for a shell.

    Raises:
        CheckpointError: If the folder is not that of a complete ensemble.
        ConfigError: If the base has no name, the rank is larger than any that vLLM has room for, or members are no
            LoRA adapters.

    Example:
        >>> print(vllm_command("results/ensemble"))  # doctest: +SKIP
        vllm serve Qwen/Qwen2-1.5B --enable-lora --max-loras 2 --max-lora-rank 16 --lora-modules member_0=... member_1=
    """
    manifest, folder = read_manifest(folder), Path(folder)
    name = base or manifest.base
    if not name:
        raise ConfigError("the ensemble does not name its base: give it with base=.")
    if manifest.adapter != "lora":
        raise ConfigError(
            f"vLLM serves LoRA adapters, and those in {folder} are of the kind {manifest.adapter!r}: "
            "vifamily.llm.export_lora saves the nearest ones of a rank."
        )
    path = folder / "member_0" / "adapter_config.json"
    try:
        rank = int(json.loads(path.read_text("utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or is no configuration of an adapter.") from error
    room = next((r for r in RANKS if r >= rank), None)
    if room is None:
        raise ConfigError(f"members have rank {rank}, and vLLM serves at most {RANKS[-1]}: train smaller ones.")
    members = [f"member_{k}={(folder / f'member_{k}').resolve()}" for k in range(manifest.num_members)]
    words = ["vllm", "serve", name, "--enable-lora", "--max-loras", str(manifest.num_members)]
    if manifest.revision and base is None:
        words += ["--revision", manifest.revision]
    words += ["--max-lora-rank", str(room), "--lora-modules", *members]
    return shlex.join(words)
