"""One judge for all sides: the bound of a Gaussian on fixed draws, when a target was reached, and moment errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import BenchmarkError
from vifamily.problems import Problem
from vifamily.rng import split

__all__ = ["Judge", "density_offset", "first_time", "quasi_normal"]

_MOST_WORK = 2e9
_COARSE = 256


def quasi_normal(dim: int, count: int, seed: int) -> Tensor:
    """Scrambled Sobol points as standard normal ones, and their mirror images: ``(count, dim)``.

    Example:
        >>> bool((quasi_normal(3, 64, 0).mean(0).abs() < 1e-12).all())
        True
    """
    engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    uniform = engine.draw(count // 2, dtype=torch.float64).clamp(2.0**-31, 1 - 2.0**-31)
    points = torch.special.ndtri(uniform)
    # each point beside its image, so that any even number of the first ones is balanced too
    return torch.stack([points, -points], dim=1).reshape(count, dim)


def first_time(times: Sequence[float], gaps: Sequence[float], tolerance: float) -> int | None:
    """Index of the first point from which on every gap is within the tolerance; None where the last one is not.

    A run that touches the target and leaves it again has not reached it: its time counts from its last return.

    Args:
        times: Times of the points, not decreasing.
        gaps: Best value minus value of each point; NaN and infinity are outside.
        tolerance: Largest gap allowed.

    Example:
        >>> first_time([1.0, 2.0, 3.0, 4.0], [5.0, 0.05, 3.0, 0.01], 0.1)
        3
    """
    if len(times) != len(gaps):
        raise BenchmarkError(f"as many times as gaps are needed, got {len(times)} and {len(gaps)}.")
    found = None
    for i in range(len(gaps) - 1, -1, -1):
        if not gaps[i] <= tolerance:
            break
        found = i
    return found


def density_offset(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return by how much two log densities differ beyond a constant, relative to their size.

    Example:
        >>> density_offset(np.array([1.0, 2.0]), np.array([4.0, 5.0]))
        0.0
    """
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.inf
    difference = theirs - ours
    return float(np.ptp(difference) / (1 + np.abs(ours).max()))


@dataclasses.dataclass(frozen=True)
class Moments:
    """Errors against reference moments, worst over columns.

    Attributes:
        mean: Largest error of a mean, in reference sds.
        log_sd: Largest log ratio of an sd, in size.
    """

    mean: float
    log_sd: float


class Judge:
    """Values Gaussians on one problem, always on the same draws, in float64, constants of the model included.

    Args:
        problem: The problem.
        draws: Draws; fewer where the data are many (``draws * data * dim`` stays under 2e9), never under 256.
        seed: Seed of the draws.
    """

    def __init__(self, problem: Problem, draws: int = 4096, seed: int = 0) -> None:
        self.problem, self.model = problem, problem.model
        dim, data = self.model.dim, getattr(self.model, "num_data", None) or 1
        while draws > _COARSE and draws * data * dim > _MOST_WORK:
            draws //= 2
        self.noise = quasi_normal(dim, draws, split(seed, "benchmark/judge"))
        self.part = max(1, int(2e7 / max(data, 100)))

    def _values(self, mean: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        z = mean + (noise * scale if scale.dim() == 1 else noise @ scale.mT)
        with torch.no_grad():
            return torch.cat([self.model.log_joint(part) for part in z.split(self.part)])

    def elbo(self, mean: np.ndarray, scale: np.ndarray, near: float = -math.inf) -> float:
        """Evidence lower bound of ``N(mean, scale scale^T)``.

        Args:
            mean: ``(dim,)``.
            scale: Standard deviations ``(dim,)`` or a factor ``(dim, dim)``.
            near: A value more than 3 nats below this one on 256 draws is returned as it is, without the others.
        """
        centre, factor = torch.from_numpy(mean), torch.from_numpy(scale)
        log_scale = factor.abs().log().sum() if factor.dim() == 1 else torch.linalg.slogdet(factor)[1]
        entropy = float(log_scale) + 0.5 * len(mean) * (1 + math.log(2 * math.pi))
        try:
            rough = float(self._values(centre, factor, self.noise[:_COARSE]).mean()) + entropy
            if len(self.noise) <= _COARSE or not rough > near - 3:
                return rough if math.isfinite(rough) else -math.inf
            value = float(self._values(centre, factor, self.noise).mean()) + entropy
        except (RuntimeError, ValueError):  # a factorisation that fails far out
            return -math.inf
        return value if math.isfinite(value) else -math.inf

    def moments(self, mean: np.ndarray, scale: np.ndarray, count: int = 131_072) -> Moments | None:
        """Errors of means and sds on the constrained scale against the reference; None where there is none."""
        reference = self.problem.reference
        if reference is None:
            return None
        noise = quasi_normal(len(mean), count, split(1, "benchmark/judge"))
        centre, factor = torch.from_numpy(mean), torch.from_numpy(scale)
        z = centre + (noise * factor if factor.dim() == 1 else noise @ factor.mT)
        try:
            with torch.no_grad():
                columns = torch.cat([
                    self.problem.columns(self.model.layout.constrain(part)) for part in z.split(16_384)
                ]).numpy()  # fmt: skip
        except (RuntimeError, ValueError):
            return None
        with np.errstate(all="ignore"):
            errors = np.abs(columns.mean(0) - reference.mean) / reference.sd
            ratios = np.abs(np.log(columns.std(0) / reference.sd))
        return Moments(float(np.max(errors)), float(np.max(ratios)))


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers that are not finite become None."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
