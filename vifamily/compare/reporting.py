"""What a comparison shows while it runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vifamily.compare.cells import Outcome

__all__ = ["Report", "reporter", "sentence"]

Report = Callable[[Outcome, int, int], None]


def sentence(outcome: Outcome) -> str:
    """Return one line about a finished cell.

    Example:
        >>> sentence(Outcome("banana", "flow", "elbo", 0, values={"seconds": 1.25, "stop_reason": "converged"}))
        'banana x flow x elbo, seed 0: converged in 1.2 s'
    """
    place = f"{outcome.problem} x {outcome.family} x {outcome.objective}, seed {outcome.seed}"
    if outcome.status != "ok":
        return f"{place}: {outcome.status}: {outcome.reason}"
    seconds = outcome.values.get("seconds")
    time = f" in {seconds:.1f} s" if isinstance(seconds, (int, float)) else ""
    kept = " (kept from before)" if outcome.resumed else ""
    return f"{place}: {outcome.values.get('stop_reason')}{time}{kept}"


@contextlib.contextmanager
def reporter(progress: bool | Report | None, total: int) -> Iterator[Report | None]:  # noqa: FBT001 (one of three forms)
    """Give the function to call after each cell.

    Args:
        progress: True for a line on standard error, None for one on a terminal only, False for none, or the function
            itself.
        total: Number of cells.
    """
    if callable(progress):
        yield progress
        return
    console = Console(file=sys.stderr)
    if not (console.is_terminal if progress is None else progress):
        yield None
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[last]}"))
    with Progress(TextColumn("[bold]compare[/]"), *columns, console=console) as bar:
        task = bar.add_task("compare", total=total, last="")

        def report(outcome: Outcome, done: int, _: int) -> None:
            bar.update(task, completed=done, last=sentence(outcome).replace("[", r"\["))
            if outcome.status == "failed":
                bar.console.print(sentence(outcome), markup=False, style="red")

        yield report
