"""Pathfinder as a dialogue: it asks for log densities at points, all paths in one request, and returns Gaussians.

Written as a generator, so that whoever drives it decides where evaluations happen, may stop between any two, and can
take up an earlier dialogue by giving the same answers again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ModelError
from vifamily.numerics.gaussian_start import value_and_gradient
from vifamily.numerics.pathfinder import PathGaussians, path_gaussians
from vifamily.numerics.psis import FEWEST_DRAWS, Psis, psis
from vifamily.rng import generator, split
from vifamily.solvers._fixed_draws import balanced_draws
from vifamily.solvers._quasi_newton import Descent, NotFinite
from vifamily.types import NoiseSpec

__all__ = ["Answer", "Dialogue", "Found", "NoGaussian", "Request", "drive", "evaluate", "find"]

_GOAL = 1e-6
_MEMORY = 12
_MOST_EVALUATIONS = 400
_MOST_JUDGED = 60
_LARGEST_REQUEST = 4_000_000
_MOST_FOR_MOMENTS = 500
_JUDGE_DRAWS = 256
_LARGEST_PART = 4_000_000


class NoGaussian(Exception):  # noqa: N818
    """No start point, or no Gaussian on any path, has a finite log density."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Points ``(point, dim)`` where the log density is wanted, with its gradient or without."""

    points: Tensor
    gradient: bool
    phase: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """Log densities ``(point,)`` and, where asked for, gradients ``(point, dim)``, in float64."""

    value: Tensor
    gradient: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What the paths led to.

    Attributes:
        laws: The Gaussian with the highest ELBO of each path that has one.
        elbo: Its ELBO, ``(law,)``.
        whole: Whether each path ended at a mode, or its best Gaussian lies before its last point.
        lost: Paths without any Gaussian of finite ELBO.
        z: Draws of all laws, as many of each, ``(draw, dim)``; none where none were asked for.
        log_ratio: Log density of the model minus that of the equal mixture of the laws, at the draws.
        weights: Smoothed importance weights of the draws, or None without draws.
        mean: Mean of the chosen Gaussian, ``(dim,)``.
        factor: Lower-triangular factor of its covariance, or None in many dimensions.
        conditional_sd: Sd of each coordinate given the others, ``(dim,)``.
        choice: Where the chosen Gaussian comes from, in words.
    """

    laws: PathGaussians
    elbo: Tensor
    whole: list[bool]
    lost: int
    z: Tensor
    log_ratio: Tensor
    weights: Psis | None
    mean: Tensor
    factor: Tensor | None
    conditional_sd: Tensor
    choice: str


Dialogue = Generator[Request, Answer, Found]


def evaluate(log_density: Callable[[Tensor], Tensor], request: Request, like: Tensor, num_data: int | None) -> Answer:
    """Answer a request, a part at a time so that memory does not grow with the number of points.

    Args:
        log_density: ``(n, dim) -> (n,)``.
        request: What is asked.
        like: A tensor with the dtype and device of the model.
        num_data: Number of data, as far as it is known.
    """
    part = max(1, _LARGEST_PART // max(1, num_data or 1, request.points.shape[1]))
    values, gradients = [], []
    for points in request.points.to(like).split(part):
        value, gradient = _parted(log_density, points, gradient=request.gradient)
        values.append(value.detach().cpu().double())
        gradients.append(gradient.detach().cpu().double())
    return Answer(torch.cat(values), torch.cat(gradients) if request.gradient else None)


def _parted(log_density: Callable[[Tensor], Tensor], points: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Evaluate points; where the model raises for some of them (a failed factorisation), these are NaN.

    Raises:
        ModelError: If it raises for every one of them.
    """
    try:
        if gradient:
            return value_and_gradient(log_density, points)
        with torch.no_grad():
            return log_density(points), points
    except ModelError:
        if len(points) == 1:
            raise
    found: list[tuple[Tensor, Tensor]] = []
    error: ModelError | None = None
    for part in points.split(-(-len(points) // 2)):
        try:
            found.append(_parted(log_density, part, gradient=gradient))
        except ModelError as raised:
            error = raised
            found.append((part.new_full((len(part),), torch.nan), torch.full_like(part, torch.nan)))
    if error is not None and all(bool(torch.isnan(value).all()) for value, _ in found):
        raise error
    return torch.cat([value for value, _ in found]), torch.cat([slope for _, slope in found])


def drive(
    dialogue: Dialogue, log_density: Callable[[Tensor], Tensor], like: Tensor, num_data: int | None = None
) -> Found:
    """Answer every request of a dialogue and return what it found.

    Raises:
        NoGaussian: If there is nothing finite.
    """
    try:
        request = next(dialogue)
        while True:
            request = dialogue.send(evaluate(log_density, request, like, num_data))
    except StopIteration as end:
        found: Found = end.value
        return found


def find(
    starts: Tensor,
    paths: int,
    *,
    history: int,
    elbo_draws: int,
    draws: int,
    seed: int,
    resolution: float = 2.2e-16,
) -> Dialogue:
    """Follow paths uphill and choose Gaussians on them.

    Args:
        starts: Candidates for start points, ``(candidate, dim)``, best first; those without a finite log density are
            passed over.
        paths: Most paths.
        history: Pairs of differences in each inverse-Hessian estimate.
        elbo_draws: Draws on which each Gaussian is judged, even; the same for all.
        draws: Draws of all laws together that are weighted at the end; 0 for none.
        seed: Seed of all draws.
        resolution: Relative rounding error of the log density.

    Raises:
        NoGaussian: If there is nothing finite.
    """
    walked = yield from _walk(starts, paths, seed, resolution)
    laws, elbo, whole = yield from _judge(walked, history, elbo_draws, seed)
    if not len(elbo):
        raise NoGaussian("no Gaussian on any path has a finite ELBO")
    z, log_ratio, weights = torch.zeros(0, starts.shape[1]), torch.zeros(0), None
    if draws:
        z, log_ratio = yield from _weighted(laws, draws, seed)
        weights = psis(log_ratio) if len(log_ratio) >= FEWEST_DRAWS else None
    best = int(elbo.argmax())
    mean, conditional = laws.mean[best], laws.conditional_sd(best)
    factor = laws.factor(best) if starts.shape[1] <= _MOST_FOR_MOMENTS else None
    choice = "the path with the highest ELBO"
    matched = None if weights is None or factor is None else _moments(z, weights)
    if matched is not None and factor is not None:
        better = yield from _better((mean, factor), matched, seed)
        if better:
            mean, factor, choice = *matched, "the moments of the weighted draws of all paths"
            conditional = torch.cholesky_inverse(factor).diagonal().rsqrt()
    return Found(laws, elbo, whole, len(walked) - len(elbo), z, log_ratio, weights, mean, factor, conditional, choice)


@dataclasses.dataclass
class _Path:
    """Points that were accepted on one path, with the gradients of minus the log density."""

    points: list[np.ndarray]
    gradients: list[np.ndarray]
    at_mode: bool = False


def _first_points(starts: Tensor, paths: int, seed: int) -> Generator[Request, Answer, np.ndarray]:
    """Choose start points where the log density is finite and not already flat."""
    answer = yield Request(starts, gradient=True, phase="start points")
    assert answer.gradient is not None  # noqa: S101 - asked for one line above
    good = torch.isfinite(answer.value) & torch.isfinite(answer.gradient).all(-1)
    if not bool(good.any()):
        raise NoGaussian("the log density is not finite at any start point")
    chosen, slopes = starts[good][:paths].double(), answer.gradient[good][:paths]
    # a path that begins at its end shows no curvature: it begins beside it
    still = slopes.square().sum(-1) < 2 * _GOAL
    noise = torch.randn(chosen.shape, generator=generator(seed, "pathfinder/start"), dtype=torch.float64)
    moved: np.ndarray = torch.where(still[:, None], chosen + noise, chosen).cpu().numpy()
    return moved


def _walk(starts: Tensor, paths: int, seed: int, resolution: float) -> Generator[Request, Answer, list[_Path]]:
    """Climb from every start point, all paths in one request at a time."""
    x = yield from _first_points(starts, paths, seed)
    descent = Descent(x, goal=_GOAL, resolution=resolution, memory=_MEMORY)
    walked = [_Path([], []) for _ in x]
    lost: set[int] = set()
    for _ in range(_MOST_EVALUATIONS):
        active = np.flatnonzero(descent.done == 0)
        if not len(active):
            break
        answer = yield Request(torch.from_numpy(descent.proposal()[active]), gradient=True, phase="paths")
        assert answer.gradient is not None  # noqa: S101 - asked for one line above
        value, gradient = np.full(len(x), np.inf), np.full(x.shape, np.inf)
        value[active], gradient[active] = -answer.value.numpy(), -answer.gradient.numpy()
        _take(descent, value, gradient, lost)
        for row in active.tolist():
            path = walked[row]
            fresh = descent.fresh[row] or row in lost
            if not fresh and (not path.points or not np.array_equal(path.points[-1], descent.x[row])):
                path.points.append(descent.x[row].copy())
                path.gradients.append(descent.gradient[row].copy())
    for row, path in enumerate(walked):
        path.at_mode = bool(descent.done[row]) and row not in lost
    return walked


def _take(descent: Descent, value: np.ndarray, gradient: np.ndarray, lost: set[int]) -> None:
    """Hand an evaluation to the paths; one that stands where nothing is finite ends there."""
    while True:
        try:
            descent.update(value, gradient)
        except NotFinite as error:
            descent.done[error.row], descent.fresh[error.row] = 1, 0
            lost.add(error.row)
        else:
            return


def _to_judge(count: int) -> np.ndarray:
    """Positions on a path of ``count`` points whose Gaussians are judged: all, or the last and some of the others."""
    if count <= _MOST_JUDGED:
        return np.arange(count)
    last = _MOST_JUDGED // 3
    return np.unique(
        np.append(np.linspace(0, count - 1 - last, _MOST_JUDGED - last), np.arange(count - last, count)).astype(int)
    )


def _judge(
    walked: list[_Path], history: int, elbo_draws: int, seed: int
) -> Generator[Request, Answer, tuple[PathGaussians, Tensor, list[bool]]]:
    """Estimate the ELBO of the Gaussians on every path, on common draws, and keep the best of each path."""
    parts, owners, last = [], [], []
    for number, path in enumerate(walked):
        if not path.points:
            continue
        laws, position = path_gaussians(np.stack(path.points), np.stack(path.gradients), history)
        keep = np.flatnonzero(np.isin(position, _to_judge(len(path.points))))
        parts.append(laws[torch.from_numpy(keep)])
        owners += [number] * len(keep)
        last += [bool(position[k] == len(path.points) - 1) for k in keep]
    if not owners:
        raise NoGaussian("no path shows a positive curvature")
    every, dim = PathGaussians.joined(parts), parts[0].mean.shape[1]
    noise = balanced_draws(NoiseSpec((dim,)), elbo_draws, split(seed, "pathfinder/elbo"))
    block = max(1, _LARGEST_REQUEST // (elbo_draws * dim))
    bounds = []
    for start in range(0, len(every), block):
        laws = every[slice(start, start + block)]
        answer = yield Request(laws.draw(noise).flatten(0, 1), gradient=False, phase="judging Gaussians")
        ratio = answer.value.reshape(len(laws), -1) - laws.log_prob_of_draws(noise)
        bounds.append(torch.where(torch.isfinite(ratio).all(-1), ratio.mean(-1), -torch.inf))
    elbo = torch.cat(bounds)
    best, whole = [], []
    for number, path in enumerate(walked):
        own = [i for i, owner in enumerate(owners) if owner == number]
        top = max(own, key=lambda i: float(elbo[i]), default=None)
        if top is not None and bool(torch.isfinite(elbo[top])):
            best.append(top)
            whole.append(path.at_mode or not last[top])
    return every[best], elbo[best], whole


def _weighted(laws: PathGaussians, draws: int, seed: int) -> Generator[Request, Answer, tuple[Tensor, Tensor]]:
    """Draw from the equal mixture of the laws, as often from each; log ratios are to the density of the mixture.

    Ratios to each draw's own law would count a mode once for every path that ends in it.
    """
    source = generator(seed, "pathfinder/draws")
    each = -(-draws // len(laws))
    noise = torch.randn(len(laws), each, laws.mean.shape[1], generator=source, dtype=torch.float64)
    # one draw of each law in turn, so that any first part of them is shared out evenly too
    z = laws.draw(noise).transpose(0, 1).flatten(0, 1)[:draws]
    answer = yield Request(z, gradient=False, phase="weighing draws")
    mixture = laws.log_prob(z).logsumexp(0) - np.log(len(laws))
    return z, answer.value - mixture


def _moments(z: Tensor, weights: Psis) -> tuple[Tensor, Tensor] | None:
    """Mean and factor of the weighted draws, where the weights can be trusted with so many moments."""
    if not weights.reliable or weights.ess < 10 * z.shape[1]:
        return None
    w = weights.log_weight.exp()
    mean = w @ z
    apart = (z - mean) * w.sqrt()[:, None]
    factor, info = torch.linalg.cholesky_ex(apart.mT @ apart)
    return None if int(info) else (mean, factor)


def _better(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], seed: int) -> Generator[Request, Answer, bool]:
    """Whether the second Gaussian has the higher ELBO, on common draws."""
    dim = len(first[0])
    noise = balanced_draws(NoiseSpec((dim,)), _JUDGE_DRAWS, split(seed, "pathfinder/choice"))
    points = torch.cat([mean + noise @ factor.mT for mean, factor in (first, second)])
    answer = yield Request(points, gradient=False, phase="choosing a Gaussian")
    bounds = [
        value.mean() + factor.diagonal().log().sum()
        for value, (_, factor) in zip(answer.value.chunk(2), (first, second), strict=True)
    ]
    # comparisons with what is not finite are false
    return bool(bounds[1] > bounds[0]) or not bool(torch.isfinite(bounds[0]))
