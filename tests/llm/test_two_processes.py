"""Two processes that share a batch take the step that one process takes on the whole of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parents[2]
PAIR = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def step(folder, rows, launcher=(), route="auto", *more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, "-m", "tests.llm._two_processes", str(folder), str(rows), route, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = json.loads((folder / "ensemble.json").read_text())["weights"]
    return [safetensors.load_file(next((folder / f"member_{k}").glob("*.safetensors"))) for k in range(3)], weights


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("adapter", ["lora", "walsh"])
def test_two_processes_take_the_step_of_one(tmp_path, adapter):
    alone, weights = step(tmp_path / "one", 8, (), "auto", adapter)
    # each has half of the rows and all members; or all rows and one or two of three members; or half of the base too
    for name, more in {"rows": ("auto",), "members": ("ranks",), "base": ("auto", "sharded")}.items():
        shared, same = step(tmp_path / name, 4, PAIR, *more, adapter)
        assert same == pytest.approx(weights, abs=1e-6)
        for mine, yours in zip(alone, shared, strict=True):
            for key, value in mine.items():
                assert float((value - yours[key]).abs().max()) <= 2e-6 * float(value.abs().max()), (name, key)
