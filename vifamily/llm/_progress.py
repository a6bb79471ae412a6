"""What a checkpoint holds beside the members: the optimiser, the schedule, and random states. No pickle.

transformers writes these by pickle; here tensors are safetensors with a digest and the rest is JSON, so that a file
that was cut off or changed is told from a good one, and nothing in it can run.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.checkpoint import field, read, read_if_any, write
from vifamily.errors import CheckpointError, VifamilyWarning

__all__ = ["OPTIMISER", "PlainCheckpoints", "load_optimiser", "load_random", "save_optimiser", "save_random"]

OPTIMISER = "optimizer"
"""Name of the files of the optimiser and its schedule, as transformers has it."""


def save_optimiser(folder: Path, optimiser: Any, schedule: Any, scaler: Any = None) -> None:
    """Write the states of an optimiser, of the schedule of its step sizes, and of the scale of its gradients, if any.

    Raises:
        ConfigError: If they hold what is neither a tensor nor plain data, or the folder cannot be written.
    """
    state = optimiser.state_dict()
    tensors: dict[str, Tensor] = {}
    own = {str(i): _apart(value, f"state.{i}", tensors) for i, value in state["state"].items()}
    groups = [_apart(group, f"group.{i}", tensors) for i, group in enumerate(state["param_groups"])]
    content = {"state": own, "groups": groups, "schedule": _apart(schedule.state_dict(), "schedule", tensors)}
    if scaler is not None:
        content["scaler"] = _apart(scaler.state_dict(), "scaler", tensors)
    write(folder, tensors, content, name=OPTIMISER)


def load_optimiser(folder: Path, optimiser: Any, schedule: Any, scaler: Any = None) -> None:
    """Go on from what :func:`save_optimiser` wrote.

    Raises:
        CheckpointError: If it is missing, damaged, or of another optimiser.
    """
    tensors, content = read(folder, name=OPTIMISER)
    own, groups = field(content, "state", dict), field(content, "groups", list)
    try:
        if [set(group) for group in groups] != [set(group) for group in optimiser.state_dict()["param_groups"]]:
            raise ValueError("it has other settings")  # torch would take them over
        optimiser.load_state_dict(
            {
                "state": {int(i): _together(value, f"state.{i}", tensors) for i, value in own.items()},
                "param_groups": [_group(group, f"group.{i}", tensors) for i, group in enumerate(groups)],
            }
        )
        schedule.load_state_dict(_together(field(content, "schedule", dict), "schedule", tensors))
        if scaler is not None:
            scaler.load_state_dict(_together(field(content, "scaler", dict), "scaler", tensors))
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the optimiser in {folder} is of another form than that of this run: {str(error)[:200]}. Resume with the "
            "optimiser, schedule and adapters of the run that wrote it."
        ) from error


def save_random(folder: Path, process: int) -> None:
    """Write the random states of a process: of Python, numpy and torch, on the CPU and its GPU."""
    version, keys, gauss = random.getstate()
    state: Any = np.random.get_state(legacy=True)
    kind, array, position, has_gauss, cached = state
    tensors = {
        "python": torch.tensor(keys, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(array).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    content = {
        "python": [version, gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    write(folder, tensors, content, name=f"random_{process}")


def load_random(folder: Path, process: int) -> None:
    """Set the random states of a process to what was written; warns where there are none for it.

    Raises:
        CheckpointError: If they are damaged.
    """
    found = read_if_any(folder, name=f"random_{process}")
    if found is None:
        warnings.warn(
            f"{folder} has no random state for process {process}: it is of a run with fewer processes, and what "
            "follows is not what that run would have done to the bit.",
            VifamilyWarning,
            stacklevel=2,
        )
        return
    tensors, content = found
    try:
        version, gauss = field(content, "python", list)
        kind, position, has_gauss, cached = field(content, "numpy", list)
        random.setstate((version, tuple(tensors["python"].tolist()), gauss))
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the random states in {folder} cannot be read: {str(error)[:200]}.") from error


class PlainCheckpoints:
    """The methods of a ``Trainer`` that write and read checkpoints by pickle, without it."""

    args: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_optimiser(Path(output_dir), self.optimizer, self.lr_scheduler, self.accelerator.scaler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimiser(Path(checkpoint), self.optimizer, self.lr_scheduler, self.accelerator.scaler)

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: it is saved with the optimiser."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: it is loaded with the optimiser."""

    def _save_rng_state(self, output_dir: str) -> None:
        save_random(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint), self.args.process_index)


# --- parts ---


def _apart(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Plain data with the tensors taken out of it, each under its place."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {str(key): _apart(inner, f"{place}.{key}", tensors) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_apart(inner, f"{place}.{i}", tensors) for i, inner in enumerate(value)]
    return value


def _together(value: Any, place: str, tensors: Mapping[str, Tensor]) -> Any:
    """The data with its tensors in it again."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[place]
        return {key: _together(inner, f"{place}.{key}", tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_together(inner, f"{place}.{i}", tensors) for i, inner in enumerate(value)]
    return value


def _group(value: Any, place: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A group of parameters; what comes in pairs, such as decays, is a tuple as optimisers have it."""
    found = _together(value, place, tensors)
    return {key: tuple(v) if isinstance(v, list) and key != "params" else v for key, v in found.items()}
