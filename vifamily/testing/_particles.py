"""The contracts of objectives that move particles along a vector field (see :class:`vifamily.objectives.Svgd`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vifamily.models import Density
from vifamily.numerics.newton import value_and_gradient
from vifamily.testing import targets, tolerances
from vifamily.testing._report import Broken, Contracts, NotApplicable
from vifamily.testing._tools import agree, mean_is, seeded

__all__ = ["check_particles"]

_COPIES = 2000


def check_particles(contracts: Contracts, objective: Any) -> None:
    """Run the contracts that take the place of those about gradients.

    Args:
        contracts: Where to record them.
        objective: An objective with ``flow``, ``direction``, ``held`` and ``attraction``.
    """
    for contract in (
        _flow_restarts, _stein_identity, _kl_descent, _rate_is_value, _permutations, _rotations, _repulsion,
        _single_particle, _conjugate_moments, _flow_minibatches, _annealing, _mode_weights,
    ):  # fmt: skip
        contracts.run(contract.__name__.removeprefix("_"), contract, objective)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def _draws(target: targets.Target, *leading: int, seed: int) -> Tensor:
    mean, covariance = target.moments()
    draws: Tensor = mean + _random(*leading, mean.shape[0], seed=seed) @ torch.linalg.cholesky(covariance).mT
    return draws


def _score(model: Any, points: Tensor) -> Tensor:
    return value_and_gradient(model.log_joint, points)[1]


def _flow_restarts(objective: Any) -> None:
    """Several sets of particles at once equal one after the other."""
    points, score = _random(3, 6, 2, seed=1), _random(3, 6, 2, seed=2)
    together = objective.flow(points, score)
    for r in range(3):
        alone = objective.flow(points[r], score[r])
        for what in ("direction", "discrepancy", "strength", "bandwidth"):
            agree(getattr(together, what)[r], getattr(alone, what), tolerances.EXACT, f"the {what} of one set alone")


def _stein_identity(objective: Any) -> None:
    """Draws of the posterior itself drive no point anywhere, in the mean."""
    target = targets.linear_regression()
    held = objective.held(_draws(target, 6, seed=3))
    points, at = _draws(target, _COPIES, 6, seed=4), _draws(target, 3, seed=5)
    direction = held.direction(points, _score(target.model, points), at.expand(_COPIES, 3, 2))
    mean_is(direction, 0.0, "a mean direction under draws of the posterior")


def _kl_descent(objective: Any) -> None:
    """Moved by it, the KL divergence of the particles falls at the rate that is its discrepancy.

    The change of KL under ``T(x) = x + step phi(x)`` is that of the mean of ``-log p(T(x)) - log |det grad T(x)|``, by
    finite differences.
    """
    target = targets.linear_regression()
    points = _draws(target, 7, seed=6) + 0.4
    score = _score(target.model, points)
    held = objective.held(points)
    at = points.clone().requires_grad_()
    direction = held.direction(points, score, at)
    rows = [torch.autograd.grad(direction[:, c].sum(), at, retain_graph=True)[0] for c in range(2)]
    jacobian, direction = torch.stack(rows, -2).detach(), direction.detach()

    def divergence(step: float) -> Tensor:
        determinant = torch.linalg.slogdet(torch.eye(2, dtype=torch.float64) + step * jacobian).logabsdet
        found: Tensor = (-target.model.log_joint(points + step * direction) - determinant).mean()
        return found

    # the direction is of any size: the step keeps the move small
    small = 1e-4 / float(direction.abs().max() + jacobian.abs().max())
    slope = (divergence(small) - divergence(-small)) / (2 * small)
    agree(slope, -held.flow(points, score).discrepancy, tolerances.FINITE_DIFFERENCE, "minus the discrepancy")


def _rate_is_value(objective: Any) -> None:
    """The discrepancy of particles is never negative, and the direction at the particles is that at any points."""
    points, score = _random(9, 2, seed=7), _random(9, 2, seed=8)
    flow = objective.flow(points, score)
    if not float(flow.discrepancy) > 0:
        raise Broken(got=f"a discrepancy of {float(flow.discrepancy):.3g}", expected="a positive number")
    agree(objective.direction(points, score, points), flow.direction, tolerances.EXACT, "one direction in two ways")


def _permutations(objective: Any) -> None:
    """The order of the particles does not matter."""
    points, score, order = _random(8, 2, seed=9), _random(8, 2, seed=10), torch.randperm(8, generator=seeded(0))
    plain, mixed = objective.flow(points, score), objective.flow(points[order], score[order])
    agree(mixed.direction, plain.direction[order], tolerances.EXACT, "the directions in the other order")
    agree(mixed.discrepancy, plain.discrepancy, tolerances.EXACT, "the same discrepancy")


def _rotations(objective: Any) -> None:
    """A rotation of the coordinates rotates the directions."""
    points, score = _random(8, 3, seed=11), _random(8, 3, seed=12)
    turn = torch.linalg.qr(_random(3, 3, seed=13)).Q
    turned = objective.flow(points @ turn, score @ turn)
    agree(turned.direction, objective.flow(points, score).direction @ turn, tolerances.EXACT, "rotated directions")


def _repulsion(objective: Any) -> None:
    """Without scores particles move apart."""
    points = _random(8, 2, seed=14)
    direction = objective.flow(points, torch.zeros_like(points)).direction
    outwards = float(((points - points.mean(0)) * direction).sum())
    if not outwards > 0:
        raise Broken(got=f"a movement of {outwards:.3g} away from the centre", expected="a positive one")


def _single_particle(objective: Any) -> None:
    """One particle follows its score: it goes to a mode."""
    point, score = _random(1, 2, seed=15), _random(1, 2, seed=16)
    if bool((objective.flow(point, torch.zeros_like(score)).direction != 0).any()):
        raise NotApplicable("its kernel moves a particle by itself")
    direction = objective.flow(point, score).direction
    cosine = float(torch.cosine_similarity(direction[0], score[0], dim=0))
    if not cosine > 1 - 1e-9:
        raise Broken(got=f"a direction of cosine {cosine:.3g} with the score", expected="the score's direction")


def _conjugate_moments(objective: Any) -> None:
    """From elsewhere the particles come to surround the mean of a conjugate posterior, with a spread like its own.

    Finitely many particles are narrower than the posterior; what is asked for is the mean, and a spread that is neither
    that of a point nor larger.
    """
    target = targets.linear_regression()
    mean, covariance = target.moments()
    factor = torch.linalg.cholesky(covariance)
    u = _random(20, 2, seed=17) + 1.5  # in coordinates where the posterior is standard normal
    first = None
    second = torch.zeros_like(u)
    for _ in range(400):
        score = _score(target.model, mean + u @ factor.mT) @ factor
        flow = objective.flow(u, score)
        first = flow.discrepancy if first is None else first
        second = second + flow.direction.square()
        u = u + 0.2 * flow.direction / (second.sqrt() + 1e-12)
    off, spread = u.mean(0).abs().max(), u.std(0, correction=0).log()
    if not (off < 0.1 and bool((spread > -0.5).all()) and bool((spread < 0.05).all())):
        raise Broken(
            got=f"means {float(off):.2g} sds off and log sds off by {[round(v, 3) for v in spread.tolist()]}",
            expected="means within 0.1 sds, and sds within 0.6 to 1.05 of the posterior's",
        )
    if not float(flow.discrepancy) < 0.1 * float(first):  # type: ignore[arg-type]
        raise Broken(got=f"a discrepancy of {float(flow.discrepancy):.3g}", expected="a tenth of that at the start")


def _flow_minibatches(objective: Any) -> None:
    """Over the batches of an epoch the mean direction is that of all data."""
    if objective.subsampling != "unbiased":
        raise NotApplicable(f"minibatches are declared {objective.subsampling!r}")
    model = targets.linear_regression().model
    points = _random(6, 2, seed=18)
    source = model.batches(4, seed=0)
    parts = []
    for i in range((model.num_data or 0) // 4):
        score = value_and_gradient(functools.partial(model.log_joint, batch=source.at(i)), points)[1]
        parts.append(objective.flow(points, score).direction)
    whole = objective.flow(points, _score(model, points)).direction
    agree(torch.stack(parts).mean(0), whole, tolerances.EXACT, "the direction of all data as the mean over an epoch's")


def _annealing(objective: Any) -> None:
    """Scores count between not at all and in full, in full in the end, and the direction is linear in that weight."""
    last = objective.annealing_steps
    weights = [objective.attraction(step) for step in range(last)]
    if not all(0 < w <= 1 for w in weights) or objective.attraction(last) != 1.0 or objective.attraction(10**9) != 1.0:
        raise Broken(
            got=f"weights {weights[:5]} and at the end {objective.attraction(last)}", expected="(0, 1], then 1"
        )
    points, score = _random(5, 2, seed=19), _random(5, 2, seed=20)
    none, half, full = (objective.flow(points, score, attraction=a).direction for a in (0.0, 0.5, 1.0))
    agree(half, 0.5 * (none + full), tolerances.EXACT, "a direction that is linear in the weight of the scores")


def _mode_weights(objective: Any) -> None:
    """What it declares about modes is so: other weights of far modes leave the direction at one of them unchanged."""

    def mixture(weight: float) -> Density:
        logs = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()
        return Density(
            lambda z: torch.stack([logs[i] - 0.5 * (z[:, 0] - c) ** 2 for i, c in enumerate((-8.0, 8.0))]).logsumexp(0),
            dim=1,
        )

    points = 7.5 + 0.5 * _random(6, 1, seed=21)
    one, other = (objective.flow(points, _score(mixture(w), points)).direction for w in (0.5, 0.9))
    same = bool(((one - other).abs() < 1e-8).all())
    if same is not bool(objective.blind_to_mode_weights):
        raise Broken(
            got="the same direction" if same else "another direction",
            expected=f"what blind_to_mode_weights={objective.blind_to_mode_weights} says, at other mode weights",
        )
