"""When to stop: stationary by R-hat, averaged to a known error, then smaller steps until they change nothing.

The scheme follows Dhaka et al. (2020) and Welandawe et al. (RABVI, arXiv 2203.15945). At a fixed step size the
iterates of a stochastic optimiser settle into a stationary law around a point whose bias is proportional to the
step size. A stage ends when the iterates are stationary and their average is known to a given error; the step size
is then halved. If halving moves the average by delta, the error left is about delta too (a geometric series of
ratio one half), so the fit stops when delta is below the tolerance.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from vifamily.numerics.mcse import mcse
from vifamily.numerics.native import kernels
from vifamily.solvers._trail import Trail

__all__ = ["StageMonitor", "StoppingRule"]


@dataclasses.dataclass(frozen=True)
class StoppingRule:
    """Thresholds, in units that do not depend on the problem.

    Attributes:
        every: Steps between two watched states.
        window: Least number of steps over which stationarity is judged.
        check: Steps between two judgements, at first; a fifth of the stage's length where that is more.
        rhat: Split R-hat below which the iterates count as stationary.
        mcse: Largest Monte-Carlo error of an averaged mean (in posterior sds) or log sd in the last two stages.
        rough: The same for stages whose average is not yet near its limit.
        tolerance: Largest change of an averaged mean (in posterior sds) or log sd on shrinking the step size.
        stage: Most steps at one step size.
        shrink: Factor between step sizes.
        stages: Most step sizes.
    """

    every: int = 5
    window: int = 200
    check: int = 100
    rhat: float = 1.1
    mcse: float = 0.02
    rough: float = 0.1
    tolerance: float = 0.02
    stage: int = 5000
    shrink: float = 0.5
    stages: int = 10

    def next_check(self, since: int) -> int:
        """Steps from the start of a stage to the first judgement after ``since`` steps.

        A judgement takes time in proportion to the stage's length, so later ones lie further apart.

        Example:
            >>> rule = StoppingRule()
            >>> [rule.next_check(since) for since in (0, 100, 1000, 1150, 4950)]
            [100, 200, 1200, 1200, 5000]
        """
        checks = _checks(self.check, self.stage, max(since + 1, self.stage))
        return checks[bisect.bisect_right(checks, since)]


@functools.lru_cache(maxsize=64)
def _checks(check: int, stage: int, least: int) -> tuple[int, ...]:
    out = [0]
    while out[-1] < least:
        following = out[-1] + check * max(1, out[-1] // (5 * check))
        out.append(stage if out[-1] < stage < following else following)
    return tuple(out)


class StageMonitor:
    """Watches the iterates of one stage.

    Args:
        rule: Thresholds.
        first_step: Step at which the stage began.
        goal: Monte-Carlo error at which the stage may end.
        native: Judge in C where that can be compiled: the same numbers up to rounding, sooner.
    """

    def __init__(self, rule: StoppingRule, first_step: int, goal: float, *, native: bool = False) -> None:
        self.rule, self.first_step, self.goal = rule, first_step, goal
        found = kernels() if native else None
        self._worst_rhat = _worst_rhat if found is None else found.worst_rhat
        self._mcse = _mcse if found is None else found.mcse
        self.rows: Trail | None = None
        self.rhat = float("nan")
        self.error = float("nan")
        self.stationary_from: int | None = None

    def add(self, rows: Tensor) -> None:
        """Record watched quantities ``(quantity,)``, or several such rows."""
        if rows.dim() == 1:
            rows = rows.unsqueeze(0)
        if self.rows is None:
            self.rows = Trail(rows.shape[1])
        self.rows.extend(rows.detach().cpu().numpy())

    def judge(self, step: int, unit: Tensor) -> str | None:
        """Return ``"done"`` when the average is as good as the stage's goal, ``"slow"`` when it takes too long.

        Args:
            step: Steps taken so far.
            unit: Unit of each quantity (posterior sds for means, one for log sds).
        """
        if self.rows is None:
            raise ValueError("nothing was watched yet")
        chain, scale = self.rows.rows, unit.detach().cpu().numpy()
        length, least = len(chain), self.rule.window // self.rule.every
        if self.stationary_from is None and length >= least:
            width = self._stationary_width(chain, scale, least)
            if self.rhat < self.rule.rhat:
                self.stationary_from = step - width * self.rule.every
        if self.stationary_from is not None:
            since = max(0, (self.stationary_from - self.first_step) // self.rule.every)
            self.error = float(np.nan_to_num(self._mcse(chain[since:]) / scale).max())
            if self.error < self.goal:
                return "done"
        return "slow" if step - self.first_step >= self.rule.stage else None

    def _stationary_width(self, chain: np.ndarray, unit: np.ndarray, least: int) -> int:
        """Window (in rows) with the smallest worst R-hat among five, that R-hat kept."""
        longest = max(least, int(0.95 * len(chain)))
        widths = sorted({least + k * (longest - least) // 4 for k in range(5)})
        worst = self._worst_rhat(chain[-longest:], widths, 0.1 * self.rule.mcse * unit)
        best = int(worst.argmin())
        self.rhat = float(worst[best])
        return widths[best]


def _mcse(chain: np.ndarray) -> np.ndarray:
    return mcse(torch.from_numpy(chain)).numpy()


def _worst_rhat(chain: np.ndarray, widths: list[int], still: np.ndarray) -> np.ndarray:
    """Largest split R-hat over quantities of the last rows of a chain, for several numbers of rows at once.

    The same as :func:`vifamily.numerics.rhat.split_rhat` of each, from sums that run backwards from the last row.
    Quantities that have all but stopped moving are stationary whatever their R-hat says.

    Args:
        chain: ``(row, quantity)``.
        widths: Numbers of rows, increasing.
        still: Range below which a quantity counts as not moving, ``(quantity,)``.
    """
    edges, half, at_half, at_whole = _stretches(tuple(widths))
    # sums over the stretches between all ends of half windows, then over the stretches from the last row on
    starts = edges[:-1]
    with np.errstate(all="ignore"):
        backwards = np.subtract(chain[: -edges[-1] - 1 : -1], chain[-1], order="C")
        total = np.add.reduceat(backwards, starts).cumsum(0)
        square = np.add.reduceat(backwards * backwards, starts).cumsum(0)
        late, both = total[at_half], total[at_whole]
        early = both - late
        spread = square[at_whole] - (late * late + early * early) / half
        within = np.maximum(spread, 0) * (0.5 / (half - 1))
        rhat = np.sqrt((half - 1) / half + 0.5 * ((late - early) / half) ** 2 / within)
        high = np.maximum.accumulate(np.maximum.reduceat(backwards, starts))[at_whole]
        low = np.minimum.accumulate(np.minimum.reduceat(backwards, starts))[at_whole]
        worst: np.ndarray = np.where((high - low >= still) & (rhat == rhat), rhat, 1.0).max(1)
    return worst


@functools.lru_cache(maxsize=256)
def _stretches(widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ends of all half and whole windows, counted from the last row; half widths; the stretch that ends with each."""
    half = np.array(widths) // 2
    edges = np.unique(np.concatenate([[0], half, 2 * half]))
    return edges, half[:, None].astype(float), np.searchsorted(edges, half) - 1, np.searchsorted(edges, 2 * half) - 1
