"""When to stop: stationary by R-hat, averaged to a known error, then smaller steps until they change nothing.

The scheme follows Dhaka et al. (2020) and Welandawe et al. (RABVI, arXiv 2203.15945). At a fixed step size the
iterates of a stochastic optimiser settle into a stationary law around a point whose bias is proportional to the
step size. A stage ends when the iterates are stationary and their average is known to a given error; the step size
is then halved. If halving moves the average by delta, the error left is about delta too (a geometric series of
ratio one half), so the fit stops when delta is below the tolerance.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from vifamily.numerics.mcse import mcse

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
        return next(at for at in _checks(self.check, self.stage, max(since + 1, self.stage)) if at > since)


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
    """

    def __init__(self, rule: StoppingRule, first_step: int, goal: float) -> None:
        self.rule, self.first_step, self.goal = rule, first_step, goal
        self.rows: list[Tensor] = []
        self.rhat = float("nan")
        self.error = float("nan")
        self.stationary_from: int | None = None

    def add(self, row: Tensor) -> None:
        """Record watched quantities ``(quantity,)``."""
        self.rows.append(row)

    def judge(self, step: int, unit: Tensor) -> str | None:
        """Return ``"done"`` when the average is as good as the stage's goal, ``"slow"`` when it takes too long.

        Args:
            step: Steps taken so far.
            unit: Unit of each quantity (posterior sds for means, one for log sds).
        """
        chain = torch.stack(self.rows).div_(unit).to(torch.float64)
        length, least = chain.shape[0], self.rule.window // self.rule.every
        if self.stationary_from is None and length >= least:
            width = self._stationary_width(chain, least)
            if self.rhat < self.rule.rhat:
                self.stationary_from = step - width * self.rule.every
        if self.stationary_from is not None:
            since = max(0, (self.stationary_from - self.first_step) // self.rule.every)
            self.error = float(mcse(chain[since:]).nan_to_num(0.0).max())
            if self.error < self.goal:
                return "done"
        return "slow" if step - self.first_step >= self.rule.stage else None

    def _stationary_width(self, chain: Tensor, least: int) -> int:
        """Window (in rows) with the smallest worst R-hat among five, that R-hat kept."""
        longest = max(least, int(0.95 * chain.shape[0]))
        widths = sorted({int(w) for w in torch.linspace(least, longest, 5).tolist()})
        worst = _worst_rhat(chain[-longest:], widths, 0.1 * self.rule.mcse).tolist()
        best = min(range(len(widths)), key=lambda k: worst[k])
        self.rhat = worst[best]
        return widths[best]


def _worst_rhat(chain: Tensor, widths: list[int], still: float) -> Tensor:
    """Largest split R-hat over quantities of the last rows of a chain, for several numbers of rows at once.

    The same as :func:`vifamily.numerics.rhat.split_rhat` of each, from sums that run backwards from the last row.
    Quantities that have all but stopped moving are stationary whatever their R-hat says.

    Args:
        chain: ``(row, quantity)``.
        widths: Numbers of rows, increasing.
        still: Range below which a quantity counts as not moving.
    """
    backwards = (chain - chain[-1]).flip(0)
    half = torch.tensor(widths) // 2
    size = half.unsqueeze(-1).to(chain)
    total, square = backwards.cumsum(0), backwards.square().cumsum(0)
    late, late_square = total[half - 1], square[half - 1]
    early, early_square = total[2 * half - 1] - late, square[2 * half - 1] - late_square
    spread = (late_square + early_square - (late.square() + early.square()) / size).clamp_min(0)
    within = 0.5 * spread / (size - 1)
    between = 0.5 * ((late - early) / size).square()
    rhat = ((size - 1) / size + between / within).sqrt()
    high: list[Tensor] = []
    low: list[Tensor] = []
    start = 0
    for width in widths:
        part = backwards[start:width]
        high.append(part.amax(0) if not high else torch.maximum(high[-1], part.amax(0)))
        low.append(part.amin(0) if not low else torch.minimum(low[-1], part.amin(0)))
        start = width
    moved = torch.stack(high) - torch.stack(low) >= still
    return torch.where(moved, rhat, 1.0).nan_to_num(1.0).amax(1)
