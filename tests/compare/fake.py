"""A stand-in for a fit, so that the grid itself can be tested: importable by worker processes."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np

from vifamily.compare.cells import Cell, Outcome
from vifamily.errors import IncompatibleError


@dataclasses.dataclass(frozen=True)
class FakeRunner:
    """Writes a line per call to a log; fails where told to."""

    log: str
    sleep: float = 0.0

    def __call__(self, cell: Cell) -> Outcome:
        with open(self.log, "a") as file:
            file.write(f"{cell.problem},{cell.family},{cell.objective},{cell.seed},{os.getpid()}\n")
        time.sleep(self.sleep)
        if cell.family == "raises":
            raise RuntimeError("the family\nraised")
        if cell.family == "impossible":
            raise IncompatibleError("it needs a log density.", missing=("family: log density",))
        died = Path(f"{self.log}.died")
        if cell.family == "dies once" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.family == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.family == "interrupts":
            raise KeyboardInterrupt
        values = {
            "mean_error": 0.1 * (cell.seed + 1),
            "k_hat": 0.9,
            "k_hat_threshold": 0.7,
            "seconds": 0.5,
            "steps": 10,
        }
        values |= {"stop_reason": "converged", "converged": True, "elbo": -1.0, "mmd": None}
        draws = np.random.default_rng(cell.seed).normal(size=(50, 2))
        return Outcome.of(cell, values=values, errors={"a": 0.1, "b": -0.2}, names=("a", "b"), draws=draws)


def cells(families=("good",), *, seeds=2, problem="p", **settings):
    return [Cell(problem, family, "elbo", seed, settings, "mark") for family in families for seed in range(seeds)]


def lines(path) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
