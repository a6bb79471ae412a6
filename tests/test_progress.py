"""The progress line: what a reader sees on a terminal, and silence elsewhere."""

import io
import re

import pytest
from rich.console import Console

from vifamily.progress import FitProgress


def terminal(*, is_terminal=True):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=150, color_system=None, _environ={})


def text(console):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def run(display, steps=20):
    with display:
        for step in range(1, steps + 1):
            display.update(step, 10.0 + (-1) ** step, 0.025, "stage 2, averaging")


def test_a_terminal_shows_loss_with_error_step_size_phase_and_time():
    console = terminal()
    run(FitProgress(show=None, most_steps=400, console=console))
    last = text(console)[-400:]
    # twenty numbers 9 and 11: mean 10, error 1.026 / sqrt(20)
    assert "loss 10 +- 0.23" in last
    assert "20/400 at most" in last
    assert "step size 0.025" in last
    assert "stage 2, averaging" in last
    assert re.search(r"\d:\d\d:\d\d left <= (\d|-)", last)


def test_the_last_step_is_shown_though_drawing_is_rare():
    console = terminal()
    with FitProgress(show=True, most_steps=5, console=console) as display:
        display.update(1, 1.0, 0.1, "stage 1")
        display.update(5, 3.0, 0.1, "stage 1")  # sooner than a tenth of a second after
    assert "5/5 at most" in text(console)[-300:]
    assert "loss 2 +- 1 " in text(console)[-300:]


def test_drawing_is_rare(monkeypatch):
    display = FitProgress(show=True, most_steps=5, console=terminal())
    drawn = []
    monkeypatch.setattr(display, "_draw", lambda: drawn.append(1))
    with display:
        for step in range(50):
            display.update(step, 1.0, 0.1, "")
    assert len(drawn) < 10


@pytest.mark.parametrize(
    ("show", "is_terminal", "seen"), [(None, False, False), (None, True, True), (False, True, False)]
)
def test_it_is_silent_when_switched_off_or_not_on_a_terminal(show, is_terminal, seen):
    console = terminal(is_terminal=is_terminal)
    display = FitProgress(show=show, most_steps=400, console=console)
    assert display.active is seen
    run(display)
    assert bool(text(console)) is seen


def test_it_goes_away_when_the_fit_raises():
    display = FitProgress(show=True, most_steps=400, console=terminal())
    with pytest.raises(ZeroDivisionError), display:
        display.update(1, 1.0, 0.1, "")
        raise ZeroDivisionError
    assert display._progress is not None
    assert display._progress.finished or not display._progress.live.is_started


def test_one_step_has_no_error_to_show():
    console = terminal()
    run(FitProgress(show=True, most_steps=3, console=console), steps=1)
    assert "loss 9 +- 0 " in text(console)


def test_it_goes_to_standard_error_by_default(capsys):
    run(FitProgress(show=False, most_steps=3))
    display = FitProgress(show=True, most_steps=3)
    run(display, steps=2)
    captured = capsys.readouterr()
    assert captured.out == ""
