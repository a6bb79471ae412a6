"""What calibration found: ranks or probabilities, p-values, tables and pictures."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from vifamily.diagnostics._tables import render, rich_table
from vifamily.diagnostics.summary import as_plain
from vifamily.numerics.uniformity import bin_test, ecdf_test, symmetry_test
from vifamily.plots.calibration import ecdf_difference, probability_histograms

__all__ = ["Calibration", "Simulations", "SymmetryCheck"]


@dataclasses.dataclass(frozen=True)
class Simulations:
    """Fits of simulated data.

    Attributes:
        names: Names of the quantities.
        ranks: Rank of the truth among the draws, ``(simulation, quantity)``, ties broken at random.
        probability: Share of the draws below the truth, ties counted half, ``(simulation, quantity)``.
        num_draws: Draws of each posterior.
        asked: Simulations asked for.
        failures: Why fits failed, one line each; these are left out.
        unconverged: Fits that ended before their stopping rule was met; these are kept.
        interrupted: Whether it was ended early.
        seed: Root seed.
        with_joint: Whether the last quantity is the log joint.
    """

    names: tuple[str, ...]
    ranks: Tensor
    probability: Tensor
    num_draws: int
    asked: int
    failures: tuple[str, ...]
    unconverged: int
    interrupted: bool
    seed: int
    with_joint: bool

    def remarks(self) -> list[str]:
        """Return what should be known of the fits, in sentences."""
        out = []
        if self.interrupted:
            out.append(f"Interrupted after {len(self.ranks)} of {self.asked} fits.")
        if self.failures:
            out.append(
                f"{len(self.failures)} fits failed and are left out, which biases what is said (the first: "
                f"{self.failures[0]})."
            )
        if self.unconverged:
            out.append(f"{self.unconverged} fits ended before their stopping rule was met.")
        return out


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Ranks of simulated truths among posterior draws, and whether they are uniform; prints as a table.

    Attributes:
        simulations: The fits, with ranks.
        ecdf: p-value of uniformity by the ECDF, for each quantity.
        chi_square: p-value by bins.
        reading: What the ranks look like, for each quantity.
    """

    simulations: Simulations
    ecdf: tuple[float, ...]
    chi_square: tuple[float, ...]
    reading: tuple[str, ...]

    @classmethod
    def of(cls, found: Simulations) -> Calibration:
        """Judge ranks."""
        columns = [column.numpy() for column in found.ranks.T]
        ecdf = tuple(ecdf_test(ranks, found.num_draws, seed=found.seed) for ranks in columns)
        bins = tuple(bin_test(ranks, found.num_draws) for ranks in columns)
        return cls(found, ecdf, bins, tuple(_reading(ranks, found.num_draws) for ranks in found.ranks.T))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantities."""
        return self.simulations.names

    @property
    def ranks(self) -> Tensor:
        """Ranks from 0 to the number of draws, ``(simulation, quantity)``."""
        return self.simulations.ranks

    def calibrated(self, level: float = 0.05) -> bool:
        """Whether no quantity's ranks speak against uniformity, at a level for all of them together (Bonferroni)."""
        return min(self.ecdf) * len(self.ecdf) >= level

    def symmetry(self) -> SymmetryCheck:
        """Return the check of the centre alone, from the same fits (see :func:`vsbc`)."""
        return SymmetryCheck.of(self.simulations)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as text."""
        mean = (self.ranks.double().mean(0) / self.simulations.num_draws).tolist()
        return [
            (name, f"{m:.3f}", f"{e:.3g}", f"{c:.3g}", said)
            for name, m, e, c, said in zip(self.names, mean, self.ecdf, self.chi_square, self.reading, strict=True)
        ]

    def note(self) -> str:
        """Return the verdict and remarks in a few sentences."""
        worst = min(range(len(self.ecdf)), key=self.ecdf.__getitem__)
        share = min(1.0, self.ecdf[worst] * len(self.ecdf))
        verdict = (
            f"Nothing here speaks against calibration (smallest p-value, for all quantities together: {share:.2g})."
            if self.calibrated()
            else f"Not calibrated: {self.names[worst]} ({self.reading[worst]}; p-value for all together {share:.2g})."
        )
        return " ".join([verdict, *self.simulations.remarks()])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that JSON takes."""
        plain: dict[str, Any] = as_plain({
            "names": list(self.names), "ranks": self.ranks.tolist(), "num_draws": self.simulations.num_draws,
            "ecdf": list(self.ecdf), "chi_square": list(self.chi_square), "reading": list(self.reading),
            "calibrated": self.calibrated(), "remarks": self.simulations.remarks(),
        })  # fmt: skip
        return plain

    def plot(self, *, path: str | os.PathLike[str] | None = None, title: str | None = None) -> Figure:
        """Draw the ECDF of each quantity's ranks, less that of uniform ones, in its simultaneous band.

        Args:
            path: Save the figure there too; the ending gives the format.
            title: Written over the figure.
        """
        figure = ecdf_difference(
            self.ranks.numpy(), self.simulations.num_draws, self.names, seed=self.simulations.seed, title=title
        )
        if path is not None:
            figure.savefig(path)
        return figure

    def _header(self) -> tuple[str, tuple[str, ...]]:
        size = len(self.ranks)
        title = f"Simulation-based calibration, {size} fits, ranks among {self.simulations.num_draws} draws"
        return title, ("quantity", "mean rank", "p (ECDF)", "p (bins)", "the posteriors")

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        return rich_table(*self._header(), self.rows(), self.note())

    def __str__(self) -> str:
        """Return the table as plain text."""
        return render(*self._header(), self.rows(), self.note())

    def __repr__(self) -> str:
        """Return the table, which is what an interactive session should show."""
        return str(self)


@dataclasses.dataclass(frozen=True)
class SymmetryCheck:
    """Probabilities of being below simulated truths, and whether they are symmetric; prints as a table.

    Attributes:
        simulations: The fits.
        names: Names of the quantities.
        probability: ``Pr_q(theta < truth)``, ``(simulation, quantity)``.
        statistic: Kolmogorov-Smirnov distance between ``p`` and ``1 - p``, for each quantity.
        p_values: Its p-value, not corrected for their number.
    """

    simulations: Simulations
    names: tuple[str, ...]
    probability: Tensor
    statistic: tuple[float, ...]
    p_values: tuple[float, ...]

    @classmethod
    def of(cls, found: Simulations) -> SymmetryCheck:
        """Judge probabilities."""
        size = len(found.names) - int(found.with_joint)
        tests = [symmetry_test(p.numpy(), seed=found.seed) for p in found.probability.T[:size]]
        return cls(
            found, found.names[:size], found.probability[:, :size], tuple(t.statistic for t in tests),
            tuple(t.p_value for t in tests),
        )  # fmt: skip

    def unbiased(self, level: float = 0.05) -> bool:
        """Whether no quantity speaks against a symmetric law, at a level for all of them together (Bonferroni)."""
        return min(self.p_values, default=1.0) * len(self.p_values) >= level

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as text."""
        return [
            (name, f"{mean:.3f}", f"{statistic:.3f}", f"{p:.3g}", _direction(mean, p))
            for name, mean, statistic, p in zip(
                self.names, self.probability.mean(0).tolist(), self.statistic, self.p_values, strict=True
            )
        ]

    def note(self) -> str:
        """Return the verdict and remarks in a few sentences."""
        verdict = "Nothing here speaks against unbiased centres" if self.unbiased() else "Centres are biased"
        remarks = self.simulations.remarks()
        return " ".join([f"{verdict}; whether posteriors are too narrow or too wide is not seen here.", *remarks])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that JSON takes."""
        plain: dict[str, Any] = as_plain({
            "names": list(self.names), "probability": self.probability.tolist(), "statistic": list(self.statistic),
            "p_values": list(self.p_values), "unbiased": self.unbiased(), "remarks": self.simulations.remarks(),
        })  # fmt: skip
        return plain

    def plot(self, *, path: str | os.PathLike[str] | None = None, title: str | None = None) -> Figure:
        """Draw a histogram of each quantity's probabilities.

        Args:
            path: Save the figure there too; the ending gives the format.
            title: Written over the figure.
        """
        figure = probability_histograms(self.probability.numpy(), self.names, title=title)
        if path is not None:
            figure.savefig(path)
        return figure

    def _header(self) -> tuple[str, tuple[str, ...]]:
        title = f"Calibration of centres, {len(self.probability)} fits"
        return title, ("quantity", "mean p", "distance", "p-value", "the posteriors")

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        return rich_table(*self._header(), self.rows(), self.note())

    def __str__(self) -> str:
        """Return the table as plain text."""
        return render(*self._header(), self.rows(), self.note())

    def __repr__(self) -> str:
        """Return the table, which is what an interactive session should show."""
        return str(self)


def _reading(ranks: Tensor, num_draws: int) -> str:
    """What ranks look like: off to one side, narrow or wide, where that is three standard errors or more."""
    u = (ranks.double() + 0.5) / (num_draws + 1)
    size = len(u)
    # by their own spread, which need not be that of uniform ones
    off = float((u.mean() - 0.5) / (u.std() / size**0.5).clamp_min(1e-12))
    # the variance of (u - 1/2)^2 under uniformity is 1/180
    spread = float((((u - 0.5) ** 2).mean() - 1 / 12) / (1 / (180 * size)) ** 0.5)
    if abs(off) > 3:  # a spread about one half says nothing where the ranks lie to one side of it
        return "too low" if off > 0 else "too high"
    return "too narrow" if spread > 3 else "too wide" if spread < -3 else "no such pattern"


def _direction(mean: float, p_value: float) -> str:
    if p_value >= 0.05:
        return "no such pattern"
    return "too low" if mean > 0.5 else "too high"
