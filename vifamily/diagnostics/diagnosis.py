"""The diagnosis of a fit: its figures, and one plain sentence of advice."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich.table import Table

from vifamily.diagnostics._tables import render, rich_table
from vifamily.diagnostics.bounds import Estimate
from vifamily.diagnostics.psis import draws_needed
from vifamily.diagnostics.stein import SteinTest
from vifamily.diagnostics.summary import as_plain

__all__ = ["RESTART_THRESHOLD", "Diagnosis", "Subject", "advise"]

RESTART_THRESHOLD = 1.05
"""R-hat across restarts above which they count as disagreeing."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What was fitted, as far as advice depends on it.

    Attributes:
        family: Registered name of the family.
        objective: Registered name of the objective.
        dim: Number of latent coordinates.
        blind_to_mode_weights: Whether the objective cannot see the relative weights of separate modes.
    """

    family: str
    objective: str
    dim: int
    blind_to_mode_weights: bool = False


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """How a fit went and how far its posterior can be trusted; prints as a table.

    Attributes:
        stop_reason: ``"converged"``, ``"max_steps"``, ``"smallest_step"``, ``"most_draws"``, ``"interrupted"``,
            ``"time_limit"``, ``"callback"``, ``"non_finite"`` or ``"closed_form"``.
        converged: Whether the stopping rule was met.
        steps: Steps taken.
        seconds: Wall time of the fit.
        loss: Last recorded loss with its Monte-Carlo error, or None.
        elbo: Evidence lower bound in nats, or None where there is no density of the family or no model.
        log_evidence: Importance-sampling estimate in nats, or None; only as good as k-hat.
        k_hat: Tail index of the importance weights, or None with the reason in ``k_hat_note``.
        k_hat_error: Its standard error.
        k_hat_threshold: Largest k-hat at which this many draws are reliable, ``min(1 - 1 / log10 S, 0.7)``.
        k_hat_note: Why k-hat is not there, or what it cannot see.
        importance_ess: Effective number of draws after importance weighting.
        num_draws: Draws the figures come from.
        gradient_snr: Signal-to-noise ratio of the gradient at the end, or None.
        rhat_iterates: Worst R-hat of the parameter iterates at the end, or None.
        mcse_iterates: Worst Monte-Carlo error of the averaged iterates, in posterior standard deviations, or None.
        num_restarts: Restarts run.
        restart_rhat: Worst R-hat across restarts, or None with fewer than two.
        restart_worst: The quantity where it occurs.
        restart_losses: Final loss of each restart.
        non_finite: Non-finite losses or gradients met in the fit.
        non_finite_draws: Draws whose log joint or log density is NaN or plus infinity.
        zero_draws: Draws to which the model gives density zero.
        stein: Stein test of the draws, for families without density, or None.
        notes: What the fit noted.
        advice: One plain sentence.
    """

    stop_reason: str
    converged: bool
    steps: int
    seconds: float
    loss: Estimate | None = None
    elbo: Estimate | None = None
    log_evidence: Estimate | None = None
    k_hat: float | None = None
    k_hat_error: float | None = None
    k_hat_threshold: float = 0.7
    k_hat_note: str = ""
    importance_ess: float | None = None
    num_draws: int = 0
    gradient_snr: float | None = None
    rhat_iterates: float | None = None
    mcse_iterates: float | None = None
    num_restarts: int = 1
    restart_rhat: float | None = None
    restart_worst: str | None = None
    restart_losses: tuple[float, ...] = ()
    non_finite: int = 0
    non_finite_draws: int = 0
    zero_draws: int = 0
    stein: SteinTest | None = None
    notes: tuple[str, ...] = ()
    advice: str = ""

    @property
    def reliable(self) -> bool | None:
        """Whether k-hat is at or below its threshold; None where there is no k-hat."""
        return None if self.k_hat is None else self.k_hat <= self.k_hat_threshold

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data that JSON takes (numbers that are not finite as text)."""
        plain: dict[str, Any] = as_plain(dataclasses.asdict(self))
        return plain

    def rows(self) -> list[tuple[str, str]]:
        """Return the figures as text, name and value."""
        ended = f"{self.stop_reason} after {self.steps} steps, {self.seconds:.1f} s"
        rows = [
            ("stopped", ended),
            ("loss", _text(self.loss)),
            ("ELBO", _text(self.elbo)),
            ("k-hat", self._k_hat_text()),
        ]
        if self.importance_ess is not None:
            rows.append(("importance ESS", f"{self.importance_ess:.0f} of {self.num_draws} draws"))
        if self.stein is not None:
            rows.append(("Stein test", f"statistic {self.stein.statistic:.3g}, p-value {self.stein.p_value:.3f}"))
        rows += [
            ("gradient signal-to-noise", _text(self.gradient_snr)),
            ("iterates", f"R-hat {_text(self.rhat_iterates)}, Monte-Carlo error {_text(self.mcse_iterates)}"),
            ("restarts", self._restart_text()),
            ("non-finite", f"{self.non_finite} steps, {self.non_finite_draws} of {self.num_draws} draws"),
        ]
        rows += [("note", note) for note in self.notes]
        return [*rows, ("advice", self.advice)]

    def _k_hat_text(self) -> str:
        if self.k_hat is None:
            return f"unavailable: {self.k_hat_note}"
        side = "at most" if self.k_hat <= self.k_hat_threshold else "above"
        error = "" if self.k_hat_error is None or math.isnan(self.k_hat_error) else f" ± {self.k_hat_error:.2f}"
        return f"{self.k_hat:.2f}{error}, {side} its threshold {self.k_hat_threshold:.2f} for {self.num_draws} draws"

    def _restart_text(self) -> str:
        if self.restart_rhat is None:
            return f"{self.num_restarts}, agreement not known"
        return f"{self.num_restarts}, worst R-hat {self.restart_rhat:.3f} ({self.restart_worst})"

    def __rich__(self) -> Table:
        """Return the table for a rich console."""
        return rich_table("Diagnosis", ("figure", "value"), self.rows())

    def __str__(self) -> str:
        """Return the table as plain text."""
        return render("Diagnosis", ("figure", "value"), self.rows())

    def __repr__(self) -> str:
        """Return the table, which is what an interactive session should show."""
        return str(self)


def _text(value: Estimate | float | None) -> str:
    if value is None:
        return "not known"
    return str(value) if isinstance(value, Estimate) else f"{value:.3g}"


def advise(found: Diagnosis, subject: Subject) -> str:
    """Return one plain sentence: the first thing that is wrong, and what to do about it.

    Order: the fit broke, draws break the log joint, it did not converge, restarts disagree, k-hat, Monte-Carlo error,
    what the figures cannot see.

    Args:
        found: The figures.
        subject: What was fitted.

    Returns:
        One sentence.

    Example:
        >>> found = Diagnosis("max_steps", False, 500, 1.0)
        >>> advise(found, Subject("mean_field", "elbo", 2))[:44]
        'The fit used up its 500 steps before it conv'
    """
    for rule in (_broken, _unfinished, _restarts, _coverage, _monte_carlo, _blindness):
        sentence = rule(found, subject)
        if sentence:
            return sentence
    end = "." if found.restart_rhat is not None else "; restarts=4 would look for modes that no draw has reached."
    return f"Nothing here speaks against this posterior{end}"


def _broken(found: Diagnosis, subject: Subject) -> str | None:
    if found.stop_reason == "non_finite":
        return (
            "The fit stopped at a loss that was not finite, and this is its last finite state, not an answer: "
            "check the log joint where it fails, start nearer to the data with init=, or take a smaller step size."
        )
    if found.non_finite_draws:
        return (
            f"At {found.non_finite_draws} of {found.num_draws} draws the log joint or log density is NaN or infinite: "
            "find out where with posterior.log_joint, and declare supports that keep parameters where it is defined."
        )
    if found.zero_draws:
        return (
            f"{found.zero_draws} of {found.num_draws} draws lie where the model's density is zero, so the ELBO is "
            f"minus "
            "infinity: declare the parameters' supports so that the family stays inside."
        )
    return None


def _unfinished(found: Diagnosis, subject: Subject) -> str | None:
    if found.converged or found.stop_reason in ("converged", "closed_form"):
        return None
    why = {
        "max_steps": f"used up its {found.steps} steps before it converged",
        "most_draws": "reached its largest number of fixed draws before the answer stopped depending on them",
        "interrupted": f"was interrupted at step {found.steps} before it converged",
        "time_limit": f"ran out of its time at step {found.steps} before it converged",
    }.get(found.stop_reason, f"ended ({found.stop_reason}) before it converged")
    return (
        f"The fit {why}: go on from here with fit(model, init=posterior), or leave the number of steps to the "
        f"stopping rule."
    )


def _restarts(found: Diagnosis, subject: Subject) -> str | None:
    if found.restart_rhat is None or found.restart_rhat <= RESTART_THRESHOLD:
        return None
    return (
        f"The {found.num_restarts} restarts disagree (R-hat {found.restart_rhat:.2f} for {found.restart_worst}), so "
        f"there are "
        "several optima, perhaps several modes: compare their losses, combine them with posterior.stack(), or take a "
        "family that holds several modes such as mixture."
    )


def _coverage(found: Diagnosis, subject: Subject) -> str | None:
    k = found.k_hat
    if k is None or k <= found.k_hat_threshold:
        return None
    if k <= 0.7:
        more = max(math.ceil(draws_needed(k)), 2155)
        return (
            f"k-hat {k:.2f} is above the threshold for {found.num_draws} draws only: repeat with "
            f"diagnose(num_draws={more})."
        )
    return (
        f"k-hat {k:.2f} is above {found.k_hat_threshold:.2f}, so the family {subject.family} fits this posterior too "
        f"loosely for "
        f"importance weights to correct it, though means may still be close: {_richer(subject)}."
    )


def _richer(subject: Subject) -> str:
    if subject.family == "mean_field":
        return "try full_rank" if subject.dim <= 200 else "try low_rank(rank=10)"
    if subject.family in ("full_rank", "low_rank", "mixture"):
        return "try flow"
    if subject.family == "ensemble":
        return "try more paths, or fit a family from here with init= this posterior"
    if subject.family == "flow":
        return "try a longer fit or a larger flow, or parameters that are less dependent on each other a priori"
    return "try a richer family such as flow"


def _monte_carlo(found: Diagnosis, subject: Subject) -> str | None:
    if found.mcse_iterates is not None and found.mcse_iterates > 0.1:
        return (
            f"The averaged parameters still carry a Monte-Carlo error of {found.mcse_iterates:.2f} posterior "
            f"standard deviations: "
            "go on with fit(model, init=posterior), or take more draws per step."
        )
    if found.rhat_iterates is not None and found.rhat_iterates > 1.1:
        return (
            f"The iterates were still moving at the end (R-hat {found.rhat_iterates:.2f}): go on with fit(model, "
            f"init=posterior)."
        )
    if found.elbo is not None and found.elbo.error > 0.5:
        more = min(int(found.num_draws * (found.elbo.error / 0.1) ** 2), 1_000_000)
        return (
            f"The ELBO is known to ±{found.elbo.error:.2g} nats only: before comparing fits by it, repeat with "
            f"diagnose(num_draws={more})."
        )
    return None


def _blindness(found: Diagnosis, subject: Subject) -> str | None:
    if found.k_hat is None and found.stein is not None and found.stein.p_value < 0.01:
        return (
            f"A Stein test finds that the draws differ from the model's posterior (p-value {found.stein.p_value:.3f}): "
            "fit longer, or compare with a family that has a density, such as flow."
        )
    if subject.blind_to_mode_weights:
        return (
            f"The objective {subject.objective} does not see the relative weights of separate modes: if there may be "
            f"several, "
            "compare restarts or refit with elbo from here."
        )
    if found.k_hat is not None:
        return None
    return (
        f"k-hat is unavailable ({found.k_hat_note}), so this rests on what else there is: agreement of restarts, "
        "a Stein test, posterior.check, and comparison with a family that has a density."
    )
