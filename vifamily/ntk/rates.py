"""How fast training gets where: rates of each direction near the best outputs, and a bound that needs no rates."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vifamily.errors import ConfigError, IncompatibleError, ShapeError
from vifamily.ntk._loss import OutputLoss, curvature_of
from vifamily.ntk._tables import Printed, checked_gram, eigensystem

__all__ = ["Certificate", "FlowRates", "certificate", "flow_rates"]

_OUTSIDE = 1e-8


@dataclasses.dataclass(frozen=True, repr=False)
class FlowRates(Printed):
    r"""Rates at which the flow of a kernel reaches the best outputs, by direction.

    Attributes:
        rates: Eigenvalues of ``F^{1/2} K F^{1/2} / N``, from the largest, ``(N q,)``.
        amounts: Components of the whitened gap ``F^{1/2} (f_0 - f*) / N^{1/2}``, ``(N q,)``; to second order the excess
            of the mean loss is half the sum of their squares.
        largest_step: The step size up to which gradient descent is stable near the best outputs, two over the largest
            rate.
        stuck: Share of the excess in directions whose rate is zero to rounding.
        flat: Directions of single outputs in which the loss has no curvature, to rounding.
        notes: Sentences on what that means.
    """

    rates: Tensor
    amounts: Tensor
    largest_step: float
    stuck: float
    flat: int
    notes: tuple[str, ...]

    heading = "Predicted rates"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        moving = self.rates[self.rates > 0]
        return [
            ("largest rate", f"{float(self.rates[0]):.4g}"),
            ("smallest rate that is not zero", f"{float(moving[-1]) if len(moving) else 0.0:.4g}"),
            ("largest stable step", f"{self.largest_step:.4g}"),
            ("time to 1 % of the excess", f"{self.time_to(0.01):.4g}"),
            ("share of the excess that stays", f"{self.stuck:.3g}"),
        ]

    def times(self, size: float) -> Tensor:
        r"""Time until each component is no larger than `size`, ``ln(c / size) / r``, ``(N q,)``; may be infinite."""
        wanted = (self.amounts.abs() / size).log().clamp_min(0.0)
        return torch.where(wanted > 0, wanted / self.rates, wanted)

    def excess(self, time: float) -> float:
        """Predicted excess of the mean loss at a time, to second order."""
        return 0.5 * float((self.amounts.square() * (-2 * self.rates * time).exp()).sum())

    def time_to(self, share: float) -> float:
        """Time at which the predicted excess has fallen to a share of that at the start; may be infinite.

        Raises:
            ConfigError: If `share` is not in ``(0, 1)``.
        """
        if not 0 < share < 1:
            raise ConfigError(f"share must lie in (0, 1), got {share!r}.")
        if self.stuck >= share:
            return math.inf
        goal, low, high = share * self.excess(0.0), 0.0, 1.0
        if goal == 0:
            return 0.0
        while self.excess(high) > goal:
            high *= 2
        while high - low > 1e-10 * high:
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.excess(middle) > goal else (low, middle)
        return high


def flow_rates(
    gram: Tensor, loss: OutputLoss, best: Tensor, start: Tensor, *, tolerance: float | None = None
) -> FlowRates:
    r"""Rates of the flow near the best outputs, from kernel and curvature.

    .. math:: \delta \dot f = -\tfrac1N K F \delta f, \qquad F = \nabla^2 \ell(f^*)

    Its rates are the eigenvalues of ``F^{1/2} K F^{1/2} / N``. They hold near `best`; further off, curvature is
    another. Time is of order ``(N q)^3``.

    Args:
        gram: Gram matrix ``(N q, N q)``.
        loss: From outputs ``(N, q)`` to the loss of each input ``(N,)``, by rows; differentiable twice.
        best: Best outputs ``(N, q)``.
        start: Outputs at the start ``(N, q)``.
        tolerance: Eigenvalues of the kernel, and rates, up to this share of the largest count as zero; by default
            ``8 N q`` times the unit roundoff.

    Raises:
        IncompatibleError: If the loss is not convex at `best`.
        ShapeError: If sizes do not fit.
        DataError: If the matrix is no Gram matrix, or the loss not finite.

    Source: linearisation of the kernel flow; Jacot, Gabriel and Hongler (2018) for squares, where F is the identity.

    Example:
        >>> y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> gram = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        >>> flow_rates(gram, lambda f: 0.5 * (f - y).square().sum(1), y, 0 * y).rates
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    if best.ndim != 2 or start.shape != best.shape:
        raise ShapeError(
            f"best and start must both have shape (inputs, outputs), got {tuple(best.shape)} and {tuple(start.shape)}."
        )
    gram, size = checked_gram(gram, len(best)), len(best)
    if len(gram) != best.numel():
        raise ShapeError(f"the kernel has {len(gram)} rows and the outputs {best.numel()} entries.")
    values, vectors = torch.linalg.eigh(curvature_of(loss, best))
    top = float(values.abs().max())
    near = 64 * torch.finfo(best.dtype).eps * top
    if float(values.min()) < -(torch.finfo(best.dtype).eps ** 0.5) * top:
        raise IncompatibleError(
            f"the loss is not convex at these outputs: the smallest eigenvalue of its Hessian is "
            f"{float(values.min()):.3g} beside a largest of {float(values.max()):.3g}. Rates are those of a convex "
            "loss near its minimum."
        )
    root = vectors @ torch.diag_embed(values.clamp_min(0.0).sqrt()) @ vectors.transpose(1, 2)
    whole = torch.block_diag(*root)
    rates, directions, floor = eigensystem(whole @ gram @ whole / size, tolerance)
    rates = rates.where(rates > floor, rates.new_zeros(()))
    gap = torch.einsum("iab,ib->ia", root, start - best).reshape(-1)
    amounts = directions.T @ gap / math.sqrt(size)
    total = float(amounts.square().sum())
    stuck = float(amounts[rates == 0].square().sum()) / total if total > 0 else 0.0
    flat = int((values <= near).sum())
    return FlowRates(
        rates, amounts, 2 / float(rates[0]) if float(rates[0]) > 0 else math.inf, stuck, flat, _rate_notes(stuck, flat)
    )


def _rate_notes(stuck: float, flat: int) -> tuple[str, ...]:
    notes = [
        "Every part of the gap has a rate: the best outputs are reached."
        if stuck < _OUTSIDE
        else f"A share of {stuck:.2g} of the excess has rate zero and stays: it is outside of the range of the kernel."
    ]
    if flat:
        notes.append(
            f"In {flat} directions of single outputs the loss is flat at the best outputs, as behind a clamp: nothing "
            "pulls there."
        )
    return tuple(notes)


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate(Printed):
    r"""A bound on the excess of the mean loss under a kernel that stays, for a loss convex in the outputs.

    Attributes:
        norm: ``||f_0 - f*||_H^2`` of the part of the gap in the range of the kernel: its least norm on these inputs.
        outside: Share of the squared gap outside of the range.
        time: Time of training.
        bound: ``norm / (2 time)``; infinite where a part lies outside.
        notes: Sentences on what that means.
    """

    norm: float
    outside: float
    time: float
    bound: float
    notes: tuple[str, ...]

    heading = "Certificate"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        return [
            ("squared norm of the gap", f"{self.norm:.4g}"),
            ("share outside of the range", f"{self.outside:.3g}"),
            (f"bound on the excess at time {self.time:g}", f"{self.bound:.4g}"),
        ]

    def time_for(self, excess: float) -> float:
        """Time by which the excess is certainly no larger; infinite where a part of the gap lies outside.

        Raises:
            ConfigError: If `excess` is not positive.
        """
        if not excess > 0:
            raise ConfigError(f"excess must be positive, got {excess!r}.")
        return self.norm / (2 * excess) if math.isfinite(self.bound) else math.inf


def certificate(gram: Tensor, gap: Tensor, *, time: float, tolerance: float | None = None) -> Certificate:
    r"""Bound the excess of the mean loss after a time of gradient flow with this kernel.

    .. math:: L(f_T) - L(f^*) \le \frac{\|f_0 - f^*\|_H^2}{2T}

    It needs the loss convex in the outputs and the gap in the range of the kernel; not that the kernel is strictly
    positive definite, nor a rate. It is loose late, where convergence is exponential. Time is of order ``(N q)^3``.

    Args:
        gram: Gram matrix ``(N q, N q)``.
        gap: Start minus best outputs, ``(N, q)``.
        time: Time of training ``T``, in steps times their size, on the **mean** loss.
        tolerance: Eigenvalues up to this share of the largest count as zero; by default ``8 N q`` times the unit
            roundoff.

    Raises:
        ConfigError: If `time` is not positive.
        ShapeError: If the gap has another number of entries than the matrix rows.
        DataError: If the matrix is no Gram matrix.

    Source: half the squared distance in the norm of the kernel falls at least at the rate of the excess, and the excess
    never rises; integrate over time.

    Example:
        >>> gram = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        >>> certificate(gram, torch.tensor([[2.0], [1.0]], dtype=torch.float64), time=10.0).bound
        0.1
    """
    if not time > 0 or not math.isfinite(time):
        raise ConfigError(f"time must be positive and finite, got {time!r}.")
    gram = checked_gram(gram)
    y = gap.reshape(-1)
    if len(y) != len(gram):
        raise ShapeError(f"the gap must have {len(gram)} entries, got {tuple(gap.shape)}.")
    values, vectors, floor = eigensystem(gram, tolerance)
    parts = (vectors.T @ y).square()
    inside = values > floor
    norm = float((parts[inside] / values[inside]).sum())
    total = float(parts.sum())
    outside = float(parts[~inside].sum()) / total if total > 0 else 0.0
    holds = outside <= _OUTSIDE
    note = (
        f"Gradient flow with this kernel on a loss convex in the outputs is within {norm / (2 * time):.3g} of the "
        f"least mean loss at time {time:g}."
        if holds
        else f"No bound: a share of {outside:.2g} of the squared gap lies outside of the range of the kernel, where "
        "gradient flow never moves."
    )
    return Certificate(norm, outside, float(time), norm / (2 * time) if holds else math.inf, (note,))
