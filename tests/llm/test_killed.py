"""A run that SIGKILL ended, between steps and in the middle of writing a checkpoint, goes on to the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vifamily.llm.manifest import read_manifest

pytest.importorskip("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


def killed(folder, when, resume):
    """Run in a process of its own, which must have been ended by SIGKILL."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.llm._killed", str(folder), when, resume, str(torch.get_num_threads())],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_ends_where_one_that_was_left_alone_does(tmp_path):
    from tests.llm._killed import train

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, "never", resume=False)
    # ended a step after checkpoint 2; resumed, and ended while checkpoint 4 was being written; resumed again
    killed(cut, "step:3", "anew")
    assert sorted(p.name for p in cut.glob("checkpoint-*")) == ["checkpoint-2"]
    killed(cut, "write:4", "resume")
    assert (cut / "checkpoint-4" / "member_0").is_dir() and not (cut / "checkpoint-4" / "ensemble.json").exists()
    train(cut, "never", resume=True)
    for member in ("member_0", "member_1"):
        name = f"final/{member}/adapter_model.safetensors"
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    found, expected = read_manifest(cut / "final"), read_manifest(whole / "final")
    assert found.log_weights == expected.log_weights and found.log_weights[0] != found.log_weights[1]
    assert found.training == expected.training and found.training["step"] == 6
