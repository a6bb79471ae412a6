"""Training of a network beside what its kernel at the start predicts, with what holds and what fails in words."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vifamily.errors import ConfigError
from vifamily.ntk._loss import OutputLoss, curvature_of, gradient_of, values_of
from vifamily.ntk._network import check_inputs, outputs_of, trainable
from vifamily.ntk._tables import Printed
from vifamily.ntk.drift import kernel_drift
from vifamily.ntk.flow import predicted_flow, scaled_gap
from vifamily.ntk.gram import jacobian_gram
from vifamily.ntk.rates import Certificate, FlowRates, certificate, flow_rates
from vifamily.ntk.spectrum import KernelReport, kernel_report
from vifamily.plots.tangent import function_flow

__all__ = ["FlowReport", "compare_flow"]

_MOST_STEPS = 200_000
_SAFE = 0.1
_CLOSE = 0.05
Optimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True, repr=False)
class FlowReport(Printed):
    r"""A network as it was trained, beside the flow that its kernel at the start predicts.

    Attributes:
        times: Times of the records, ``(T,)``; a step counts as its size.
        realised: Outputs of the network, ``(T, N, q)``.
        predicted: Outputs under gradient flow with the kernel at the start.
        linearised: Outputs of the linearised network by gradient descent with the same steps.
        losses: Mean losses of the three, by name, ``(T,)``.
        gap: Distance of the network from the prediction, over the way that the prediction makes, ``(T,)``.
        step_gap: The same of the linearised network: what the size of the steps alone does.
        drift: Relative drift of the kernel, ``(T,)``.
        step_size: Size of a step.
        stable_step: Two over the largest rate along the records; gradient descent is unstable beyond.
        gradient_flow: Whether the optimiser is plain gradient descent.
        convex: Whether the loss was convex at all outputs recorded.
        flat: Entries of the outputs at the start, and at the end, where gradient and curvature are exactly zero.
        kernel: Report on the kernel at the start.
        rates: Predicted rates near the best outputs, or None where those were not given or the loss is not convex.
        bound: The bound at the last time, or None where the best outputs were not given.
        excess: Mean loss at the end above that of the best outputs, or None.
        notes: Sentences on what holds and what fails.
    """

    times: Tensor
    realised: Tensor
    predicted: Tensor
    linearised: Tensor
    losses: dict[str, Tensor]
    gap: Tensor
    step_gap: Tensor
    drift: Tensor
    step_size: float
    stable_step: float
    gradient_flow: bool
    convex: bool
    flat: tuple[int, int]
    kernel: KernelReport
    rates: FlowRates | None
    bound: Certificate | None
    excess: float | None
    notes: tuple[str, ...]

    heading = "Training beside its kernel"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        out = [("time, step size", f"{float(self.times[-1]):.4g}, {self.step_size:.4g}")]
        out += [(f"mean loss, {name}", f"{float(v[0]):.6g} to {float(v[-1]):.6g}") for name, v in self.losses.items()]
        out += [
            ("largest distance from the prediction", f"{float(self.gap.max()):.4g} of the way"),
            ("of the linearised network", f"{float(self.step_gap.max()):.4g} of the way"),
            ("drift of the kernel", f"{float(self.drift[-1]):.4g}"),
        ]
        if self.excess is not None and self.bound is not None:
            out.append(("excess of the mean loss, and its bound", f"{self.excess:.4g}, {self.bound.bound:.4g}"))
        return out

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw losses, distances from the prediction and drift; see :func:`vifamily.plots.function_flow`."""
        losses = {name: value.cpu().numpy() for name, value in self.losses.items()}
        gaps = {"network": self.gap.cpu().numpy(), "linearised network": self.step_gap.cpu().numpy()}
        return function_flow(self.times.cpu().numpy(), losses, gaps, drift=self.drift.cpu().numpy(), title=title)


def compare_flow(
    model: nn.Module,
    x: Tensor,
    loss: OutputLoss,
    *,
    time: float,
    step_size: float | None = None,
    optimiser: Optimiser | None = None,
    best: Tensor | None = None,
    records: int = 8,
    route: Callable[[nn.Module, Tensor], Tensor] = jacobian_gram,
) -> FlowReport:
    r"""Train a copy of a network on the mean loss of all inputs, beside what its kernel predicts.

    Three paths are followed: the network's, by gradient descent; the flow under its kernel at the start; and
    the linearised network's, by gradient descent with the same steps, which shows what their size alone does.

    Costs ``time / step_size`` passes forward and backward, as many products with the Gram matrix, a Gram matrix and
    its drift at each record, and eigenvalues of order ``(N q)^3`` once.

    Args:
        model: The network; it is copied, not changed.
        x: Inputs ``(N, ...)``.
        loss: From outputs ``(N, q)`` to the loss of each input ``(N,)``, by rows; differentiable twice.
        time: Time of training: steps times their size, on the mean loss.
        step_size: Size of a step; by default a tenth of the largest that is stable at the start.
        optimiser: From parameters to an optimiser whose steps need no closure, used in place of gradient descent; its
            learning rate is the size of a step. What is not plain gradient descent is named as such.
        best: Best outputs ``(N, q)``, for rates and bound.
        records: Moments at which all is recorded, besides the start.
        route: From network and inputs to a Gram matrix; :func:`layerwise_gram` is far cheaper for dense networks.

    Raises:
        ConfigError: If time, step size or records are out of range, or too many steps come of them.
        ShapeError: If inputs, outputs or losses have another shape.
        DataError: If the loss is not finite on the way.
        DeviceError: If inputs and parameters differ in device or dtype.

    Source: Jacot, Gabriel and Hongler (2018); Lee et al. (2019); McNamara, Loper and Regier (2024).

    Example:
        >>> from vifamily.ntk import TwoLayerReLU
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> net = TwoLayerReLU(2, 512, 1, generator=torch.Generator())
        >>> report = compare_flow(net, x, lambda f: 0.5 * (f - 1).square().sum(1), time=2.0)
        >>> report.convex, bool(report.gap.max() < 0.1)
        (True, True)
    """
    _check_numbers(time=time, step_size=step_size, records=records)
    work = copy.deepcopy(model)
    check_inputs(trainable(work), x)
    start_gram = route(work, x)
    start = outputs_of(work, {}, x).detach()
    values_of(loss, start)
    made = optimiser([p for p in work.parameters() if p.requires_grad]) if optimiser is not None else None
    size = _step(start_gram, loss, start, step_size, made, time)
    made = made or torch.optim.SGD([p for p in work.parameters() if p.requires_grad], lr=size)
    marks = _marks(math.ceil(time / size * (1 - 1e-12)), records)
    realised, drifts = _train(work, x, loss, made, marks, route, start_gram, start.shape[1])
    linearised = _descend(start_gram, loss, start, size, marks)
    times = torch.tensor(marks, dtype=torch.float64, device=start.device) * size
    predicted = predicted_flow(start_gram, loss, start, times).outputs
    paths = {"network": realised, "linearised network": linearised, "predicted": predicted}
    bends = torch.stack([curvature_of(loss, out) for out in (*realised, *predicted)])
    rates = bound = None
    convex = _is_convex(bends)
    if best is not None:
        bound = certificate(start_gram, start - best, time=float(times[-1]))
        rates = flow_rates(start_gram, loss, best, start) if _is_convex(curvature_of(loss, best)) else None
    losses = {n: torch.stack([values_of(loss, out).mean().detach() for out in path]) for n, path in paths.items()}
    report = FlowReport(
        times=times,
        realised=realised,
        predicted=predicted,
        linearised=linearised,
        losses=losses,
        gap=scaled_gap(realised, predicted),
        step_gap=scaled_gap(linearised, predicted),
        drift=torch.tensor(drifts, dtype=torch.float64),
        step_size=size,
        stable_step=min(_stable_step(start_gram, loss, realised[i]) for i in (0, -1)),
        gradient_flow=_is_descent(made),
        convex=convex,
        flat=(_flat(loss, start), _flat(loss, realised[-1])),
        kernel=kernel_report(start_gram, x),
        rates=rates,
        bound=bound,
        excess=None if best is None else float(losses["network"][-1] - values_of(loss, best).mean()),
        notes=(),
    )
    return dataclasses.replace(report, notes=_notes(report, type(made).__name__))


# -- the three paths ---------------------------------------------------------------------------------------------------
def _train(
    model: nn.Module, x: Tensor, loss: OutputLoss, optimiser: torch.optim.Optimizer, marks: list[int],
    route: Callable[[nn.Module, Tensor], Tensor], gram: Tensor, width: int,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    outputs, drifts = [outputs_of(model, {}, x).detach()], [0.0]
    for step in range(1, marks[-1] + 1):
        optimiser.zero_grad()
        with torch.enable_grad():
            values_of(loss, outputs_of(model, {}, x)).mean().backward()
        optimiser.step()
        if step in marks:
            outputs.append(outputs_of(model, {}, x).detach())
            drifts.append(kernel_drift(route(model, x), gram, outputs=width).relative)
    return torch.stack(outputs), drifts


def _descend(gram: Tensor, loss: OutputLoss, start: Tensor, size: float, marks: list[int]) -> Tensor:
    """Outputs of the linearised network, whose gradient descent is closed in them."""
    at, outputs = start, [start]
    for step in range(1, marks[-1] + 1):
        pull = gradient_of(loss, at).reshape(-1) * (size / len(start))
        at = at - (gram @ pull).reshape(start.shape)
        if step in marks:
            outputs.append(at)
    return torch.stack(outputs)


# -- steps -------------------------------------------------------------------------------------------------------------
def _check_numbers(*, time: float, step_size: float | None, records: int) -> None:
    if not time > 0 or not math.isfinite(time):
        raise ConfigError(f"time must be positive and finite, got {time!r}.")
    if step_size is not None and (not step_size > 0 or not math.isfinite(step_size)):
        raise ConfigError(f"step_size must be positive and finite, got {step_size!r}, or None for a stable one.")
    if isinstance(records, bool) or not isinstance(records, int) or records < 1:
        raise ConfigError(f"records must be an integer of at least one, got {records!r}.")


def _step(
    gram: Tensor, loss: OutputLoss, start: Tensor, step_size: float | None, made: torch.optim.Optimizer | None,
    time: float,
) -> float:  # fmt: skip
    """Size of a step, an optimiser's own where there is one.

    Raises:
        ConfigError: If both are given, or too many steps come of it.
    """
    if made is not None:
        if step_size is not None:
            raise ConfigError("an optimiser has its own step size: give step_size or optimiser, not both.")
        size = float(made.param_groups[0]["lr"])
    elif step_size is None:
        stable = _stable_step(gram, loss, start)
        size = _SAFE * stable if math.isfinite(stable) else time / 100
    else:
        size = step_size
    size = min(size, time)
    if time / size > _MOST_STEPS:
        raise ConfigError(
            f"{time:g} of time at steps of {size:.3g} are {time / size:.0f} steps, more than {_MOST_STEPS}. Take a "
            "shorter time or a larger step_size."
        )
    return size


def _marks(steps: int, records: int) -> list[int]:
    """Steps to record at: the start, and evenly up to the last."""
    return sorted({round(steps * k / records) for k in range(records + 1)})


def _stable_step(gram: Tensor, loss: OutputLoss, at: Tensor) -> float:
    """Two over the largest eigenvalue of ``K F / N``, or a little less."""
    bend = torch.linalg.eigvalsh(curvature_of(loss, at)).max(dim=1).values.clamp_min(0.0)
    # whole blocks are bounded by their largest eigenvalue: exact for scalar curvature, else on the safe side
    root = bend.sqrt().repeat_interleave(at.shape[1])
    top = float(torch.linalg.eigvalsh(root.unsqueeze(1) * gram * root)[-1]) / len(at)
    return 2 / top if top > 0 else math.inf


def _is_descent(optimiser: torch.optim.Optimizer) -> bool:
    """Whether an optimiser is plain gradient descent with one step size."""
    groups: list[dict[str, Any]] = optimiser.param_groups
    idle = all(not g.get("momentum") and not g.get("weight_decay") and not g.get("maximize") for g in groups)
    return type(optimiser) is torch.optim.SGD and idle and len({float(g["lr"]) for g in groups}) == 1


# -- the loss ----------------------------------------------------------------------------------------------------------
def _is_convex(bends: Tensor) -> bool:
    values = torch.linalg.eigvalsh(bends)
    return bool(values.min() >= -(torch.finfo(values.dtype).eps ** 0.5) * values.abs().max())


def _flat(loss: OutputLoss, at: Tensor) -> int:
    """Entries of the outputs by which nothing changes, not even to second order."""
    still = curvature_of(loss, at).abs().amax(dim=2) == 0
    return int((still & (gradient_of(loss, at) == 0)).sum())


# -- words -------------------------------------------------------------------------------------------------------------
def _notes(report: FlowReport, optimiser: str) -> tuple[str, ...]:
    notes = [_on_optimiser(report, optimiser), _on_loss(report)]
    if any(report.flat):
        first, last = report.flat
        notes.append(
            f"The loss is exactly flat in {first} entries of the outputs at the start and {last} at the end, of "
            f"{report.realised[0].numel()}, as behind a clamp: they have no gradient and are not trained. Use a smooth "
            "link or a barrier in place of the clamp."
        )
    notes.append(_on_gap(report))
    if report.bound is not None and report.excess is not None:
        if not math.isfinite(report.bound.bound):
            notes.append(report.bound.note())
        elif report.excess <= report.bound.bound * (1 + 1e-9):
            notes.append(
                f"The bound on the excess of the mean loss holds: {report.excess:.3g}, at most "
                f"{report.bound.bound:.3g}."
            )
        else:
            notes.append(
                f"The bound on the excess of the mean loss is broken: {report.excess:.3g}, above "
                f"{report.bound.bound:.3g}. One of its conditions fails: see above."
            )
    return (*notes, *report.kernel.notes)


def _on_optimiser(report: FlowReport, name: str) -> str:
    if not report.gradient_flow:
        return (
            f"{name} with these settings is not gradient flow: the tangent kernel is not what moves the outputs, and a "
            "step's size is no time. The comparison says how far the two differ, and the theory is silent."
        )
    if report.step_size > report.stable_step:
        return (
            f"The step size {report.step_size:.3g} is above the largest stable one, {report.stable_step:.3g}: this is "
            "not gradient flow. Take a smaller step."
        )
    return (
        f"Gradient descent at {report.step_size / report.stable_step:.2g} of the largest stable step: close to "
        "gradient flow."
    )


def _on_loss(report: FlowReport) -> str:
    return (
        "The loss is convex in the outputs wherever it was looked at."
        if report.convex
        else "The loss is not convex in the outputs on the way: local minima are possible, and the bound has no ground."
    )


def _on_gap(report: FlowReport) -> str:
    gap, step = float(report.gap.max()), float(report.step_gap.max())
    if gap <= _CLOSE:
        return f"The outputs stay within {gap:.2g} of the way of what the kernel at the start predicts."
    if not report.gradient_flow:
        return f"The outputs leave the prediction by {gap:.2g} of the way."
    reason = "the size of the steps" if step > 0.5 * gap else "the kernel, which moves"
    return (
        f"The outputs leave the prediction by {gap:.2g} of the way, the linearised network by {step:.2g}: it is mostly "
        f"{reason}. "
        + ("Take smaller steps." if step > 0.5 * gap else "Take a wider network for the prediction to hold.")
    )
