"""Networks that score points, trained on class means by minibatches that hold both classes."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vifamily.errors import ConfigError
from vifamily.numerics.arctangent_ratio import logit_terms
from vifamily.rng import generator

Array = NDArray[np.float64]
_LARGEST_VALIDATION = 10_000
_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class Sample:
    """Points of one class: ``(point, feature)``, with weights ``(point,)``."""

    x: Tensor
    weight: Tensor

    def __getitem__(self, rows: Any) -> Sample:
        return Sample(self.x[rows], self.weight[rows])

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes:
        learning_rate: Of AdamW.
        batch_size: Points of each class in a minibatch; a class that has fewer comes in whole.
        max_iter: Largest number of steps.
        patience: Steps without a better value on the held-out part after which training ends.
        weight_decay: Of AdamW.
    """

    learning_rate: float = 5e-3
    batch_size: int = 1024
    max_iter: int = 2000
    patience: int = 60
    weight_decay: float = 1e-4


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From scores and weights of positives, then of negatives, to what is minimised."""


class Perceptron(nn.Module):
    """A tanh network with one output that starts at zero: every point then starts as likely in one class as the other.

    Args:
        features: Width of the input.
        hidden: Widths of the hidden layers.
        source: Randomness of the weights.
        scale: Factor of the output. Steps of the optimiser are of one size, so a larger one lets scores of a few units
            be reached before the hidden layers have learned the noise.
    """

    def __init__(self, features: int, hidden: Sequence[int], source: torch.Generator, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        widths = [features, *hidden]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            made = torch.randn(outputs, inputs, generator=source, dtype=torch.float64) / math.sqrt(inputs)
            self.weights.append(nn.Parameter(made))
            self.biases.append(nn.Parameter(torch.zeros(outputs, dtype=torch.float64)))
        self.last = nn.Parameter(torch.zeros(widths[-1], dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, ``(point,)``."""
        for w, b in zip(self.weights, self.biases, strict=True):
            x = torch.tanh(x @ w.mT + b)
        return self.scale * (x @ self.last + self.offset)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Self-normalised mean of a class."""
    return (weight * values).sum() / weight.sum()


def arc_loss(g_pos: Tensor, g_neg: Tensor, w_pos: Tensor, w_neg: Tensor) -> Tensor:
    """Minus the variational arc length of log ratios."""
    return -weighted_mean(logit_terms(g_pos)[0], w_pos) - weighted_mean(logit_terms(g_neg)[1], w_neg)


def root_seed(random_state: Any) -> int:
    """A seed by scikit-learn's rule: an integer is one, a random state draws one, None takes a fresh one.

    Raises:
        ConfigError: If it is none of these.
    """
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool) and random_state >= 0:
        return int(random_state)
    raise ConfigError(f"random_state must be None, a non-negative integer or a random state, got {random_state!r}.")


def sample_of(x: Array, weight: Array | None) -> Sample:
    """Points of one class as tensors."""
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
    return Sample(values, torch.from_numpy(np.ones(len(x)) if weight is None else weight.copy()))


def hold_out(sample: Sample, fraction: float, source: torch.Generator) -> tuple[Sample, Sample]:
    """Split the points of a class into a training and a held-out part; a class of one point is both."""
    size = min(max(1, round(fraction * len(sample))), _LARGEST_VALIDATION)
    order = torch.randperm(len(sample), generator=source)
    if size >= len(sample):
        return sample, sample
    return sample[order[size:]], sample[order[:size]]


def _batches(size: int, batch: int, source: torch.Generator) -> Iterator[Any]:
    while True:
        if batch >= size:
            yield slice(None)
            continue
        order = torch.randperm(size, generator=source)
        # what is left over at the end of a pass is drawn in the next: all batches are of one size
        yield from order[: size - size % batch].split(batch)


def scores_of(module: nn.Module, x: Tensor) -> Tensor:
    """Scores without gradients, in blocks of rows."""
    with torch.no_grad():
        return torch.cat([module(block) for block in x.split(_ROWS)]) if len(x) else x.new_zeros(0)


def train(
    module: nn.Module, pos: Sample, neg: Sample, held: tuple[Sample, Sample], loss: Loss, watch: Loss,
    schedule: Schedule, seed: int, name: str,
) -> int:  # fmt: skip
    """Train a network in place and leave it at its best on the held-out part.

    Args:
        module: From points to scores.
        pos: Positives to train on.
        neg: Negatives to train on.
        held: Held-out positives and negatives.
        loss: What is minimised on minibatches.
        watch: What is to be small on the held-out part.
        schedule: How.
        seed: Seed of the minibatches.
        name: Name of their stream.

    Returns:
        The number of steps taken.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    sources = generator(seed, f"{name}/positive"), generator(seed, f"{name}/negative")
    streams = [_batches(len(s), schedule.batch_size, g) for s, g in zip((pos, neg), sources, strict=True)]

    def held_out() -> float:
        return float(watch(scores_of(module, held[0].x), scores_of(module, held[1].x), held[0].weight, held[1].weight))

    best, best_step, kept, step = held_out(), 0, copy.deepcopy(module.state_dict()), 0
    every = 1 if len(held[0]) + len(held[1]) < 200 else 5
    while step < schedule.max_iter and step - best_step < schedule.patience:
        a, b = pos[next(streams[0])], neg[next(streams[1])]
        with torch.enable_grad():
            optimizer.zero_grad()
            loss(module(a.x), module(b.x), a.weight, b.weight).backward()
        optimizer.step()
        step += 1
        if step % every == 0 and (now := held_out()) < best:
            best, best_step, kept = now, step, copy.deepcopy(module.state_dict())
    module.load_state_dict(kept)
    return max(step, 1)
