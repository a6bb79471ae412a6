"""Checkpoints of a run: which of them are complete."""

from __future__ import annotations

import json
from pathlib import Path

from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm.manifest import read_manifest

__all__ = ["check_complete", "last_checkpoint"]


def last_checkpoint(folder: str | Path) -> Path:
    """Newest complete checkpoint in a folder of a run; one whose writing was broken off is passed over.

    Args:
        folder: The run's ``output_dir``.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: If there is none.
        CheckpointError: If there are only incomplete ones.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    if not found:
        raise ConfigError(f"{folder} holds no checkpoint to go on from: start without resuming.")
    for path in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        try:
            check_complete(path)
        except CheckpointError:
            continue
        return path
    raise CheckpointError(f"the checkpoints in {folder} are all half-written: start anew.")


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that lacks what is written last, or whose members are not those that were saved.

    Raises:
        CheckpointError: If it is one.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint, or is half-written. Use an earlier one.") from error
    read_manifest(folder)
