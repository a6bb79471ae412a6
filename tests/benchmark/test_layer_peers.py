"""Peers' layers: their environment, the worker that times them, and what is done with its answer."""

import json
import sys
from pathlib import Path

import pytest
import torch

from vifamily.benchmark import Options
from vifamily.benchmark import _environments as environments
from vifamily.benchmark._layer_peers import peer_ratios
from vifamily.benchmark._workers import ask_rows
from vifamily.benchmark.peers import bayesian_layers
from vifamily.errors import BenchmarkError, ConfigError
from vifamily.rng import scoped

WORKER = """
import json, sys
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
rows = [{"floor": 2.0, "torchbnn": 3.0} for _ in job["cells"]]
#HERE
(Path(sys.argv[1]).parent / "answer.json").write_text(json.dumps({"rows": rows}))
"""


class Layer(torch.nn.Linear):
    """A layer that answers as one of bayesian-torch does."""

    def forward(self, x, return_kl=True):
        out = super().forward(x)
        return (out, self.weight.square().sum()) if return_kl else out


def test_an_environment_is_complete_with_every_version_and_a_build_for_one_device(tmp_path):
    peer = environments.LAYER_PEERS["torchbnn"]
    home = tmp_path / str(peer.environment)
    site = home / "lib" / "python3.11" / "site-packages"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").touch()
    for name in ("torch-2.13.0+cpu", "numpy-2.4.6", "bayesian_torch-0.5.0", "torchbnn-1.2"):
        (site / f"{name}.dist-info").mkdir(parents=True)
    assert environments.interpreter("torchbnn", tmp_path) is None
    (site / "blitz_bayesian_pytorch-0.2.8.dist-info").mkdir()
    assert environments.interpreter("torchbnn", tmp_path) == home / "bin" / "python"
    (site / "torch-2.13.0+cpu.dist-info").rename(site / "torch-2.13.01.dist-info")
    assert environments.interpreter("torchbnn", tmp_path) is None


def test_what_is_bare_is_installed_last_and_alone(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(environments.subprocess, "run", lambda command, **_: commands.append(command))
    environments.install(("blitz",), tmp_path)
    venv, first, last = commands
    assert venv[1:3] == ["-m", "venv"]
    assert "torch==2.13.0" in first and "--no-deps" not in first
    assert "--no-deps" in last and "blitz-bayesian-pytorch==0.2.8" in last and "torch==2.13.0" not in last


def ratios(tmp_path, monkeypatch, change="", **options):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("#HERE", change), "utf-8")
    peer = environments.Peer(str(script), None)
    monkeypatch.setattr("vifamily.benchmark._layer_peers.LAYER_PEERS", {"torchbnn": peer})
    monkeypatch.setattr("vifamily.benchmark._layer_peers.interpreter", lambda name, folder: Path(sys.executable))
    said = []
    options = Options(say=said.append, peers_dir=tmp_path, **options)
    return peer_ratios("layers", [(8, 2), (16, 2)], options, rounds=1, seconds=1e-4), said


def test_ratios_are_to_the_floor_of_the_same_process(tmp_path, monkeypatch):
    assert ratios(tmp_path, monkeypatch)[0] == [{"torchbnn": 1.5}, {"torchbnn": 1.5}]


def test_no_peers_are_asked_for(tmp_path, monkeypatch):
    assert ratios(tmp_path, monkeypatch, peers=()) == ([{}, {}], [])


def test_a_worker_that_fails_leaves_its_columns_empty_and_is_said(tmp_path, monkeypatch):
    found, said = ratios(tmp_path, monkeypatch, "raise ValueError('no such layer')")
    assert found == [{}, {}]
    assert "no such layer" in said[-1]


def test_an_unknown_peer_is_refused():
    with pytest.raises(ConfigError, match="'pymc'"):
        peer_ratios("layers", [(8, 2)], Options(peers=("pymc",)), rounds=1, seconds=1e-4)


HOSTILE = {
    "negative": ("rows[0]['floor'] = -1.0", "positive"),
    "not finite": ("rows[0]['floor'] = float('nan')", "positive"),
    "words": ("rows[0]['floor'] = 'long'", "cannot be read"),
    "a number": ("rows = 3", "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows_are_refused(name, tmp_path):
    change, expected = HOSTILE[name]
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("#HERE", change), "utf-8")
    with pytest.raises(BenchmarkError, match=expected):
        ask_rows(Path(sys.executable), str(script), {"cells": [1]}, limit=60.0, folder=tmp_path)


def test_the_worker_times_layers_and_takes_whole_steps(monkeypatch):
    made = []

    def make(kind, fan_in, fan_out, *, bias):
        made.append(Layer(fan_in, fan_out, bias=bias))
        return made[-1]

    monkeypatch.setitem(bayesian_layers._MAKE, "bayesian_torch", make)
    with scoped(0):
        sides = bayesian_layers._layers(torch, 8, 3, ["bayesian_torch"])
        assert [len(side()) for side in sides.values()] == [2, 2]  # of the input and of the weight
        made.clear()
        steps = bayesian_layers._steps(torch, [4, 8, 1], 3, ["bayesian_torch"])
    weights = [layer.weight.detach().clone() for layer in made]
    assert [tuple(w.shape) for w in weights] == [(8, 4), (1, 8)]
    for step in steps.values():
        step()
    assert all(not torch.equal(layer.weight, before) for layer, before in zip(made, weights, strict=True))


def test_the_worker_answers_with_a_row_for_each_cell(tmp_path):
    job = {"what": "steps", "cells": [[[4, 8, 1], 3], [[4, 16, 1], 2]], "names": [], "rounds": 1, "seconds": 1e-4}
    before = torch.get_num_threads()
    (tmp_path / "job.json").write_text(json.dumps(job), "utf-8")
    with scoped(0):
        bayesian_layers.main(str(tmp_path / "job.json"))
    torch.set_num_threads(before)
    rows = json.loads((tmp_path / "answer.json").read_text("utf-8"))["rows"]
    assert [set(row) for row in rows] == [{"floor"}, {"floor"}]
