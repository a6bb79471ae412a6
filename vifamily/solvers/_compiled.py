"""Adam's step as a pure function, compiled: many steps per call, the same numbers as step by step up to rounding."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vifamily.numerics.native import CompiledLoop, compile_loop
from vifamily.solvers._watch import watched
from vifamily.types import Batch, Loss

if TYPE_CHECKING:
    from vifamily.solvers._adam_run import AdamRun

__all__ = ["AdamLoop", "compile_adam", "worth_compiling"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
_PROBES = 8
FEWEST_STEPS = 1500
MOST_NUMBERS = 200_000
MOST_PARAMETERS = 20_000


def worth_compiling(
    *, numbers: int, parameters: int, steps: int | None, device: torch.device | str = "cpu"
) -> tuple[bool, str]:
    """Decide from the problem alone whether compiling the step pays.

    Tracing and compiling take about a second; a small step in torch is nearly all overhead, about half a millisecond,
    and in compiled code a few microseconds. So it pays from some 1,500 steps on, and only where the step is small: one
    that passes over 200,000 numbers or more takes its time in arithmetic, which torch does as well. A fit without
    ``steps=`` counts as long: it takes some thousand.

    Args:
        numbers: Draws times restarts times the larger of latent coordinates and data per step.
        parameters: Parameters of the family, all restarts together.
        steps: Most steps asked for, or None.
        device: Where the model lives.

    Returns:
        Whether to compile, and why, in words.

    Example:
        >>> worth_compiling(numbers=1000, parameters=50, steps=None)
        (True, 'small steps, and thousands of them')
        >>> worth_compiling(numbers=1000, parameters=50, steps=200)[0]
        False
    """
    if torch.device(device).type != "cpu":
        return False, "only steps on the CPU are compiled"
    if steps is not None and steps < FEWEST_STEPS:
        return False, f"{steps} steps take less time than compiling"
    if numbers > MOST_NUMBERS or parameters > MOST_PARAMETERS:
        return False, "a step is large, so that torch's overhead does not count"
    return True, "small steps, and thousands of them"


class AdamLoop:
    """The compiled steps of a run of :class:`~vifamily.solvers.Adam`.

    Args:
        loop: The loop.
        names: Names of the terms of the loss.
        rates: Step size of each group of parameters, read by the loop.
        batched: Whether each step takes the positions of its minibatch.
    """

    def __init__(self, loop: CompiledLoop, names: Sequence[str], rates: Tensor, *, batched: bool) -> None:
        self.loop, self.names, self.rates, self.batched = loop, list(names), rates, batched
        self._first: list[Tensor] | None = None
        self._step_size = 0.0

    def __call__(self, run: AdamRun, count: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """Take up to ``count`` steps in place.

        Returns:
            Steps taken, losses ``(step, restart)``, terms ``(step, term)``, watched rows ``(row, quantity)``.
        """
        first = run.step_count
        states = [_optimiser_state(run, i) for i in range(len(run.groups))]
        begun = int(states[0]["step"].item())
        if self._step_size != run.step_size:
            self.rates.copy_(torch.tensor([run._rate(group) for group in run.groups], dtype=torch.float64))
            self._step_size = run.step_size
        sliced = [_span(run, first, count), _corrections(begun, run.pace(first, count))]
        if self.batched:
            sliced.append(_positions(run, first, count))
        taken, (losses, terms), rows = self.loop(
            carried(run), sliced, count=count, phase=first - run.monitor.first_step, every=run.rule.every
        )
        for state in states:
            state["step"] += taken
        since = first - run.monitor.first_step
        seen = (since + taken) // run.rule.every - since // run.rule.every
        return taken, losses[:taken], terms[:taken], rows[0][:seen]

    def losses_at(self, run: AdamRun, values: Sequence[Tensor], count: int) -> Tensor | None:
        """Losses ``(count, restart)`` at given parameters on the noise of the first steps; None if one is not finite.

        At most eight steps.
        """
        taken, losses, _ = self._standing(run, values, count)
        return losses if taken == count else None

    def watched_at(self, run: AdamRun, values: Sequence[Tensor]) -> Tensor | None:
        """Watched quantities at given parameters; None if the loss there is not finite."""
        taken, _, row = self._standing(run, values, 1)
        return row[0] if taken == 1 else None

    def _standing(self, run: AdamRun, values: Sequence[Tensor], count: int) -> tuple[int, Tensor, Tensor]:
        """Take steps of size zero: their number, losses and watched rows."""
        if self._first is None:
            parts = [torch.stack([run.task.noise_at(step) for step in range(_PROBES)])]
            parts.append(torch.ones(_PROBES, 2, dtype=torch.float64))
            self._first = [*parts, _positions(run, 0, _PROBES)] if self.batched else parts
        state = [torch.zeros_like(t) for t in carried(run)]
        for i, value in enumerate(values):
            state[4 * i] = value.contiguous().clone()
        self.rates.zero_()
        self._step_size = 0.0
        taken, (losses, _), rows = self.loop(state, self._first, count=count, every=count)
        return taken, losses, rows[0]


def _corrections(begun: int, pace: np.ndarray) -> Tensor:
    """What the running means are divided by, ``(count, 2)``, in float64 as torch takes them.

    The first divides the step too, so the pace of a schedule goes in there; a step of size 0
    is one divided by infinity.
    """
    table = _correction_table(1 << (begun + len(pace)).bit_length())[begun : begun + len(pace)].clone()
    table[:, 0] /= torch.from_numpy(pace)
    return table


@functools.lru_cache(maxsize=4)
def _correction_table(size: int) -> Tensor:
    steps = np.arange(1, size + 1, dtype=np.float64)
    return torch.from_numpy(np.stack([1 - BETA1**steps, np.sqrt(1 - BETA2**steps)], axis=1))


def _span(run: AdamRun, first: int, count: int) -> Tensor:
    task = run.task
    if task.noise_span is not None:
        return task.noise_span(first, count).contiguous()
    return torch.stack([task.noise_at(step) for step in range(first, first + count)])


def _positions(run: AdamRun, first: int, count: int) -> Tensor:
    rows = []
    for step in range(first, first + count):
        index = run.task.index_at(step) if run.task.index_at is not None else None
        if index is None:
            raise RuntimeError("a batch without positions")
        rows.append(index)
    return torch.stack(rows)


def _optimiser_state(run: AdamRun, number: int) -> dict[str, Tensor]:
    """State of torch's optimiser for a group, made as it would make it."""
    held = run.optimiser.param_groups[number]["params"][0]
    state: dict[str, Tensor] = run.optimiser.state[held]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(held), torch.zeros_like(held)
    return state


def carried(run: AdamRun) -> list[Tensor]:
    """The tensors that a step changes: for each group values, two moments and their sum, then the gradient's sums."""
    out = []
    for i, group in enumerate(run.groups):
        state = _optimiser_state(run, i)
        out += [group.value, state["exp_avg"], state["exp_avg_sq"], run.sums[i]]
    return [*out, run.gradient_sum, run.gradient_square]


@contextlib.contextmanager
def exchanged(roots: Iterable[Any], values: Mapping[int, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters, by the parameter's ``id``, and the parameters back at the end.

    Every place that holds a parameter is visited once. ``torch.func.functional_call`` goes by names: a layer that is
    registered under two of them is exchanged twice, and what it puts back at the end is then the tensor, not the
    parameter, so that the fit goes on with a parameter that nothing reads.

    Args:
        roots: Modules; what is no module has no parameters.
        values: ``id`` of a parameter to what stands in for it.
    """
    modules = {id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}
    places = [
        (module._parameters, key, held)
        for module in modules.values()
        for key, held in module._parameters.items()
        if held is not None and id(held) in values
    ]
    try:
        for where, key, held in places:
            where[key] = values[id(held)]  # type: ignore[assignment]
        yield
    finally:
        for where, key, held in places:
            where[key] = held


class _Pure:
    """The run's loss, gradient and watched quantities as functions of flat parameters."""

    def __init__(self, run: AdamRun, *, batched: bool) -> None:
        self.run, self.batched = run, batched
        self.roots = (run.task.family, run.task.model)
        self.shapes = [[tuple(p.shape) for p in group.parameters] for group in run.groups]
        self.terms: list[str] = []

    def _placed(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        out = {}
        for group, shapes, value in zip(self.run.groups, self.shapes, values, strict=True):
            for held, shape, part in zip(group.parameters, shapes, value.split(group.sizes, dim=1), strict=True):
                out[id(held)] = part.reshape(shape)
        return out

    def _loss(self, values: Sequence[Tensor], noise: Tensor, index: Tensor | None) -> Loss:
        task = self.run.task
        with exchanged(self.roots, self._placed(values)):
            batch: Batch | None = None if index is None else task.model.batch_at(index)
            out: Loss = task.objective_loss(task.family, task.model, noise, batch, None)
        if out.state is not None:
            raise ValueError("the objective carries a state from step to step")
        return out

    def step(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One step of Adam on everything that is carried (see :func:`carried`)."""
        groups = len(self.run.groups)
        state, (noise, correction, *index), rates = inputs[: 4 * groups + 2], inputs[4 * groups + 2 : -1], inputs[-1]
        with torch.enable_grad():
            values = [state[4 * i].detach().requires_grad_() for i in range(groups)]
            loss = self._loss(values, noise, index[0] if index else None)
            found = torch.autograd.grad(loss.surrogate.sum(), values, allow_unused=True)
        gradients = [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]
        self.terms = list(loss.terms)
        out: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            value, first, second, total = state[4 * i : 4 * i + 4]
            first = first + (gradient - first) * (1 - BETA1)
            second = second * BETA2 + gradient * gradient * (1 - BETA2)
            scale = (second.sqrt() / correction[1] + EPSILON).to(value.dtype)
            value = (value - rates[i] / correction[0] * first / scale).to(value.dtype)
            out += [value, first, second, total + value]
        out += [state[-2] + gradients[0], state[-1] + gradients[0] * gradients[0]]
        terms = [term.double().mean().reshape(1) for term in loss.terms.values()]
        packed = torch.cat(terms) if terms else torch.zeros(0, dtype=torch.float64)
        return out, [loss.value.double().reshape(-1), packed]

    def watch(self, *state: Tensor) -> list[Tensor]:
        """The watched quantities of a state."""
        values = [state[4 * i] for i in range(len(self.run.groups))]
        task = self.run.task
        with exchanged(self.roots, self._placed(values)):
            return [watched(task.family, task.monitor_noise, values[0])]


def compile_adam(run: AdamRun) -> AdamLoop | str:
    """Compile the steps of a run, and compare the first with torch's.

    Returns:
        The loop, or why there is none.
    """
    task = run.task
    if run.objective_state is not None:
        return "the objective carries a state from step to step"
    first = run.step_count
    batched = task.batch_at(first) is not None
    if batched and (task.index_at is None or task.index_at(first) is None):
        return "the batches have no positions in the data"
    pure = _Pure(run, batched=batched)
    rates = torch.zeros(len(run.groups), dtype=torch.float64)
    sliced = [task.noise_at(first).contiguous(), torch.ones(2, dtype=torch.float64)]
    if batched:
        sliced.append(_positions(run, first, 1)[0])
    state = carried(run)
    if not all(t.is_contiguous() for t in [*state, *sliced]):
        return "a state that is not contiguous"
    loop = compile_loop(pure.step, carried=state, sliced=sliced, fixed=[rates], watch=pure.watch)
    if isinstance(loop, str):
        return loop
    out = AdamLoop(loop, pure.terms, rates, batched=batched)
    return out if _agrees(run, out) else "the compiled step differs from torch's"


def _agrees(run: AdamRun, loop: AdamLoop) -> bool:
    """Take two compiled steps, compare their losses and gradients with torch's, and put everything back."""
    kept = [t.clone() for t in carried(run)]
    begun = [_optimiser_state(run, i)["step"].clone() for i in range(len(run.groups))]
    before = run.step_count
    same = True
    try:
        for _ in range(2):
            run.gradient_sum.zero_()
            values, gradients = run._evaluate(run.step_count)[1:]
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                break  # nothing to compare: the step itself will say so
            moments = [_optimiser_state(run, i)["exp_avg"].clone() for i in range(len(run.groups))]
            taken, losses, _, _ = loop(run, 1)
            if taken != 1:
                same = False
                break
            same = same and _close(losses[0], torch.tensor(values, dtype=torch.float64), run.flat.value.dtype)
            for i, (moment, gradient) in enumerate(zip(moments, gradients, strict=True)):
                expected = moment + (gradient - moment) * (1 - BETA1)
                same = same and _close(_optimiser_state(run, i)["exp_avg"], expected, gradient.dtype)
            run.step_count += 1
    finally:
        for tensor, old in zip(carried(run), kept, strict=True):
            tensor.copy_(old)
        for i, old in enumerate(begun):
            _optimiser_state(run, i)["step"].copy_(old)
        run.step_count = before
    return same


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() <= tolerance * (scale + 1e-12)).all())
