"""Who looks on at a fit: everyone is told, and the first who asks for the end is named."""

import math
import time
from types import SimpleNamespace

import pytest

from vifamily.interrupts import Interrupts
from vifamily.progress import FitProgress
from vifamily.watch import BY_REQUEST, Watch, deadline_after

REPORT = SimpleNamespace(step=3, step_size=0.5)


class Logger:
    def __init__(self):
        self.rows = []

    def start(self, config):
        """Nothing is kept of it."""

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def finish(self):
        """Nothing is open."""


def watch(*callbacks, tracker=None, asked=False, deadline=math.inf):
    interrupts = Interrupts()
    interrupts.asked = asked
    return Watch(callbacks, tracker, FitProgress(show=False, most_steps=10), interrupts, deadline)


def test_every_callback_is_told_and_any_may_ask_for_the_end():
    told, tracker = [], Logger()
    looking = watch(lambda report: True, told.append, tracker=tracker)
    assert looking.tell(REPORT, loss=1.0, phase="", numbers={"loss": 1.0, "step_size": 0.5})
    assert told == [REPORT] and tracker.rows == [(3, {"loss": 1.0, "step_size": 0.5})]
    assert not watch(told.append).tell(REPORT, loss=1.0, phase="", numbers={})


@pytest.mark.parametrize(
    ("asked", "pressed", "deadline", "reason"),
    [
        (True, True, 0.0, "callback"),
        (False, True, 0.0, "interrupted"),
        (False, False, 0.0, "time_limit"),
        (False, False, math.inf, None),
    ],
)
def test_the_reason_to_end(asked, pressed, deadline, reason):
    assert watch(asked=pressed, deadline=deadline).reason(asked=asked) == reason
    assert reason is None or reason in BY_REQUEST


def test_deadlines():
    assert deadline_after(None) == math.inf
    assert 0 < deadline_after(5.0) - time.monotonic() <= 5
