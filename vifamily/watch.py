"""Who looks on at a fit: a display, a tracker, callbacks, Ctrl-C and a clock, told after each step and asked to end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vifamily.interrupts import Interrupts
from vifamily.progress import FitProgress
from vifamily.trackers import Tracker

__all__ = ["BY_REQUEST", "Watch", "deadline_after"]

BY_REQUEST = ("interrupted", "time_limit", "callback")
"""Reasons for which a fit ended before it was over: no further restart is begun."""


def deadline_after(time_limit: float | None) -> float:
    """Return the time of the monotonic clock at which so many seconds from now are over; None is never.

    Example:
        >>> deadline_after(None)
        inf
    """
    return math.inf if time_limit is None else time.monotonic() + time_limit


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is told of every report of a fit, and may end it.

    Args:
        callbacks: Functions of a report; a true result asks for the end.
        tracker: Where numbers go, or None.
        display: The progress line.
        interrupts: Whether Ctrl-C was pressed.
        deadline: Time of the monotonic clock at which to end.
    """

    callbacks: Sequence[Callable[[Any], Any]]
    tracker: Tracker | None
    display: FitProgress
    interrupts: Interrupts
    deadline: float

    def tell(self, report: Any, *, loss: float, phase: str, numbers: Mapping[str, float]) -> bool:
        """Show, log and pass on a report with ``step`` and ``step_size``; True where a callback asks for the end.

        Args:
            report: What the callbacks get; every one is called.
            loss: Shown.
            phase: Shown.
            numbers: Logged.
        """
        self.display.update(report.step, loss, report.step_size, phase)
        if self.tracker is not None:
            self.tracker.log(report.step, numbers)
        return any([call(report) for call in self.callbacks])

    def reason(self, *, asked: bool) -> str | None:
        """Return why the fit should end now, one of :data:`BY_REQUEST`, or None.

        Args:
            asked: What :meth:`tell` returned.
        """
        if asked:
            return "callback"
        if self.interrupts.asked:
            return "interrupted"
        return "time_limit" if time.monotonic() > self.deadline else None
