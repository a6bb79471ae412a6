"""The spectrum of a tangent kernel, in figures and in words, and how a target lies in it."""

from __future__ import annotations

import dataclasses
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vifamily.errors import ConfigError, ShapeError
from vifamily.ntk._tables import Printed, checked_gram, eigensystem
from vifamily.plots.tangent import kernel_spectrum

__all__ = ["Alignment", "KernelReport", "alignment", "kernel_report"]

_SHOWN = 3
_ILL = 1e6
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, repr=False)
class KernelReport(Printed):
    r"""What the Gram matrix of a tangent kernel says of training.

    Attributes:
        inputs: Inputs ``N``.
        outputs: Outputs ``q``.
        eigenvalues: Of the Gram matrix over ``N``, from the largest, ``(N q,)``: rates of gradient flow on half the
            mean squared error.
        zeros: Eigenvalues that are zero to rounding.
        smallest: The smallest of those that are not, over ``N``.
        condition: Largest eigenvalue over the smallest; infinite where one is zero.
        effective_rank: ``(tr K)^2 / tr K^2``, how many directions share the trace.
        block: How far the kernel is from a scalar one times the identity over outputs,
            ``||K - k I_q|| / ||K||`` with ``k`` the mean of the diagonals of the blocks. Zero for one output.
        repeated: Pairs of equal inputs.
        collinear: Pairs of inputs in one direction from the origin, of different lengths.
        opposite: Pairs in opposite directions.
        proportional: How many of the collinear pairs have proportional rows in the kernel, as networks without
            biases give them.
        odd_rank: Rank of the kernel on differences of opposite inputs, over outputs: the odd parts that can be learned.
        notes: Sentences on what holds and what fails.
    """

    inputs: int
    outputs: int
    eigenvalues: Tensor
    zeros: int
    smallest: float
    condition: float
    effective_rank: float
    block: float
    repeated: tuple[Pair, ...]
    collinear: tuple[Pair, ...]
    opposite: tuple[Pair, ...]
    proportional: int
    odd_rank: float
    notes: tuple[str, ...]

    heading = "Tangent kernel"

    @property
    def positive_definite(self) -> bool:
        """Whether no eigenvalue is zero to rounding."""
        return self.zeros == 0

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        return [
            ("inputs, outputs", f"{self.inputs}, {self.outputs}"),
            ("largest eigenvalue / N", f"{float(self.eigenvalues[0]):.4g}"),
            ("smallest that is not zero / N", f"{self.smallest:.4g}"),
            ("zero to rounding", f"{self.zeros} of {len(self.eigenvalues)}"),
            ("condition number", f"{self.condition:.4g}"),
            ("effective rank", f"{self.effective_rank:.4g}"),
            ("distance from k times identity", f"{self.block:.4g}"),
        ]

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw the eigenvalues; see :func:`vifamily.plots.kernel_spectrum`."""
        return kernel_spectrum(self.eigenvalues.cpu().numpy(), zeros=self.zeros, title=title)


def kernel_report(gram: Tensor, x: Tensor, *, tolerance: float | None = None) -> KernelReport:
    r"""Report on the spectrum, conditioning and block form of a kernel, and on inputs that make it singular.

    Time is of order ``(N q)^3`` for the eigenvalues. Pairs of inputs cost ``N^2`` products.

    Args:
        gram: Gram matrix ``(N q, N q)``, of any route or a limit; best in float64.
        x: Its inputs ``(N, ...)``; a multiple of them is what the rows are counted by.
        tolerance: Eigenvalues up to this share of the largest count as zero; by default ``8 N q`` times the unit
            roundoff.

    Returns:
        A report that prints.

    Raises:
        ConfigError: If `tolerance` is not in ``[0, 1)``.
        ShapeError: If the matrix is not square, or its rows are no multiple of the inputs.
        DataError: If it is not finite, not symmetric or has an eigenvalue clearly below zero.

    Source: Jacot, Gabriel and Hongler (2018); for the zeros on opposite inputs, the arc-cosine kernels of Cho and
    Saul (2009), whose odd part over a line is linear.

    Example:
        >>> from vifamily.ntk import relu_kernel
        >>> angle = torch.arange(64, dtype=torch.float64) * (2 * torch.pi / 64)
        >>> x = torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> report = kernel_report(relu_kernel(x), x)
        >>> report.zeros, report.positive_definite, len(report.opposite)
        (30, False, 32)
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance must be a share of the largest eigenvalue, in [0, 1), got {tolerance!r}.")
    if x.ndim < 1 or not len(x):
        raise ShapeError(f"inputs need shape (inputs, ...) with at least one input, got {tuple(x.shape)}.")
    gram = checked_gram(gram, len(x))
    values, _, floor = eigensystem(gram, tolerance)
    size, outputs = len(x), len(gram) // len(x)
    above = values[values > floor] / size
    zeros = len(values) - len(above)
    smallest = float(above[-1]) if len(above) else 0.0
    repeated, collinear, opposite = _pairs(x)
    found = KernelReport(
        inputs=size,
        outputs=outputs,
        eigenvalues=values / size,
        zeros=zeros,
        smallest=smallest,
        condition=float(values[0]) / size / smallest if not zeros else math.inf,
        effective_rank=float(values.sum() ** 2 / values.square().sum()) if len(above) else 0.0,
        block=_distance_from_scalar(gram, size, outputs),
        repeated=repeated,
        collinear=collinear,
        opposite=opposite,
        proportional=sum(_proportional(gram, outputs, pair) for pair in collinear),
        odd_rank=_odd_rank(gram, outputs, opposite, floor),
        notes=(),
    )
    return dataclasses.replace(found, notes=_notes(found, gram.dtype))


def _notes(report: KernelReport, dtype: torch.dtype) -> tuple[str, ...]:
    notes = [_definiteness(report)]
    if report.zeros == 0 and report.condition > _ILL:
        notes.append(
            f"It is badly conditioned: the slowest direction takes {report.condition:.1e} times as long as the "
            "fastest, so that in practice it is not learned either."
        )
    if report.repeated:
        notes.append(f"Inputs occur twice ({_named(report.repeated)}): their outputs are one and the same.")
    if report.collinear:
        tied = f"{report.proportional} of {len(report.collinear)} such pairs have proportional rows"
        notes.append(
            f"Inputs are collinear ({_named(report.collinear)}), and {tied}: "
            + (
                "outputs there are tied, as in networks without biases. Add a bias or a constant coordinate."
                if report.proportional
                else "biases keep them apart."
            )
        )
    if report.opposite:
        pairs = len(report.opposite)
        notes.append(
            f"Over {pairs} pairs of opposite inputs ({_named(report.opposite)}) the odd part of an output has "
            f"{report.odd_rank:.4g} directions that can be learned"
            + (
                ": without biases, a two-layer ReLU network has only linear functions there."
                if report.odd_rank < pairs
                else ", one for each: opposite inputs do no harm."
            )
        )
    if report.outputs > 1:
        notes.append(
            "The kernel is a scalar one times the identity over outputs: outputs train apart."
            if report.block < 1e-6
            else f"The kernel is off a scalar one times the identity by {report.block:.2g} of its norm: a step for one "
            "output moves the others."
        )
    if dtype != torch.float64:
        notes.append(f"The matrix is {dtype}: small eigenvalues are rounding. Use float64 for spectra.")
    return tuple(notes)


def _definiteness(report: KernelReport) -> str:
    if report.positive_definite:
        return (
            "It is strictly positive definite on these inputs: gradient flow with this kernel reaches any outputs "
            "there. Other inputs may have none of it."
        )
    return (
        f"It is not strictly positive definite: along {report.zeros} of {len(report.eigenvalues)} directions gradient "
        "flow with this kernel never moves. A target converges where it has no part in them."
    )


def _named(pairs: tuple[Pair, ...]) -> str:
    shown = ", ".join(f"{i} and {j}" for i, j in pairs[:_SHOWN])
    return shown + (", ..." if len(pairs) > _SHOWN else "")


def _pairs(x: Tensor) -> tuple[tuple[Pair, ...], tuple[Pair, ...], tuple[Pair, ...]]:
    """Pairs of equal inputs, of others in one direction, and of those in opposite ones; the origin has no direction."""
    rows = x.reshape(len(x), -1).double()
    norms = rows.norm(dim=1)
    unit = rows / norms.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)
    near = 64 * torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps
    exact = "donot_use_mm_for_euclid_dist"
    same = (torch.cdist(unit, unit, compute_mode=exact) <= near).triu(1)
    opposite = (torch.cdist(unit, -unit, compute_mode=exact) <= near).triu(1)
    alike = (norms.unsqueeze(1) - norms).abs() <= near * torch.maximum(norms.unsqueeze(1), norms)
    some = (norms > 0).unsqueeze(1) & (norms > 0)
    return _as_pairs(same & alike), _as_pairs(same & ~alike & some), _as_pairs(opposite & some)


def _as_pairs(mask: Tensor) -> tuple[Pair, ...]:
    return tuple((int(i), int(j)) for i, j in mask.nonzero().tolist())


def _proportional(gram: Tensor, outputs: int, pair: Pair) -> bool:
    """Whether the rows of two inputs are multiples of each other: the Cauchy-Schwarz inequality is tight."""
    a, b = (gram.reshape(-1, outputs, len(gram))[i].flatten() for i in pair)
    product = float(a.norm() * b.norm())
    return product == 0 or float((a @ b).abs()) >= (1 - 64 * torch.finfo(gram.dtype).eps) * product


def _odd_rank(gram: Tensor, outputs: int, opposite: tuple[Pair, ...], floor: float) -> float:
    """Rank, over outputs, of the kernel on half the differences of opposite inputs."""
    if not opposite:
        return 0.0
    size = len(gram) // outputs
    pick = gram.new_zeros(len(opposite), size)
    for row, (i, j) in enumerate(opposite):
        pick[row, i], pick[row, j] = 0.5, -0.5
    odd = torch.einsum("ri,iajb,sj->rasb", pick, gram.reshape(size, outputs, size, outputs), pick)
    values = torch.linalg.eigvalsh(odd.reshape(len(pick) * outputs, -1))
    return int((values > floor).sum()) / outputs


def _distance_from_scalar(gram: Tensor, size: int, outputs: int) -> float:
    blocks = gram.reshape(size, outputs, size, outputs)
    scalar = blocks.diagonal(dim1=1, dim2=3).mean(-1)
    rest = blocks - scalar[:, None, :, None] * torch.eye(outputs, dtype=gram.dtype, device=gram.device)[:, None, :]
    norm = float(gram.norm())
    return float(rest.norm()) / norm if norm else 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Alignment(Printed):
    r"""How a target lies in the eigenvectors of a kernel.

    Attributes:
        cosine: ``<K, y y^T> / (||K|| ||y||^2)``, from 0 to 1: one where the kernel is the outer product of the target.
        power: Share of ``||y||^2`` in the first eigenvectors, by their number, ``(N q,)``.
        outside: Share of ``||y||^2`` in eigenvectors whose eigenvalue is zero to rounding: gradient flow never gets it.
        notes: Sentences on what that means.
    """

    cosine: float
    power: Tensor
    outside: float
    notes: tuple[str, ...]

    heading = "Alignment"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        half, most = (int((self.power < share).sum()) + 1 for share in (0.5, 0.99))
        return [
            ("cosine of kernel and target", f"{self.cosine:.4g}"),
            ("eigenvectors for half of the target", f"{min(half, len(self.power))} of {len(self.power)}"),
            ("for 99 % of it", f"{most}" if float(self.power[-1]) >= 0.99 else "never"),
            ("outside of the range", f"{self.outside:.3g}"),
        ]


def alignment(gram: Tensor, target: Tensor, *, tolerance: float | None = None) -> Alignment:
    r"""Alignment of a kernel with a target, and the share of the target in its leading eigenvectors.

    .. math:: A = \frac{\langle K, y y^\top\rangle_F}{\|K\|_F \|y\|^2}, \qquad
              P_r = \sum_{i \le r} \frac{(u_i^\top y)^2}{\|y\|^2}

    Time is of order ``(N q)^3``.

    Args:
        gram: Gram matrix ``(N q, N q)``.
        target: Target, or what is left to learn, ``(N, q)``.
        tolerance: As :func:`kernel_report`.

    Raises:
        ShapeError: If the target has another number of entries than the matrix rows, or is zero.
        DataError: As :func:`kernel_report`.

    Source: Cristianini, Shawe-Taylor, Elisseeff and Kandola (2001), "On kernel-target alignment".

    Example:
        >>> y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> alignment(y @ y.T, y).cosine
        1.0
    """
    gram = checked_gram(gram)
    y = target.reshape(-1)
    length = y.square().sum()
    if len(y) != len(gram) or not float(length) > 0:
        raise ShapeError(f"the target must have {len(gram)} entries that are not all zero, got {tuple(target.shape)}.")
    values, vectors, floor = eigensystem(gram, tolerance)
    share = (vectors.T @ y).square() / length
    outside = float(share[values <= floor].sum())
    power = share.where(values > floor, share.new_zeros(())).cumsum(0)
    note = (
        "The target lies in the range of the kernel."
        if outside < 1e-8
        else f"A share of {outside:.2g} of the squared target is out of reach of gradient flow with this kernel."
    )
    return Alignment(float((y @ gram @ y) / (gram.norm() * length)), power, outside, (note,))
