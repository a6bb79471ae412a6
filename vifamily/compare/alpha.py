"""Choosing alpha of a per-datum Rényi objective by held-out scores."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vifamily.diagnostics._tables import render
from vifamily.diagnostics.routing import MixtureScore
from vifamily.errors import ConfigError
from vifamily.fit import fit
from vifamily.plan import describe
from vifamily.posterior import Posterior
from vifamily.registry import build

__all__ = ["AlphaChoice", "AlphaRow", "choose_alpha"]

_ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class AlphaRow:
    """What one alpha came to.

    Attributes:
        alpha: The power.
        score: Held-out log scores of mixture and members.
        routing_entropy: Mean routing entropy of held-out units, nats.
        effective_members: Exponential of the entropy of the members' usage.
        dead: Number of members that explain next to nothing.
        converged: Whether the fit met its stopping rule.
        posterior: The fit.
    """

    alpha: float
    score: MixtureScore
    routing_entropy: float
    effective_members: float
    dead: int
    converged: bool
    posterior: Posterior

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "alpha": self.alpha,
            **self.score.to_dict(),
            "routing_entropy": self.routing_entropy,
            "effective_members": self.effective_members,
            "dead": self.dead,
            "converged": self.converged,
        }


@dataclasses.dataclass(frozen=True)
class AlphaChoice:
    """Fits over a grid of alpha, scored on held-out data.

    Attributes:
        rows: One per alpha, in increasing order.
        alpha: The smallest alpha whose mixture score is within one standard error of the best one.
        best: The alpha of the best mixture score.
        unit: What a score is of, ``"datum"`` or ``"group"``.
    """

    rows: tuple[AlphaRow, ...]
    alpha: float
    best: float
    unit: str

    @property
    def posterior(self) -> Posterior:
        """The fit at the chosen alpha."""
        return next(row.posterior for row in self.rows if row.alpha == self.alpha)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "alpha": self.alpha,
            "best": self.best,
            "unit": self.unit,
            "rows": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        """Return fidelity and diversity by alpha as a table."""
        rows = []
        for row in self.rows:
            plain = row.to_dict()
            mark = " *" if row.alpha == self.alpha else ""
            rows.append(
                (
                    f"{row.alpha:g}{mark}",
                    f"{plain['mixture']:.4f} ± {plain['mixture_error']:.4f}",
                    f"{plain['member']:.4f} ± {plain['member_error']:.4f}",
                    f"{plain['diversity']:.4f}",
                    f"{row.routing_entropy:.3f}",
                    f"{row.effective_members:.2f}",
                    str(row.dead),
                    "yes" if row.converged else "no",
                )
            )
        header = ("alpha", "mixture", "member", "gain", "routing entropy", "in use", "dead", "converged")
        note = (
            f"* alpha {self.alpha:g}: the smallest whose mixture score is within one standard error of the best, "
            f"{self.best:g}. Log scores per {self.unit}, higher is better; members are scored by themselves."
        )
        return render("choice of alpha on held-out data", header, rows, note)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw both scores against alpha.

        Args:
            path: Save the figure there too; the ending gives the format.

        Returns:
            A matplotlib figure.
        """
        from vifamily import plots  # matplotlib is slow to import and most sessions draw nothing

        plain = [row.to_dict() for row in self.rows]
        figure = plots.alpha_curve(
            [row["alpha"] for row in plain],
            [row["mixture"] for row in plain],
            [row["member"] for row in plain],
            mixture_error=[row["mixture_error"] for row in plain],
            member_error=[row["member_error"] for row in plain],
            chosen=self.alpha,
        )
        if path is not None:
            figure.savefig(path)
        return figure


def choose_alpha(
    model: Any,
    held_out: Any,
    *,
    alphas: Sequence[float] = _ALPHAS,
    family: Any = "ensemble",
    objective: Any = "renyi_predictive",
    held_out_groups: Any = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> AlphaChoice:
    """Fit at several alpha and choose by the log score of the mixture on held-out data.

    Training losses at different alpha are not comparable: they fall as alpha grows. The score of the mixture is, and
    beside it stands that of the members alone, which falls as they specialise. Among those alpha whose mixture score
    is within one standard error (of the paired difference over units) of the best, the smallest is chosen: it asks for
    the least diversity, and leaves members the most useful by themselves.

    Args:
        model: A model with a likelihood per datum.
        held_out: Data that the model has not seen, in its form.
        alphas: Values to try.
        family: The family of all fits.
        objective: An objective with an ``alpha`` of this kind, its other fields as given here.
        held_out_groups: Ids of the groups of the held-out data, where the objective's unit is the group.
        seed: Root seed of all fits.
        options: Further arguments of :func:`vifamily.fit`, for example ``{"steps": 2000}``.

    Returns:
        Scores and fits, the chosen alpha; prints as a table and plots.

    Raises:
        ConfigError: If there are no alphas, the objective has no such alpha, or its unit is the group and the held-out
            data have no groups.

    Example:
        >>> import torch, vifamily as vf
        >>> y = torch.cat([torch.linspace(-4, -2, 50), torch.linspace(2, 4, 50)]).double()
        >>> model = vf.models.LikelihoodModel((0.0, 10.0), lambda z, y: -0.5 * (y - z) ** 2, data=y[::2], dim=1)
        >>> choice = vf.choose_alpha(model, y[1::2], alphas=(0.0, 0.8), family="ensemble(size=2)")
        >>> choice.alpha
        0.8
    """
    base = build("objectives", objective) if not hasattr(objective, "loss") else objective
    if getattr(base, "predictive_order", None) is None or not hasattr(base, "alpha"):
        raise ConfigError(
            "choose_alpha needs a per-datum objective such as 'renyi_predictive' or 'bb_alpha', "
            f"got {describe(base)!r}."
        )
    values = sorted({float(a) for a in alphas})
    if not values:
        raise ConfigError("choose_alpha needs at least one alpha to try, got none.")
    unit = getattr(base, "unit", "datum")
    if (unit == "group") != (held_out_groups is not None):
        raise ConfigError(
            f"the objective's unit is the {unit}, so held_out_groups= must "
            + ("name the group of each held-out datum." if unit == "group" else "be left out.")
        )
    rows = []
    for alpha in values:
        one = dataclasses.replace(base, alpha=alpha)
        posterior = fit(model, family, one, seed=seed, **dict(options or {}))
        routed = posterior.responsibilities(held_out, groups=held_out_groups)
        score = posterior.mixture_log_score(held_out, groups=held_out_groups)
        rows.append(
            AlphaRow(
                alpha, score, routed.routing_entropy, routed.effective_members, len(routed.dead),
                posterior.record.converged, posterior,
            )
        )  # fmt: skip
    best = max(rows, key=lambda row: row.score.mixture_mean)
    chosen = next(row for row in rows if _as_good(row.score.mixture, best.score.mixture))
    return AlphaChoice(tuple(rows), chosen.alpha, best.alpha, unit)


def _as_good(score: torch.Tensor, best: torch.Tensor) -> bool:
    """Whether a score is within one standard error of the best, unit by unit."""
    worse = best - score
    error = float(worse.std()) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
    return float(worse.mean()) <= error
