"""LibAUC's AUC-margin loss with its optimiser PESG, on given splits; runs in an environment that has libauc.

The network is that of the other methods, started where they start: tanh layers and a linear output. As in LibAUC's own
examples a sigmoid bounds what the loss sees, batches hold both classes evenly with the rarer one repeated, and the step
size falls by ten at a half and at three quarters of the steps, where the reference of the proximal term moves as well.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ._common import Job

__all__ = ["main"]

_EVERY = 5


def _network(torch: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The network with given weights: ``weight0``, ``bias0``, ..., the last of them with one output."""
    number = sum(name.startswith("weight") for name in arrays)
    layers: list[Any] = []
    for i in range(number):
        weight, bias = (torch.from_numpy(arrays[f"{what}{i}"]).float() for what in ("weight", "bias"))
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, bias
        layers += [layer] if i == number - 1 else [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


def _rows(size: int, batch: int, source: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of one class, batch after batch, in fresh order at each pass; fewer rows than a batch come repeatedly."""
    left = np.zeros(0, dtype=np.int64)
    while True:
        while len(left) < batch:
            left = np.concatenate([left, source.permutation(size)])
        yield left[:batch]
        left = left[batch:]


def _margin(pos: Any, neg: Any) -> float:
    """The AUC-margin loss with its inner problems solved: what is watched on the held-out part."""
    gap = float(1 + neg.mean() - pos.mean())
    return float(pos.var(correction=0) + neg.var(correction=0)) + max(gap, 0.0) ** 2


def _train(torch: Any, losses: Any, optimizers: Any, parts: dict[str, Any], job: Job, seed: int) -> Any:
    """Take all steps and return the network where the held-out part was best."""
    module = _network(torch, {k: v for k, v in parts.items() if k.startswith(("weight", "bias"))})
    pos, neg, held_pos, held_neg = (
        torch.from_numpy(parts[name]).float() for name in ("pos", "neg", "held_pos", "held_neg")
    )
    torch.manual_seed(seed)  # the reference of the proximal term starts at random; this process is the peer's alone
    source, batch, steps = np.random.default_rng(seed), job["batch_size"], job["max_iter"]
    streams = _rows(len(pos), batch, source), _rows(len(neg), batch, source)
    loss = losses.AUCMLoss(version=job["version"], device="cpu")
    optimizer = optimizers.PESG(module.parameters(), loss_fn=loss, device="cpu", verbose=False)
    target = torch.cat([torch.ones(batch, 1), torch.zeros(batch, 1)])
    falls = {round(steps / 2), round(3 * steps / 4)}
    best, kept = math.inf, copy.deepcopy(module.state_dict())
    for step in range(1, steps + 1):
        x = torch.cat([pos[next(streams[0])], neg[next(streams[1])]])
        optimizer.zero_grad()
        loss(torch.sigmoid(module(x)), target).backward()
        optimizer.step()
        if step in falls:
            optimizer.update_regularizer(decay_factor=10)
        if step % _EVERY == 0 or step == steps:
            with torch.no_grad():
                now = _margin(*(torch.sigmoid(module(x)) for x in (held_pos, held_neg)))
            if now < best:
                best, kept = now, copy.deepcopy(module.state_dict())
    module.load_state_dict(kept)
    return module


def main(path: str) -> None:
    """Do a job of ``seeds``, ``max_iter``, ``batch_size`` and ``version``: scores of the points to judge by.

    Arrays are named by the number of the case: ``0/pos``, ``0/neg``, ``0/held_pos``, ``0/held_neg``, ``0/test_pos``,
    ``0/test_neg``, ``0/weight0``, ``0/bias0`` and so on.
    """
    import torch
    from libauc import losses, optimizers

    torch.set_num_threads(1)
    job = Job(path)
    scores: dict[str, np.ndarray] = {}
    for number, seed in enumerate(job["seeds"]):
        parts = {key.split("/", 1)[1]: value for key, value in job.data.items() if key.startswith(f"{number}/")}
        module = _train(torch, losses, optimizers, parts, job, seed)
        with torch.no_grad():
            for name in ("test_pos", "test_neg"):
                scores[f"{number}/{name}"] = module(torch.from_numpy(parts[name]).float())[:, 0].double().numpy()
    job.write(scores, versions={name: importlib.metadata.version(name) for name in ("torch", "libauc")})
