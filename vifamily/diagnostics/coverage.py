"""Joint coverage of amortised posteriors: do credible regions hold the truth as often as they say."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vifamily import rng
from vifamily.diagnostics.summary import as_plain
from vifamily.errors import DataError, ShapeError
from vifamily.numerics.uniformity import ecdf_test
from vifamily.plots.calibration import ecdf_difference

__all__ = ["Coverage", "expected_coverage", "tarp"]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of each posterior lies in the smallest region of a kind that reaches the simulated truth.

    Attributes:
        kind: ``"highest density"`` or ``"random reference"``.
        ranks: Draws inside that region, from 0 to ``num_draws``, ``(simulation,)``; uniform where posteriors are right.
        num_draws: Draws of each posterior.
        p_value: Of uniformity, by the ECDF in its simultaneous band.
        seed: Root seed of the band and of ties.
    """

    kind: str
    ranks: Tensor
    num_draws: int
    p_value: float
    seed: int = 0

    def coverage(self, level: float | Tensor) -> Tensor:
        """Return how often regions of a credibility level held the truth.

        Args:
            level: Credibility in (0, 1), a number or ``(level,)``.

        Returns:
            Shares, of the shape of ``level``; equal to it where posteriors are right.
        """
        at = torch.as_tensor(level, dtype=torch.float64)
        inside = (self.ranks.double() + 0.5) / (self.num_draws + 1)
        return (inside <= at[..., None]).double().mean(-1)

    def calibrated(self, level: float = 0.05) -> bool:
        """Whether the ranks do not speak against right posteriors."""
        return self.p_value >= level

    @property
    def reading(self) -> str:
        """What the ranks look like: too narrow, too wide, or no such pattern."""
        u = (self.ranks.double() + 0.5) / (self.num_draws + 1)
        size = len(u)
        if self.kind == "highest density":
            off = float(u.mean() - 0.5) * (12 * size) ** 0.5
            return "too narrow" if off > 3 else "too wide" if off < -3 else "no such pattern"
        # the variance of (u - 1/2)^2 under uniformity is 1/180
        spread = float(((u - 0.5) ** 2).mean() - 1 / 12) * (180 * size) ** 0.5
        return "too narrow" if spread > 3 else "too wide" if spread < -3 else "no such pattern"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that JSON takes."""
        plain: dict[str, Any] = as_plain({
            "kind": self.kind, "ranks": self.ranks.tolist(), "num_draws": self.num_draws, "p_value": self.p_value,
            "reading": self.reading,
        })  # fmt: skip
        return plain

    def plot(self, *, path: str | os.PathLike[str] | None = None, title: str | None = None) -> Figure:
        """Draw coverage less credibility against credibility, in the band of right posteriors.

        Args:
            path: Save the figure there too; the ending gives the format.
            title: Written over the figure.
        """
        figure = ecdf_difference(
            self.ranks.numpy()[:, None], self.num_draws, (f"{self.kind} regions",), seed=self.seed, title=title
        )
        if path is not None:
            figure.savefig(path)
        return figure

    def __str__(self) -> str:
        """Return coverage at three levels, the p-value and what it looks like."""
        held = ", ".join(f"{float(self.coverage(level)):.0%} of {level:.0%}" for level in (0.5, 0.8, 0.95))
        return (
            f"Coverage of {self.kind} regions in {len(self.ranks)} simulations: {held}; p-value {self.p_value:.2g}, "
            f"posteriors: {self.reading}."
        )

    __repr__ = __str__


def expected_coverage(truth_log_prob: Any, draw_log_prob: Any, *, seed: int = 0) -> Coverage:
    r"""Coverage of highest-density regions, from log densities of q (Hermans et al. 2022).

    For :math:`(\theta^*, x)` of simulation and draws :math:`\theta_m \sim q(\cdot \mid x)`, the smallest region of
    highest density with the truth in it has credibility :math:`\Pr(q(\theta \mid x) > q(\theta^* \mid x))`, estimated
    by the share of draws. Right posteriors make it uniform; narrow ones push it up, wide ones down. A necessary
    condition only: a q that returns the prior whatever x is passes.

    Args:
        truth_log_prob: :math:`\log q(\theta^* \mid x)`, ``(simulation,)``.
        draw_log_prob: The same at draws of q, ``(simulation, draw)``.
        seed: Root seed of ties and of the band.

    Returns:
        Ranks, coverage at any level and p-value; ``plot()`` draws them.

    Raises:
        ShapeError: If the shapes disagree or there are fewer than 20 simulations or 9 draws.
        DataError: If a value is NaN.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> truth, draws = torch.randn(200, generator=g), torch.randn(200, 99, generator=g)
        >>> expected_coverage(-truth**2, -draws**2).calibrated()
        True
        >>> expected_coverage(-truth**2, -((0.5 * draws) ** 2)).reading
        'too narrow'
    """
    truth, draws = (torch.as_tensor(v).detach().to("cpu", torch.float64) for v in (truth_log_prob, draw_log_prob))
    if truth.dim() != 1 or draws.dim() != 2:
        raise ShapeError(
            "coverage needs log densities of the truths (simulation,) and of draws (simulation, draw), got "
            f"{tuple(truth.shape)} and {tuple(draws.shape)}."
        )
    return _ranked("highest density", -truth, -draws, seed)


def tarp(truth: Any, draws: Any, *, generator: torch.Generator, references: Any | None = None) -> Coverage:
    r"""Tests of accuracy with random points (TARP, Lemos et al. 2023): coverage of balls about a random reference.

    About a reference r each posterior has a smallest ball that reaches the truth; its share of the draws,
    :math:`\#\{m : \|\theta_m - r\| < \|\theta^* - r\|\}`, is uniform for right posteriors. It needs draws only, no
    density. References that are told nothing of x leave a blind spot, a q that returns the prior; give references that
    depend on x to close it.

    Quantities are scaled by the range of the truths first. Without ``references`` they are uniform in the box of the
    truths.

    Args:
        truth: Parameters of the simulations, ``(simulation, quantity)``.
        draws: Draws of q for each, ``(simulation, draw, quantity)``.
        generator: Randomness of the references and of ties.
        references: Points of your own, ``(simulation, quantity)``; they may depend on x, not on the truth.

    Returns:
        Ranks, coverage at any level and p-value; ``plot()`` draws them.

    Raises:
        ShapeError: If the shapes disagree or there are fewer than 20 simulations or 9 draws.
        DataError: If a value is not finite.

    Source: Lemos et al. (2023), algorithm 2.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> tarp(torch.randn(200, 2, generator=g), torch.randn(200, 99, 2, generator=g), generator=g).calibrated()
        True
    """
    at, sample = (torch.as_tensor(v).detach().to("cpu", torch.float64) for v in (truth, draws))
    if at.dim() != 2 or sample.dim() != 3 or sample.shape[::2] != at.shape:
        raise ShapeError(
            "TARP needs truths (simulation, quantity) and draws (simulation, draw, quantity), got "
            f"{tuple(at.shape)} and {tuple(sample.shape)}."
        )
    if not bool(at.isfinite().all() and sample.isfinite().all()):
        raise DataError("truths or draws hold NaN or infinite values; leave those simulations out, or see why.")
    low, high = at.amin(0), at.amax(0)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    if references is None:
        unit = torch.rand(at.shape, generator=generator, dtype=torch.float64)
    else:
        unit = (torch.as_tensor(references).detach().to("cpu", torch.float64) - low) / width
        if unit.shape != at.shape:
            raise ShapeError(f"references must be of the truths' shape, {tuple(at.shape)}, got {tuple(unit.shape)}.")
    at, sample = (at - low) / width, (sample - low) / width
    seed = int(torch.randint(2**62, (), generator=generator))
    return _ranked("random reference", (at - unit).norm(dim=-1), (sample - unit[:, None]).norm(dim=-1), seed)


def _ranked(kind: str, truth: Tensor, draws: Tensor, seed: int) -> Coverage:
    """Ranks of the truth's value among those of the draws, ties broken at random."""
    if len(truth) != len(draws) or len(truth) < 20 or draws.shape[1] < 9:
        raise ShapeError(
            "coverage needs 20 simulations or more with 9 draws or more each, and a truth for each, got "
            f"{len(truth)} truths and draws {tuple(draws.shape[:2])}."
        )
    if bool(truth.isnan().any() or draws.isnan().any()):
        raise DataError("a log density is NaN; leave those simulations out, or see why they are there.")
    below, equal = (draws < truth[:, None]).sum(1), (draws == truth[:, None]).sum(1)
    unit = torch.rand(equal.shape, generator=rng.generator(seed, "coverage ties"), dtype=torch.float64)
    ranks = below + (unit * (equal + 1)).floor().long()
    return Coverage(kind, ranks, draws.shape[1], ecdf_test(ranks.numpy(), draws.shape[1], seed=seed), seed)
