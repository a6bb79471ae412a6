"""How far a tangent kernel moves, over training and against width."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vifamily.errors import ConfigError, DataError, ShapeError
from vifamily.ntk._network import check_inputs, outputs_of, trainable
from vifamily.ntk._tables import Printed, checked_gram
from vifamily.ntk.gram import jacobian_gram, jacobian_of, jacobian_pieces
from vifamily.plots.tangent import power_laws

__all__ = ["DriftRecorder", "KernelDrift", "WidthSweep", "jacobian_drift", "kernel_drift", "width_sweep"]

_LAZY = 0.1


@dataclasses.dataclass(frozen=True, repr=False)
class KernelDrift(Printed):
    r"""How far a kernel has moved from where it started.

    Attributes:
        relative: ``||K_t - K_0||_F / ||K_0||_F``.
        diagonal: Mean over inputs of ``||K_t(x, x) - K_0(x, x)||_F``, not relative.
        similarity: Centred kernel alignment of the two, one where they are proportional after centring.
        notes: Sentences on what that means.
    """

    relative: float
    diagonal: float
    similarity: float
    notes: tuple[str, ...]

    heading = "Drift of the kernel"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        return [
            ("relative drift", f"{self.relative:.4g}"),
            ("on the diagonal, absolute", f"{self.diagonal:.4g}"),
            ("centred alignment with the start", f"{self.similarity:.6g}"),
        ]


def kernel_drift(now: Tensor, start: Tensor, *, outputs: int = 1) -> KernelDrift:
    r"""Drift between two Gram matrices on the same inputs.

    Args:
        now: Gram matrix ``(N q, N q)`` now.
        start: The one at the start.
        outputs: Outputs ``q``.

    Raises:
        ShapeError: If the two differ in shape, or rows are no multiple of `outputs`.
        DataError: If one is not finite or not symmetric, or the one at the start is zero.

    Source: McNamara, Loper and Regier (2024), "Globally convergent variational inference", for the diagonal; Cortes,
    Mohri and Rostamizadeh (2012) for centred alignment.

    Example:
        >>> start = torch.eye(2, dtype=torch.float64)
        >>> round(kernel_drift(1.5 * start, start).relative, 12)
        0.5
    """
    if now.shape != start.shape or outputs < 1 or len(start) % max(outputs, 1):
        raise ShapeError(
            f"both Gram matrices must have one shape with a multiple of {outputs} rows, got {tuple(now.shape)} and "
            f"{tuple(start.shape)}."
        )
    size = len(start) // outputs
    now, start = checked_gram(now, size), checked_gram(start, size)
    length = float(start.norm())
    if length == 0:
        raise DataError("the kernel at the start is zero, so that its drift has no scale.")
    change = (now - start).reshape(size, outputs, size, outputs)
    diagonal = change.diagonal(dim1=0, dim2=2).square().sum((0, 1)).sqrt().mean()
    a, b = _centred(now), _centred(start)
    product = float(a.norm() * b.norm())
    relative = float(change.norm()) / length
    note = (
        f"The kernel moved by less than {_LAZY:g} of itself: training is close to that of the linearised network."
        if relative < _LAZY
        else "The kernel moved: what is predicted from the one at the start holds early in training only. "
        "Take a wider network, or a shorter time."
    )
    return KernelDrift(relative, float(diagonal), float((a * b).sum()) / product if product else math.nan, (note,))


def jacobian_drift(now: nn.Module, start: nn.Module, x: Tensor, *, chunk: int | None = None) -> float:
    r"""Relative Frobenius distance of the Jacobians of a network now and at the start.

    .. math:: \frac{\|J_t - J_0\|_F}{\|J_0\|_F}

    Beside :func:`kernel_drift` it sees features that turn while their products stay: rotated Jacobians have one and
    the same kernel. One parameter tensor is differentiated at a time, twice the cost of the Jacobians alone.

    Args:
        now: The network now.
        start: A copy of it at the start, ``copy.deepcopy(net)``.
        x: Inputs ``(N, ...)``.
        chunk: Inputs whose Jacobians are held at once; by default all.

    Raises:
        ConfigError: If the two have other parameters, or as :func:`jacobian_gram`.
        ShapeError: If inputs or outputs have another shape.
        DeviceError: If inputs and parameters differ in device or dtype.
        DataError: If the Jacobian at the start is zero.

    Source: McNamara, Loper and Regier (2024), whose code records the distance, not relative.

    Example:
        >>> net = nn.Linear(2, 1, dtype=torch.float64)
        >>> jacobian_drift(net, net, torch.eye(2, dtype=torch.float64))
        0.0
    """
    first, second = trainable(start), trainable(now)
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in second.items()}:
        raise ConfigError("the network now and at the start must have the same trainable parameters: copy.deepcopy.")
    check_inputs(first, x)
    check_inputs(second, x)
    with torch.no_grad():
        width = outputs_of(start, {}, x[:1]).shape[1]
    change = length = 0.0
    for name in first:
        for piece in jacobian_pieces(len(x), width, chunk, None):
            before = jacobian_of(start, first, name, x, *piece)
            length += float(before.square().sum())
            change += float((jacobian_of(now, second, name, x, *piece) - before).square().sum())
    if length == 0:
        raise DataError("the Jacobian at the start is zero, so that its drift has no scale.")
    return math.sqrt(change / length)


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


class DriftRecorder:
    """Records how kernel and parameters of a network move while it is trained.

    Each record costs a Gram matrix, by default the Jacobian route's: of order ``N^2 q^2 P``. The network is read, never
    changed; the Gram matrix and the parameters at the start are kept.

    Args:
        model: The network, before training.
        x: Inputs ``(N, ...)`` to compare kernels on.
        route: From network and inputs to a Gram matrix; :func:`layerwise_gram` is far cheaper for dense networks.

    Attributes:
        steps: The steps that were recorded.
        drifts: The drift at each.
        moved: At each, how far each parameter moved relative to its length at the start, by name; relative to one where
            it started at zero.

    Raises:
        ConfigError: As :func:`jacobian_gram`.

    Example:
        >>> from vifamily.ntk import TwoLayerReLU, layerwise_gram
        >>> net = TwoLayerReLU(2, 8, 1, generator=torch.Generator(), readout="normal")
        >>> recorder = DriftRecorder(net, torch.eye(2, dtype=torch.float64), route=layerwise_gram)
        >>> recorder.record(0).relative
        0.0
    """

    def __init__(
        self, model: nn.Module, x: Tensor, *, route: Callable[[nn.Module, Tensor], Tensor] = jacobian_gram
    ) -> None:
        self._model, self._x, self._route = model, x, route
        self._start = route(model, x)
        self._parameters = {name: value.clone() for name, value in trainable(model).items()}
        self.steps: list[int] = []
        self.drifts: list[KernelDrift] = []
        self.moved: list[dict[str, float]] = []

    def record(self, step: int) -> KernelDrift:
        """Compare the network now with that at the start, and keep what was found.

        Args:
            step: A number for this moment.
        """
        now = self._route(self._model, self._x)
        found = kernel_drift(now, self._start, outputs=len(now) // len(self._x))
        self.steps.append(step)
        self.drifts.append(found)
        self.moved.append(
            {
                name: float((value - self._parameters[name]).norm()) / (float(self._parameters[name].norm()) or 1.0)
                for name, value in trainable(self._model).items()
            }
        )
        return found


@dataclasses.dataclass(frozen=True, repr=False)
class WidthSweep(Printed):
    r"""What was measured of networks of several widths, and how it falls with width.

    Attributes:
        widths: The widths.
        values: What was measured, by name, ``(width, seed)``.
        slopes: Slope of the logarithm of the mean over seeds against that of the width, by name.
        errors: Standard error of each slope, from the scatter of the seeds; NaN for one seed.
        notes: Sentences on what that means.
    """

    widths: tuple[int, ...]
    values: Mapping[str, Tensor]
    slopes: Mapping[str, float]
    errors: Mapping[str, float]
    notes: tuple[str, ...]

    heading = "Against width"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        out = []
        for name, value in self.values.items():
            each = ", ".join(f"{w}: {float(v):.3g}" for w, v in zip(self.widths, value.mean(1), strict=True))
            error = "" if math.isnan(self.errors[name]) else f" ± {self.errors[name]:.2g}"
            out.append((name, f"slope {self.slopes[name]:.3f}{error} ({each})"))
        return out

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw the values on logarithmic axes; see :func:`vifamily.plots.power_laws`."""
        return power_laws(self.widths, {n: v.numpy() for n, v in self.values.items()}, self.slopes, title=title)


def width_sweep(
    measure: Callable[[int, int], Mapping[str, float]], widths: Sequence[int], seeds: Sequence[int]
) -> WidthSweep:
    """Measure networks of several widths over several seeds, and fit a power law to each figure.

    Costs one call for every pair of width and seed, in order; nothing of one call is kept for the next but its figures.

    Args:
        measure: From width and seed to positive figures by name, such as the drift of the kernel after training.
        widths: Two widths or more, ascending.
        seeds: One seed or more.

    Raises:
        ConfigError: If there are too few widths or seeds, or widths do not ascend.
        DataError: If a figure is not positive and finite, or names differ between calls.

    Source: Jacot, Gabriel and Hongler (2018); Lee et al. (2019): the drift falls as one over the width.

    Example:
        >>> width_sweep(lambda width, seed: {"drift": 3.0 / width}, [64, 256, 1024], [0]).slopes["drift"]
        -1.0
    """
    widths, seeds = tuple(widths), tuple(seeds)
    if len(widths) < 2 or not seeds or widths[0] < 1 or any(b <= a for a, b in zip(widths, widths[1:], strict=False)):
        raise ConfigError(f"give two ascending widths or more, and a seed, got widths {widths} and seeds {seeds}.")
    found = [[dict(measure(width, seed)) for seed in seeds] for width in widths]
    names = tuple(found[0][0])
    for width, row in zip(widths, found, strict=True):
        for one in row:
            if tuple(one) != names:
                raise DataError(f"every call must give the figures {names}, got {tuple(one)} at width {width}.")
            bad = [name for name, value in one.items() if not (value > 0 and math.isfinite(value))]
            if bad:
                raise DataError(f"{bad[0]} is {one[bad[0]]!r} at width {width}: a power law needs positive figures.")
    values = {n: torch.tensor([[one[n] for one in row] for row in found], dtype=torch.float64) for n in names}
    laws = {name: _law(widths, value.numpy()) for name, value in values.items()}
    slopes = {name: round(law[0], 12) for name, law in laws.items()}
    notes = tuple(f"{name} {_words(slope)}" for name, slope in slopes.items())
    return WidthSweep(widths, values, slopes, {name: law[1] for name, law in laws.items()}, notes)


def _words(slope: float) -> str:
    if slope < -0.7:
        return "falls about as one over the width, as drift does where training nears that of the linearised network."
    if slope < -0.3:
        return "falls about as one over the root of the width, as the distance of a kernel at the start from its limit."
    return "hardly falls with width: at these widths, what is known of wide networks does not describe it."


def _law(widths: Sequence[int], values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[float, float]:
    """Slope of the log mean over the log width, and its error from the scatter over seeds by the delta method."""
    at = np.log(np.asarray(widths, dtype=np.float64))
    weight = (at - at.mean()) / np.square(at - at.mean()).sum()
    mean = values.mean(1)
    slope = float(weight @ np.log(mean))
    if values.shape[1] < 2:
        return slope, math.nan
    error = values.std(1, ddof=1) / np.sqrt(values.shape[1]) / mean
    return slope, float(np.sqrt(np.square(weight * error).sum()))
