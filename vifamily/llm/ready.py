"""Configurations that come with the package: the published runs by hub name, one for eight GPUs, and a launcher's."""

from __future__ import annotations

import difflib
from pathlib import Path

from vifamily.errors import UnknownNameError

__all__ = ["config_path", "configs"]

_FOLDER = Path(__file__).parent / "configs"


def configs() -> dict[str, str]:
    """Names of the configurations, each with what its first line says.

    Example:
        >>> configs()["mmlu-qwen2-1.5b"]
        'SFT on MMLU: 8 members at alpha 0.8 over Qwen2-1.5B. For: vifamily llm sft'
    """
    found = sorted(_FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text("utf-8").splitlines()[0].removeprefix("# ") for path in found}


def config_path(name: str) -> Path:
    """The file of a configuration.

    Args:
        name: One of :func:`configs`.

    Raises:
        UnknownNameError: If there is none of that name.

    Example:
        >>> config_path("or-bench-phi-3-mini").name
        'or-bench-phi-3-mini.yaml'
    """
    known = configs()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(f"there is no configuration {name!r}: choose among {', '.join(known)}.{hint}")
    return _FOLDER / f"{name}.yaml"
