"""A step of an ensemble of adapters against as many steps of single PEFT adapters: CPU time, and memory against K.

A step is a forward and a backward pass of one batch whose tokens are all scored; the optimiser is left out on both
sides. The sides are one PEFT adapter, as a user of PEFT runs it, and the ensemble in micro-batches or as a full stack.
They take turns in one process, so that every ratio is of neighbours in time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vifamily.benchmark._report import Benchmark, Options, Report, median_and_range
from vifamily.errors import BenchmarkError
from vifamily.llm import StackedCausalLM
from vifamily.llm._extra import require
from vifamily.llm._passes import PaddedRows, stacked_pass
from vifamily.llm._routed import supervised_loss
from vifamily.numerics.threads import few_threads
from vifamily.rng import generator, scoped

__all__ = ["BENCHMARK", "LARGE", "SMALL", "Setting"]

_VOCAB = 512
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of a base and of a batch.

    Attributes:
        hidden: Width.
        layers: Decoder layers.
        length: Tokens of a row.
        rows: Rows of a batch.
    """

    hidden: int
    layers: int
    length: int
    rows: int


LARGE = Setting(256, 4, 64, 16)
"""Bound by arithmetic."""

SMALL = Setting(64, 2, 24, 8)
"""The size of tests, where calls cost as much as arithmetic."""


def _base(setting: Setting) -> Any:
    transformers = require("transformers", "this benchmark")
    config = transformers.LlamaConfig(
        vocab_size=_VOCAB, hidden_size=setting.hidden, num_hidden_layers=setting.layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=setting.hidden * 8 // 24 * 8, max_position_embeddings=setting.length,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with scoped(0):
        return transformers.AutoModelForCausalLM.from_config(config)


def _adapter() -> Any:
    return require("peft", "this benchmark").LoraConfig(r=8, lora_alpha=16, target_modules=_PROJECTIONS)


def _rows(setting: Setting) -> PaddedRows:
    source = generator(0, "benchmark/llm")
    ids = torch.randint(3, _VOCAB, (setting.rows, setting.length), generator=source)
    return PaddedRows(ids, torch.ones_like(ids), torch.arange(setting.length).expand_as(ids) > 0)


def _single(setting: Setting) -> Callable[[], object]:
    """A step of one adapter in PEFT."""
    rows = _rows(setting)
    with scoped(0):
        model = require("peft", "this benchmark").get_peft_model(_base(setting), _adapter()).train()

    def step() -> None:
        model.zero_grad()
        model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.input_ids).loss.backward()

    return step


def _ensemble(setting: Setting, members: int, *, micro: bool) -> Callable[[], object]:
    """A step of an ensemble, in micro-batches of the batch over the number of members or of all rows at once."""
    rows = _rows(setting)
    model = StackedCausalLM(_base(setting), _adapter(), members).train()
    source = generator(0, "benchmark/llm/members")
    with torch.no_grad():
        for _, layer in model.lora_adapters():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=source))
    size = max(1, setting.rows // members) if micro else setting.rows
    blocks = list(torch.arange(setting.rows).split(size))
    scored = setting.rows * (setting.length - 1)

    def score(part: PaddedRows, chosen: tuple[int, int] | None) -> Tensor:
        value: Tensor = model(part.input_ids, part.attention_mask, part.completion_mask, chosen)
        return value

    def loss_of(log_prob: Tensor, index: Tensor) -> Tensor:
        row = rows.take(index).token_row
        return supervised_loss(log_prob, row, torch.arange(len(index)), "sequence", 0.8, model.log_weight)[0] / scored

    def step() -> None:
        model.zero_grad()
        stacked_pass(score, rows, blocks, loss_of, torch.Tensor.backward)

    return step


def _time(step: Callable[[], object], count: int) -> float:
    start = time.thread_time()
    for _ in range(count):
        step()
    return (time.thread_time() - start) / count


def _timed(setting: Setting, members: int, *, micro: bool, rounds: int) -> dict[str, Any]:
    """Time both sides by turns; each round gives one ratio."""
    single, ensemble = _single(setting), _ensemble(setting, members, micro=micro)
    found: list[dict[str, float]] = []
    single(), ensemble()
    for _ in range(rounds):
        # a turn of the single adapter is about as long as one of the ensemble
        one, all_of_them = _time(single, max(1, members // 2)), _time(ensemble, 1)
        found.append({"ratio": all_of_them / (members * one), "single_ms": 1e3 * one, "step_ms": 1e3 * all_of_them})
    return {key: median_and_range([each[key] for each in found]) for key in found[0]}


# --- memory, by a process of its own ---


def _resident_mb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # the counter below begins with the parent's peak
        lines = [line for line in status.read_text("ascii").splitlines() if line.startswith("VmHWM:")]
        if lines:
            return float(lines[0].split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _answer_memory(text: str) -> None:
    """What the process of its own does: say how far its memory rises over some steps."""
    asked = json.loads(text)
    setting, members = Setting(**asked["setting"]), asked["members"]
    with few_threads(0):
        tiny = dataclasses.replace(setting, rows=1, length=2)
        warm = _ensemble(tiny, 1, micro=True) if members else _single(tiny)
        warm()  # what libraries take at their first call is no part of a step
        step = _ensemble(setting, members, micro=asked["micro"]) if members else _single(setting)
        before = _resident_mb()
        for _ in range(2):
            step()
        print(json.dumps({"peak_mb": _resident_mb() - before}))


def _memory_mb(setting: Setting, members: int, *, micro: bool) -> float:
    """Rise of the memory of a process over steps; ``members = 0`` asks for the single adapter."""
    asked = json.dumps({"setting": dataclasses.asdict(setting), "members": members, "micro": micro})
    # freed blocks go back at once, so that what is resident is what tensors hold
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "32768",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "OMP_NUM_THREADS": "1",
    }
    code = "import sys; from vifamily.benchmark.llm import _answer_memory; _answer_memory(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, asked], capture_output=True, text=True, env=environment, check=False
    )
    try:
        return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_mb"])
    except (IndexError, KeyError, ValueError) as error:
        raise BenchmarkError(f"the process that measures memory failed: {done.stderr.strip()[-500:]}") from error


def _row(name: str, setting: Setting, members: int, *, micro: bool, rounds: int) -> dict[str, Any]:
    row = {"benchmark": "llm", "size": name, "width": setting.hidden, "members": members}
    row |= {"rows_at_once": max(1, setting.rows // members) if micro else setting.rows}
    row |= _timed(setting, members, micro=micro, rounds=rounds)
    # of the small setting, a step takes less than libraries have taken and given back by then
    return row | {"peak_mb": _memory_mb(setting, members, micro=micro) if micro else None}


def _run(options: Options) -> Report:
    """Measure the large setting in micro-batches and the small one as a full stack."""
    rounds = options.repeats or (1 if options.quick else 9)
    cells = [("small", SMALL, k, False) for k in ((2,) if options.quick else (1, 4, 8))]
    cells += [("large", LARGE, k, True) for k in ((2,) if options.quick else (1, 2, 4, 8))]
    rows: list[dict[str, Any]] = []
    with few_threads(0):
        for name, setting, members, micro in cells:
            options.say(f"{name}, {members} members")
            rows.append(_row(name, setting, members, micro=micro, rounds=rounds))
    least = min((row["peak_mb"] for row in rows if row["peak_mb"]), default=None)
    rows = [row | {"peak_ratio": row["peak_mb"] / least if row["peak_mb"] and least else None} for row in rows]
    columns = {"size": "size", "d": "width", "K": "members", "rows at once": "rows_at_once",
               "PEFT step / ms": "single_ms", "step / ms": "step_ms", "step over K PEFT steps": "ratio",
               "peak / MB": "peak_mb", "over the least": "peak_ratio"}  # fmt: skip
    return Report(rows, columns)


BENCHMARK = Benchmark("A step of an ensemble of adapters over K steps of single PEFT adapters, and its memory.", _run)
"""The benchmark ``llm``."""
