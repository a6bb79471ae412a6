"""What a stability analysis says: figures, a table, a picture."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from vifamily.diagnostics._tables import render, rich_table
from vifamily.plots.stability import stability as draw_stability

__all__ = ["Spread", "Stability"]

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Spread:
    r"""What misspecification is predicted to look like as spread of the answer, at one alpha.

    Attributes:
        alpha: The alpha.
        sd: Below alpha*: standard deviation, along the direction, of the Gaussian that minimises the loss with its full
            divergence to the prior at weight ``1 / num_units``,
            :math:`(n\, d^\top V d\, (1 - \alpha/\alpha^*))^{-1/2}`.
            Infinite from alpha* on, where this order of the expansion does not bound it.
        inflation: The same relative to alpha = 0 (the Laplace approximation), :math:`(1 - \alpha/\alpha^*)^{-1/2}`.
        covariance: The covariance of that Gaussian, ``(dim, dim)``, on the dense route below alpha*; else None.
        separation: Half the distance of the best pair of equally weighted members on the line through the point along
            the direction; 0 where the pair does best together, NaN where it was not searched.
        gain: What that pair gains over staying together, in nats per unit.
    """

    alpha: float
    sd: float
    inflation: float
    covariance: Tensor | None
    separation: float
    gain: float


@dataclasses.dataclass(frozen=True)
class Stability:
    r"""Whether spread around a point lowers the alpha-Rényi loss, and in which direction.

    Attributes:
        alpha_star: The critical alpha, :math:`1/\lambda_{\max}(V^{-1} J)`: members at this point stay together below it
            and move apart above it. Infinite where no unit has a score; 0 where V is not positive definite, so that the
            point is not a minimum even of the mean loss.
        direction: The direction in which they move apart first, ``(dim,)``, of length one.
        pull: Score of each unit along it, ``(unit,)``: units of opposite signs ask for opposite moves.
        curvature_along: :math:`d^\top V d` along the direction; :math:`(d^\top V d)^{-1/2}` is the distance over which
            members differ by about a nat a unit.
        curvature: How V was computed.
        route: ``"dense"``, ``"matrix_free"`` or ``"gram"``.
        num_units: Number of units.
        damping: What was added to the diagonal of V, relative to its mean.
        sweep: Pairs of relative damping and critical alpha.
        alpha: The alpha that was asked about, or None.
        smallest: Smallest eigenvalue of :math:`V - \alpha J`, or None: minus the rate at which contrasts between
            members grow under gradient flow on each member's own loss.
        smallest_direction: Its eigenvector, or None.
        spread: What is predicted at alpha, or None.
        drift: Share of the squared scores along the direction that comes from their mean; zero at a stationary point.
        residual: How far the eigenvalue is from converged, relative.
        labels: A name for each coordinate, or empty.
        notes: Sentences on what to keep in mind.
    """

    alpha_star: float
    direction: Tensor
    pull: Tensor
    curvature_along: float
    curvature: str
    route: str
    num_units: int
    damping: float
    sweep: tuple[tuple[float, float], ...] = ()
    alpha: float | None = None
    smallest: float | None = None
    smallest_direction: Tensor | None = None
    spread: Spread | None = None
    drift: float = 0.0
    residual: float = 0.0
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def stable(self) -> bool | None:
        """Whether members at this point stay together at the alpha asked about; None where none was."""
        return None if self.alpha is None else self.alpha < self.alpha_star

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table, name and figure."""
        out = [
            ("critical alpha", f"{self.alpha_star:.4g}"),
            ("direction", self._named_direction()),
            ("units", f"{self.num_units}, pulled {self._sides()}"),
            ("curvature", f"{self.curvature}, {self.route} route, damping {self.damping:.3g}"),
            ("mean score", f"{100 * self.drift:.1f} % of the squared scores along the direction"),
        ]
        if self.sweep:
            out.append(("damping sweep", ", ".join(f"{d:.0e}: {a:.4g}" for d, a in self.sweep)))
        if self.alpha is not None:
            verdict = "stable: members stay together" if self.stable else "unstable: members move apart"
            out.append((f"at alpha {self.alpha:.4g}", verdict))
        if self.smallest is not None:
            out.append(("smallest eigenvalue", f"{self.smallest:.4g}"))
        if self.spread is not None:
            out += _spread_rows(self.spread)
        return out

    def _named_direction(self) -> str:
        order = self.direction.abs().argsort(descending=True)[:_SHOWN].tolist()
        names = self.labels or tuple(f"z[{i}]" for i in range(len(self.direction)))
        shown = ", ".join(f"{names[i]} {float(self.direction[i]):+.3f}" for i in order)
        return shown + (", ..." if len(self.direction) > _SHOWN else "")

    def _sides(self) -> str:
        up = int((self.pull > 0).sum())
        return f"{up} one way and {len(self.pull) - up} the other"

    def note(self) -> str:
        """Return the notes as one text."""
        return "\n".join(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Spread):
                value = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            out[field.name] = _plain(value)
        return out

    def table(self) -> Table:
        """Return the figures as a table for a rich console."""
        return rich_table("Stability", ("figure", "value"), self.rows(), self.note())

    def __str__(self) -> str:
        """Return the figures as plain text."""
        return render("Stability", ("figure", "value"), self.rows(), self.note())

    def __repr__(self) -> str:
        """Return the table, which is what an interactive session should show."""
        return str(self)

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw how the units pull along the direction, and how the critical alpha depends on damping.

        Args:
            title: Written over the figure.

        Returns:
            A matplotlib figure.
        """
        return draw_stability(
            self.pull.cpu().numpy(), self.sweep, self.alpha_star, alpha=self.alpha, chosen=self.damping, title=title
        )


def _spread_rows(spread: Spread) -> list[tuple[str, str]]:
    out = []
    if math.isfinite(spread.sd):
        out.append(("predicted sd", f"{spread.sd:.4g} along the direction, {spread.inflation:.3g} times Laplace's"))
    if not math.isnan(spread.separation):
        pair = (
            f"{spread.separation:.4g} either side of the point, gaining {spread.gain:.3g} nats a unit"
            if spread.separation > 0
            else "together"
        )
        out.append(("best pair on the line", pair))
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
