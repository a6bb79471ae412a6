"""Checkpoints of a run: which of them are complete."""

from __future__ import annotations

import warnings
from pathlib import Path

from vifamily.checkpoint import field, read
from vifamily.errors import CheckpointError, ConfigError, VifamilyWarning
from vifamily.llm._progress import OPTIMISER
from vifamily.llm.manifest import read_manifest, read_object
from vifamily.llm.options import EnsembleOptions

__all__ = ["check_complete", "last_checkpoint", "tell_changes"]


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
    """Refuse a checkpoint that lacks what is written last, or whose members or optimiser are not those that were saved.

    Raises:
        CheckpointError: If it is one.
    """
    state = folder / "trainer_state.json"
    try:
        field(read_object(state), "global_step", int)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint, or is half-written ({error}). Use an earlier one."
        ) from error
    read_manifest(folder)
    try:
        read(folder, name=OPTIMISER)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} cannot be gone on from: {error} Checkpoints written with save_only_model have no optimiser. Use "
            "an earlier one, or start anew."
        ) from error


def tell_changes(folder: Path, options: EnsembleOptions) -> None:
    """Warn of options that are others than those of the run that wrote a checkpoint: they hold from there on.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
    """
    before = read_manifest(folder).training
    changed = [
        f"{name}={value!r} (was {before[name]!r})"
        for name, value in options.plain().items()
        if name in before and before[name] != value
    ]
    if changed:
        warnings.warn(
            f"the run goes on from {folder} with other options than it was begun with: {', '.join(changed)}.",
            VifamilyWarning,
            stacklevel=2,
        )
