"""What users have instead of a posterior over weights, for regression: one network, ensembles, dropout and SWAG.

All members are trained side by side: weights have an axis of members, and Adam, which works coordinate by coordinate,
treats each as if it were alone. The noise is learned, one number for each member.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vifamily.rng import generator

__all__ = [
    "SWAG_STEP_SIZE", "Budget", "Predicted", "deep_ensemble", "dropout_network", "mean_field_network", "score",
    "single_network", "swag",
]  # fmt: skip

SWAG_STEP_SIZE = 0.2
"""Of steps after training; with 0.005 to 0.1 the snapshots hardly differ, and with 0.5 they leave the fit."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every method is given.

    Attributes:
        steps: Steps of Adam.
        batch: Rows of a minibatch.
        peak: Largest step size of the one-cycle schedule.
        hidden: Widths of the hidden layers.
        draws: Draws of a prediction.
    """

    steps: int = 6000
    batch: int = 64
    peak: float = 5e-3
    hidden: Sequence[int] = (128, 128)
    draws: int = 64


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Predictions as a mixture of normals, one component for each draw.

    Attributes:
        mean: ``(draw, row)``.
        sd: Of the noise, ``(draw,)``.
        parameters: Numbers that the method stores.
    """

    mean: Tensor
    sd: Tensor
    parameters: int


def score(found: Predicted, y: Tensor, scale: float) -> dict[str, float]:
    """Root mean squared error of the mean and minus the mean log density, in the unit of the targets.

    Args:
        found: Predictions in standardised units.
        y: Standardised targets, ``(row,)``.
        scale: Standard deviation that they were divided by.
    """
    rmse = float((found.mean.mean(0) - y).square().mean().sqrt()) * scale
    each = (
        -0.5 * ((y - found.mean) / found.sd[:, None]).square() - found.sd.log()[:, None] - 0.5 * math.log(2 * math.pi)
    )
    log_density = each.logsumexp(0) - math.log(len(found.mean)) - math.log(scale)
    return {"rmse": rmse, "mnll": -float(log_density.mean())}


class _Members:
    """Networks side by side: weights ``(member, out, in)``, biases ``(member, 1, out)``, log sds ``(member,)``."""

    def __init__(self, inputs: int, hidden: Sequence[int], members: int, source: torch.Generator) -> None:
        sizes = [inputs, *hidden, 1]
        self.weights, self.biases = [], []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            drawn = torch.randn(members, fan_out, fan_in, generator=source) * math.sqrt(2 / fan_in)
            self.weights.append(drawn.requires_grad_())
            self.biases.append(torch.zeros(members, 1, fan_out, requires_grad=True))
        self.log_sd = torch.full((members,), math.log(0.5), requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases, self.log_sd]

    def count(self) -> int:
        """Numbers of one member."""
        return sum(p[0].numel() for p in self.parameters)

    def __call__(self, x: Tensor, *, keep: float = 1.0, source: torch.Generator | None = None) -> Tensor:
        """Outputs ``(member, row)`` at ``(member, row, feature)``; ``keep`` below one drops units at random."""
        h = x
        last = len(self.weights) - 1
        for layer, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b.expand(-1, h.shape[1], -1), h, w.mT)
            if layer < last:
                h = h.relu()
                if keep < 1:
                    h = h * (torch.rand(h.shape, generator=source) < keep) / keep
        return h.squeeze(-1)

    def log_prior(self) -> Tensor:
        """Log density of N(0, 2 / fan-in) weights and N(0, 1) biases, without constants, ``(member,)``."""
        of_weights = [-0.25 * w.shape[-1] * w.square().sum((-1, -2)) for w in self.weights]
        return torch.stack([*of_weights, *(-0.5 * b.square().sum((-1, -2)) for b in self.biases)]).sum(0)


def _batches(x: Tensor, y: Tensor, budget: Budget, members: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches of each member's own order, ``(member, row, feature)`` and ``(member, row)``."""
    size = min(budget.batch, len(x))
    source = generator(seed, "batches")
    while True:
        order = torch.stack([torch.randperm(len(x), generator=source) for _ in range(members)])
        for part in order.split(size, dim=1):
            if part.shape[1] == size:
                yield x[part], y[part]


def _train(nets: _Members, x: Tensor, y: Tensor, budget: Budget, seed: int, *, keep: float = 1.0) -> None:
    """Maximise the log joint density of each member by Adam on one cycle of step sizes."""
    members = len(nets.log_sd)
    optimiser = torch.optim.Adam(nets.parameters, lr=budget.peak, foreach=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, budget.peak, total_steps=budget.steps)
    source = generator(seed, "dropout")
    for _, (at, target) in zip(range(budget.steps), _batches(x, y, budget, members, seed), strict=False):
        loss = -_log_joint(nets, at, target, len(x), keep, source).sum() / len(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def _log_joint(nets: _Members, x: Tensor, y: Tensor, total: int, keep: float, source: torch.Generator) -> Tensor:
    """Unbiased estimate of each member's log joint density, ``(member,)``."""
    off = (y - nets(x, keep=keep, source=source)) / nets.log_sd.exp()[:, None]
    each = -0.5 * off.square() - nets.log_sd[:, None]
    return total * each.mean(1) + nets.log_prior()


def single_network(x: Tensor, y: Tensor, x_test: Tensor, budget: Budget, seed: int) -> Predicted:
    """One network at a mode of the log joint density."""
    return deep_ensemble(x, y, x_test, budget, seed, members=1)


def deep_ensemble(
    x: Tensor, y: Tensor, x_test: Tensor, budget: Budget, seed: int, *, members: int = 5
) -> Predicted:  # fmt: skip
    """Networks from starts of their own, weighted alike (Lakshminarayanan, Pritzel and Blundell 2017)."""
    nets = _Members(x.shape[1], budget.hidden, members, generator(seed, "start"))
    _train(nets, x, y, budget, seed)
    with torch.no_grad():
        return Predicted(nets(x_test.expand(members, -1, -1)), nets.log_sd.exp(), members * nets.count())


def dropout_network(
    x: Tensor, y: Tensor, x_test: Tensor, budget: Budget, seed: int, *, rate: float = 0.05
) -> Predicted:
    """One network whose units drop out in training and in prediction (Gal and Ghahramani 2016)."""
    nets = _Members(x.shape[1], budget.hidden, 1, generator(seed, "start"))
    _train(nets, x, y, budget, seed, keep=1 - rate)
    source = generator(seed, "dropout in prediction")
    with torch.no_grad():
        mean = torch.cat([nets(x_test[None], keep=1 - rate, source=source) for _ in range(budget.draws)])
    return Predicted(mean, nets.log_sd.exp().detach().expand(budget.draws), nets.count())


def swag(
    x: Tensor, y: Tensor, x_test: Tensor, budget: Budget, seed: int, *,
    snapshots: int = 20, step_size: float = SWAG_STEP_SIZE,
) -> Predicted:  # fmt: skip
    """Draws from a normal about the average of stochastic gradient descent (SWAG, Maddox et al. 2019).

    After training, plain steps of a constant size on the weights, the noise held, on the loss in units of the noise
    variance (whose curvature does not grow as the noise falls); the variances of the snapshots and their deviations
    give a covariance that is half diagonal and half of low rank.
    """
    nets = _Members(x.shape[1], budget.hidden, 1, generator(seed, "start"))
    _train(nets, x, y, budget, seed)
    every = max(1, -(-len(x) // budget.batch))
    moved = nets.parameters[:-1]
    optimiser = torch.optim.SGD(moved, lr=step_size)
    variance_of_noise = float(nets.log_sd.detach().exp().square())
    rows = []
    source = generator(seed, "unused")
    batches = _batches(x, y, budget, 1, seed + 1)
    for step in range(snapshots * every):
        at, target = next(batches)
        loss = -variance_of_noise * _log_joint(nets, at, target, len(x), 1.0, source).sum() / len(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % every == 0:
            rows.append(torch.cat([p.detach().reshape(-1) for p in moved]))
    seen = torch.stack(rows)
    mean = seen.mean(0)
    return _swag_prediction(nets, mean, seen.var(0), seen - mean, x_test, budget, seed)


def mean_field_network(
    x: Tensor, y: Tensor, x_test: Tensor, budget: Budget, seed: int, *, noise: str = "local"
) -> Predicted:  # fmt: skip
    """Independent normals on weights and biases (Blundell et al. 2015), with noise of each example's own.

    Args:
        x: Training inputs.
        y: Training targets.
        x_test: Test inputs.
        budget: What every method is given.
        seed: Root seed.
        noise: ``"local"`` draws outputs of layers (Kingma, Salimans and Welling 2015); ``"flipout"`` draws one weight
            for a batch, with signs of each example's own (Wen et al. 2018).
    """
    nets = _Members(x.shape[1], budget.hidden, 1, generator(seed, "start"))
    means = [*nets.weights, *nets.biases]
    start = [0.1 * math.sqrt(2 / w.shape[-1]) for w in nets.weights] + [0.1] * len(nets.biases)
    log_sds = [torch.full_like(m, math.log(sd)).requires_grad_() for m, sd in zip(means, start, strict=True)]
    priors = [math.sqrt(2 / w.shape[-1]) for w in nets.weights] + [1.0] * len(nets.biases)
    source, layers = generator(seed, "noise"), len(nets.weights)

    def drawn(at: Tensor) -> Tensor:
        h = at
        for k in range(layers):
            w, b = nets.weights[k][0], nets.biases[k][0]
            sw, sb = log_sds[k][0].exp(), log_sds[layers + k][0].exp()
            if noise == "local":
                spread = (h.square() @ sw.square().mT + sb.square()).sqrt()
                out = h @ w.mT + b + spread * torch.randn(spread.shape, generator=source)
            else:
                ins, outs = (_signs((len(h), n), source) for n in (w.shape[1], w.shape[0]))
                off = sw * torch.randn(w.shape, generator=source)
                bias = b + sb * torch.randn((len(h), len(w)), generator=source)
                out = h @ w.mT + bias + ((h * ins) @ off.mT) * outs
            h = out.relu() if k < layers - 1 else out
        return h.squeeze(-1)

    optimiser = torch.optim.Adam([*means, *log_sds, nets.log_sd], lr=budget.peak, foreach=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, budget.peak, total_steps=budget.steps)
    for _, (at, target) in zip(range(budget.steps), _batches(x, y, budget, 1, seed), strict=False):
        off = (target[0] - drawn(at[0])) / nets.log_sd.exp()
        fit = (-0.5 * off.square() - nets.log_sd).mean()
        each = zip(means, log_sds, priors, strict=True)
        kl = sum((0.5 * (m.square() + (2 * ls).exp()) / sd**2 - ls).sum() for m, ls, sd in each)
        optimiser.zero_grad()
        (kl / len(x) - fit).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        outputs = torch.stack([drawn(x_test) for _ in range(budget.draws)])
    return Predicted(outputs, nets.log_sd.exp().detach().expand(budget.draws), 2 * (nets.count() - 1) + 1)


def _signs(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=source) - 1


def _swag_prediction(
    nets: _Members, mean: Tensor, variance: Tensor, away: Tensor, x_test: Tensor, budget: Budget, seed: int
) -> Predicted:  # fmt: skip
    source = generator(seed, "swag")
    means, sds = [], []
    for _ in range(budget.draws):
        diagonal = (0.5 * variance).sqrt() * torch.randn(mean.shape, generator=source)
        low_rank = torch.randn(len(away), generator=source) @ away / math.sqrt(2 * max(len(away) - 1, 1))
        drawn, start = mean + diagonal + low_rank, 0
        with torch.no_grad():
            for p in nets.parameters[:-1]:
                p.copy_(drawn[start : start + p.numel()].reshape(p.shape))
                start += p.numel()
            means.append(nets(x_test[None])[0])
            sds.append(nets.log_sd.exp()[0].clone())
    return Predicted(torch.stack(means), torch.stack(sds), (2 + len(away)) * mean.numel())
