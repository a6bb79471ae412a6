"""Limited-memory quasi-Newton minimisation of several functions side by side, one evaluation of all at a time.

Each row has a function, a point and a line search of its own; what is shared is that all rows are evaluated together,
which is how many restarts cost little more than one. Between evaluations the state is a handful of arrays, so a run
can be written down at any point and taken up bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Descent", "FirstGuess", "NotFinite", "first_guess"]

FirstGuess = Callable[[np.ndarray], np.ndarray]
"""A guess at the inverse Hessian, as its product with a vector."""

MEMORY = 50
_SUFFICIENT = 1e-4
_CURVATURE = 0.9
_TRIALS = 25
_LONGEST = 10.0


def first_guess(said: Mapping[str, Any] | None, order: Sequence[tuple[str, int]]) -> FirstGuess | None:
    """Put together what is known of the inverse Hessian of each parameter.

    Args:
        said: For each parameter a number (a multiple of the identity) or a matrix, or None.
        order: Names and sizes of the parameters as they lie in a row.

    Returns:
        The product with it, or None where a parameter is missing.
    """
    if said is None or any(name not in said for name, _ in order):
        return None
    blocks = []
    start = 0
    for name, size in order:
        value = said[name]
        blocks.append((start, start + size, value if isinstance(value, float) else value.double().cpu().numpy()))
        start += size

    def product(vector: np.ndarray) -> np.ndarray:
        parts = [
            value * vector[first:last] if isinstance(value, float) else value @ vector[first:last]
            for first, last, value in blocks
        ]
        out: np.ndarray = np.concatenate(parts) if parts else vector
        return out

    return product


class NotFinite(Exception):  # noqa: N818
    """A function or its gradient is not finite at a point that was accepted before, or at the start."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


@dataclasses.dataclass
class _Memory:
    """Differences of points and gradients, newest last, of one row."""

    steps: np.ndarray
    changes: np.ndarray
    count: int = 0
    first: FirstGuess | None = None

    def clear(self) -> None:
        self.count = 0

    def add(self, step: np.ndarray, change: np.ndarray) -> None:
        product = float(step @ change)
        # without positive curvature the direction would no longer go downhill
        if not product > 1e-12 * float(change @ change) ** 0.5 * float(step @ step) ** 0.5:
            return
        if self.count == len(self.steps):
            self.steps[:-1], self.changes[:-1] = self.steps[1:].copy(), self.changes[1:].copy()
            self.count -= 1
        self.steps[self.count], self.changes[self.count] = step, change
        self.count += 1

    def newton(self, gradient: np.ndarray) -> np.ndarray:
        """Approximate inverse Hessian times the gradient, by the two-loop recursion (Nocedal and Wright 2006, 7.4)."""
        if self.count == 0:
            return gradient.copy() if self.first is None else self.first(gradient)
        steps, changes = self.steps[: self.count], self.changes[: self.count]
        products = np.einsum("ij,ij->i", steps, changes)
        out = gradient.copy()
        weights = np.zeros(self.count)
        for i in range(self.count - 1, -1, -1):
            weights[i] = steps[i] @ out / products[i]
            out -= weights[i] * changes[i]
        if self.first is None:
            out *= products[-1] / (changes[-1] @ changes[-1])
        else:
            out = self.first(out) * (products[-1] / (changes[-1] @ self.first(changes[-1])))
        for i in range(self.count):
            out += (weights[i] - changes[i] @ out / products[i]) * steps[i]
        return out


_ARRAYS = ("x", "gradient", "direction", "low_gradient")
_NUMBERS = (
    "value", "slope", "t", "low", "high", "low_value", "low_slope", "high_value", "high_slope", "decrement", "gained",
)  # fmt: skip
_COUNTS = ("trials", "fresh", "done", "stuck", "guessed")


class Descent:
    """L-BFGS on R functions of P numbers each.

    Call :meth:`proposal`, evaluate every row there, and hand the result to :meth:`update`; a row is ``done`` when the
    quasi-Newton model promises less than ``goal``. A value that is not finite is a wall: the line search backs off.

    Args:
        x: Starting points, ``(row, number)``.
        goal: Decrease of the function that is no longer worth a step. For a loss in nats it bounds the squared distance
            to the minimum, in standard deviations and halved, so it needs no units.
        resolution: Relative rounding error of the functions' values.
        first: A guess at the inverse Hessian of each row; without one, steps start along the gradient.
        memory: Most pairs of differences to keep for each row.
    """

    x: np.ndarray
    gradient: np.ndarray
    direction: np.ndarray
    low_gradient: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    t: np.ndarray
    low: np.ndarray
    high: np.ndarray
    low_value: np.ndarray
    low_slope: np.ndarray
    high_value: np.ndarray
    high_slope: np.ndarray
    decrement: np.ndarray
    gained: np.ndarray
    trials: np.ndarray
    fresh: np.ndarray
    done: np.ndarray
    stuck: np.ndarray
    guessed: np.ndarray

    def __init__(
        self,
        x: np.ndarray,
        *,
        goal: float,
        resolution: float = 2.2e-16,
        first: Sequence[FirstGuess | None] = (),
        memory: int = MEMORY,
    ) -> None:
        rows, size = x.shape
        self.goal, self.resolution = goal, resolution
        for name in _ARRAYS:
            setattr(self, name, np.zeros((rows, size)))
        for name in _NUMBERS:
            setattr(self, name, np.zeros(rows))
        for name in _COUNTS:
            setattr(self, name, np.zeros(rows, dtype=np.int64))
        self.x = x.astype(np.float64)
        guesses = first or [None] * rows
        self.memory = [_Memory(np.zeros((memory, size)), np.zeros((memory, size)), 0, guess) for guess in guesses]
        self.guessed[:] = [guess is not None for guess in guesses]
        self.renew()

    def _forget(self, row: int) -> None:
        """Drop what is known of a row's curvature, the guess as well when nothing else is."""
        if self.memory[row].count == 0:
            self.memory[row].first, self.guessed[row] = None, 0
        self.memory[row].clear()

    def renew(self) -> None:
        """Start on changed functions from where the points are; what is known of the curvature is kept."""
        self.fresh[:], self.done[:], self.stuck[:] = 1, 0, 0
        # the first function has to be seen to decrease; later ones may be at their minimum already
        self.gained[:] = [0.0 if memory.count else np.inf for memory in self.memory]

    @property
    def finished(self) -> bool:
        """Whether every row is at its minimum, or cannot get nearer."""
        return bool(self.done.all())

    def proposal(self) -> np.ndarray:
        """Points to evaluate next, ``(row, number)``."""
        moving = np.where((self.fresh == 1) | (self.done == 1), 0.0, self.t)
        points: np.ndarray = self.x + moving[:, None] * self.direction
        return points

    def update(self, value: np.ndarray, gradient: np.ndarray) -> None:
        """Take in values ``(row,)`` and gradients ``(row, number)`` at the proposal.

        Raises:
            NotFinite: If a row has no finite value where it stands.
        """
        finite = np.isfinite(value) & np.isfinite(gradient).all(axis=1)
        lost = np.flatnonzero((self.fresh == 1) & ~finite)
        if len(lost):
            raise NotFinite(int(lost[0]))
        # functions without a minimum run off to where squares overflow; what comes of it is checked
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for row in range(len(value)):
                if self.fresh[row]:
                    self.value[row], self.gradient[row] = value[row], gradient[row]
                    self.fresh[row] = 0
                    if self.stuck[row]:
                        self.done[row] = 1
                    else:
                        self._aim(row)
                elif not self.done[row]:
                    self._search(row, float(value[row]), gradient[row], finite=bool(finite[row]))

    def newton(self, gradient: np.ndarray) -> np.ndarray:
        """Approximate inverse Hessian times a gradient of each row, ``(row, number)``."""
        return np.stack([memory.newton(g) for memory, g in zip(self.memory, gradient, strict=True)])

    # -- one row -------------------------------------------------------------------------------------------------------
    def _aim(self, row: int) -> None:
        """Choose a direction, or find that there is nothing left to gain."""
        gradient, memory = self.gradient[row], self.memory[row]
        step = memory.newton(gradient)
        decrement = float(gradient @ step)
        if not (np.isfinite(decrement) and decrement > 0):
            memory.clear()
            memory.first, self.guessed[row] = None, 0
            step, decrement = gradient.copy(), float(gradient @ gradient)
        self.decrement[row] = decrement
        floor = max(self.goal, self.resolution * abs(self.value[row]))
        if decrement == 0 or (0.5 * decrement < floor and self.gained[row] < 10 * floor):
            self.done[row] = 1
            return
        self.direction[row], self.slope[row] = -step, -decrement
        # without a memory or a guess the length of the direction means nothing
        known = memory.count > 0 or memory.first is not None
        longest = _LONGEST / float(np.abs(step).max()) if known else 1 / decrement**0.5
        self._begin(row, min(1.0, longest))

    def _begin(self, row: int, t: float) -> None:
        self.t[row], self.trials[row] = t, 0
        self.low[row], self.low_value[row], self.low_slope[row] = 0.0, self.value[row], self.slope[row]
        self.high[row] = self.high_value[row] = self.high_slope[row] = np.inf

    def _search(self, row: int, value: float, gradient: np.ndarray, *, finite: bool) -> None:
        """One trial of the line search for the weak Wolfe conditions."""
        t, start, slope = self.t[row], self.value[row], self.slope[row]
        slope_here = float(gradient @ self.direction[row]) if finite else np.inf
        enough = finite and value <= start + _SUFFICIENT * t * slope
        if finite and not enough and value <= start + 10 * self.resolution * max(1.0, abs(start)):
            # the values no longer tell, but the slopes do (Hager and Zhang 2005)
            enough = slope_here <= (2 * _SUFFICIENT - 1) * slope
        if enough and slope_here >= _CURVATURE * slope:
            self._accept(row, t, value, gradient)
            return
        if enough:
            self.low[row], self.low_value[row], self.low_slope[row] = t, value, slope_here
            self.low_gradient[row] = gradient
        else:
            self.high[row], self.high_value[row], self.high_slope[row] = t, value if finite else np.inf, slope_here
        self.trials[row] += 1
        if self.trials[row] >= _TRIALS:
            self._give_up(row)
        else:
            self.t[row] = self._next(row)

    def _accept(self, row: int, t: float, value: float, gradient: np.ndarray) -> None:
        step = t * self.direction[row]
        self.memory[row].add(step, gradient - self.gradient[row])
        self.gained[row] = self.value[row] - value
        self.x[row] += step
        self.value[row], self.gradient[row] = value, gradient
        self._aim(row)

    def _give_up(self, row: int) -> None:
        if self.low[row] > 0:
            self._accept(row, self.low[row], self.low_value[row], self.low_gradient[row].copy())
        else:
            # the memory may mislead: once more, downhill, from a point that is evaluated anew
            self.stuck[row] = int(self.memory[row].count == 0 and not self.guessed[row])
            self._forget(row)
            self.fresh[row] = 1

    def _next(self, row: int) -> float:
        """Next trial: further out, or inside the bracket where a cubic has its minimum."""
        low, high = self.low[row], self.high[row]
        if np.isinf(high):
            # where the slope, taken as linear, would vanish; too little of a step was taken, so further out in any case
            guess = low * self.slope[row] / min(self.slope[row] - self.low_slope[row], -1e-300)
            return float(np.clip(guess, 2 * low, 10 * low))
        width = high - low
        if not np.isfinite(self.high_value[row]):
            return float(low + 0.2 * width)
        theta = 3 * (self.low_value[row] - self.high_value[row]) / width + self.low_slope[row] + self.high_slope[row]
        inside = theta**2 - self.low_slope[row] * self.high_slope[row]
        if not inside >= 0:
            return float(low + 0.5 * width)
        root = inside**0.5
        bottom = self.high_slope[row] - self.low_slope[row] + 2 * root
        part = 1 - (self.high_slope[row] + root - theta) / bottom if bottom > 0 else 0.5
        # past half of the trials plain bisection, which always ends
        if self.trials[row] > _TRIALS // 2 or not np.isfinite(part):
            part = 0.5
        return float(low + np.clip(part, 0.1, 0.9) * width)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        for name in (*_ARRAYS, *_NUMBERS, *_COUNTS):
            setattr(self, name, getattr(self, name)[list(rows)].copy())
        self.memory = [self.memory[row] for row in rows]

    # -- writing down --------------------------------------------------------------------------------------------------
    def arrays(self) -> dict[str, np.ndarray]:
        """The whole state."""
        out = {name: getattr(self, name).copy() for name in (*_ARRAYS, *_NUMBERS, *_COUNTS)}
        out["memory_steps"] = np.stack([m.steps for m in self.memory])
        out["memory_changes"] = np.stack([m.changes for m in self.memory])
        out["memory_count"] = np.array([m.count for m in self.memory], dtype=np.int64)
        return out

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take up a written-down state.

        Raises:
            KeyError: If a part is missing.
            ValueError: If a part has another shape.
        """
        for name in (*_ARRAYS, *_NUMBERS, *_COUNTS):
            held = getattr(self, name)
            if arrays[name].shape != held.shape:
                raise ValueError(f"{name} has the shape {held.shape}, the saved one {arrays[name].shape}.")
            setattr(self, name, arrays[name].astype(held.dtype))
        parts = zip(self.memory, arrays["memory_steps"], arrays["memory_changes"], arrays["memory_count"], strict=True)
        for memory, steps, changes, count in parts:
            memory.steps, memory.changes, memory.count = steps.copy(), changes.copy(), int(count)
        for memory, guessed in zip(self.memory, self.guessed, strict=True):
            memory.first = memory.first if guessed else None
