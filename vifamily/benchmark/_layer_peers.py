"""Ratios of the peers' layers and training steps to a linear layer's, each timed in the peers' own process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vifamily.benchmark._environments import LAYER_PEERS, default_folder, install, interpreter
from vifamily.benchmark._report import Options
from vifamily.benchmark._workers import ask_rows
from vifamily.errors import BenchmarkError, ConfigError

__all__ = ["PEER_COLUMNS", "peer_ratios"]

PEER_COLUMNS = {
    "bayesian-torch": "bayesian_torch",
    "bayesian-torch, flipout": "bayesian_torch_flipout",
    "torchbnn": "torchbnn",
    "blitz": "blitz",
}
"""Heads of a table with the key of the row."""
_MORE = {"bayesian_torch": ("bayesian_torch", "bayesian_torch_flipout")}


def _installed(options: Options) -> tuple[dict[str, Path], Path]:
    folder = options.peers_dir or default_folder()
    wanted = tuple(LAYER_PEERS) if options.peers is None else options.peers
    if unknown := [name for name in wanted if name not in LAYER_PEERS]:
        raise ConfigError(f"there is no peer {unknown[0]!r} here: choose among {', '.join(LAYER_PEERS)}, or none.")
    if options.install_peers:
        install(wanted, folder)
    found = {name: python for name in wanted if (python := interpreter(name, folder)) is not None}
    if options.peers and len(found) < len(wanted):
        options.say("some peers are not installed: use --install-peers")
    return found, folder


def peer_ratios(
    what: str, cells: Sequence[tuple[Any, int]], options: Options, *, rounds: int, seconds: float
) -> list[dict[str, float]]:
    """Time the peers that are installed.

    Args:
        what: ``"layers"``, square ones without bias, or ``"steps"``, whole training steps of a network.
        cells: Pairs of a size, or a list of sizes, and a batch.
        options: What is asked of the benchmark: peers, their folder.
        rounds: Turns of each side.
        seconds: About how long a turn lasts.

    Returns:
        For each cell the ratio of each peer to the floor in its own process: a linear layer, or a step of a network of
        them. Empty for peers that are not there.

    Raises:
        ConfigError: If there is no such peer.
    """
    found, _ = _installed(options)
    empty: list[dict[str, float]] = [{} for _ in cells]
    if not found:
        return empty
    names = [side for name in found for side in _MORE.get(name, (name,))]
    options.say(f"peers: {', '.join(names)}")
    job = {"what": what, "cells": list(cells), "names": names, "rounds": rounds, "seconds": seconds}
    peer = LAYER_PEERS[next(iter(found))]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            python = next(iter(found.values()))
            rows = ask_rows(python, peer.script, job, limit=3600, folder=Path(scratch))
    except BenchmarkError as error:
        options.say(str(error))
        return empty
    return [{name: row[name] / row["floor"] for name in names if name in row} for row in rows]
