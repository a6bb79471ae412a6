"""What a fit shows while it runs: loss with its error, step size, time."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["FitProgress"]


class FitProgress:
    """A rich progress line for a fit; silent when switched off or when the output is not a terminal.

    Args:
        show: True, False, or None for "only on a terminal".
        most_steps: Most steps the fit may take.
        console: Where to show; standard error by default.
    """

    def __init__(self, *, show: bool | None, most_steps: int, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.active = self.console.is_terminal if show is None else show
        self.most_steps = most_steps
        self.recent: deque[float] = deque(maxlen=100)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown = 0.0
        self._last: tuple[int, float, str] | None = None

    def __enter__(self) -> Self:
        """Start showing."""
        if self.active:
            self._progress = Progress(
                TextColumn("[bold]fit[/]"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f} at most"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("step size {task.fields[step_size]}"),
                TextColumn("{task.fields[phase]}"),
                TimeElapsedColumn(),
                TextColumn("left <="),
                TimeRemainingColumn(),
                console=self.console,
                transient=False,
            )
            self._progress.start()
            self._task = self._progress.add_task("fit", total=self.most_steps, loss="-", step_size="-", phase="")
        return self

    def update(self, step: int, loss: float, step_size: float, phase: str) -> None:
        """Show a step; drawn at most ten times a second."""
        if self._progress is None or self._task is None:
            return
        self.recent.append(loss)
        self._last = (step, step_size, phase)
        now = time.monotonic()
        if now - self._shown >= 0.1:
            self._shown = now
            self._draw()

    def _draw(self) -> None:
        if self._progress is None or self._task is None or self._last is None:
            return
        step, step_size, phase = self._last
        count = len(self.recent)
        mean = math.fsum(self.recent) / count
        error = math.sqrt(math.fsum((v - mean) ** 2 for v in self.recent) / max(1, count - 1) / count)
        self._progress.update(
            self._task, completed=step, loss=f"{mean:.4g} +- {error:.2g}", step_size=f"{step_size:.3g}", phase=phase
        )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        if self._progress is not None:
            self._draw()  # the last step is usually too soon after the one before to have been drawn
            self._progress.stop()
