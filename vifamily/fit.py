"""From a model, a family and an objective to a posterior that says how it went."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vifamily import checkpoint as checkpoints
from vifamily.errors import ConfigError, ConvergenceWarning
from vifamily.loop import FitLoop
from vifamily.models import Simulator
from vifamily.plan import make_plan
from vifamily.plan import plan as plan
from vifamily.posterior import Posterior
from vifamily.posterior.amortised import AmortisedPosterior, fit_amortised
from vifamily.progress import FitProgress
from vifamily.rng import check_seed
from vifamily.solvers import StepReport
from vifamily.trackers import Tracker

__all__ = ["fit", "plan"]

_MOST_STEPS = 50_000
"""Steps after which a fit ends even where its stopping rule is not met."""


def fit(
    model: Any,
    family: Any = "auto",
    objective: Any = "elbo",
    solver: Any = "auto",
    *,
    seed: int = 0,
    steps: int | None = None,
    restarts: int = 1,
    draws: int | None = None,
    batch_size: int | None = None,
    init: Any = "auto",
    callbacks: Sequence[Callable[[StepReport], Any]] = (),
    tracker: Tracker | None = None,
    progress: bool | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    time_limit: float | None = None,
    encoder: torch.nn.Module | str | None = None,
    local_family: Any = None,
    compile: Literal["auto"] | bool = "auto",
    show_plan: bool = False,
) -> Posterior:
    """Fit a posterior.

    Args:
        model: A model, a problem, or a problem's name such as ``"eight_schools"``. A
            :class:`~vifamily.models.Simulator` is fitted for all observations at once (see Returns).
        family: A family's name such as ``"low_rank(rank=3)"``, an entry, a Pyro guide, a zuko flow, or a module
            with a family's methods; ``"auto"`` takes full rank up to 100 coordinates and mean field above.
        objective: An objective's name such as ``"renyi(alpha=0.5)"``, or an objective.
        solver: A solver's name or a solver; ``"auto"`` takes the objective's own where it has one, ``lbfgs`` where the
            loss is smooth on fixed draws (all data, a Gaussian or mixture family, one draw a value), and ``adam``
            elsewhere; ``posterior.record.notes`` say which and why.
        seed: Root seed; the same seed gives the same fit.
        steps: Most steps; None leaves it to the stopping rule (at most 50,000).
        restarts: Fits from different start points, run as one; the best is returned, the others are kept and compared.
        draws: Draws per step; None takes the objective's default.
        batch_size: Data per step; None means all.
        init: ``"auto"`` (the best of a few cheap Gaussian approximations), ``"laplace"``, ``"pathfinder"`` (the best
            Gaussian on four paths), ``"prior"``, named
            values, an unconstrained point, or another posterior to continue from.
        callbacks: One or several functions, called with each :class:`~vifamily.solvers.StepReport`; a true result ends
            the fit.
        tracker: Where per-step numbers go (see :mod:`vifamily.trackers`).
        progress: Whether to show a progress line; None shows it on a terminal only.
        device: Device to run on; None leaves the model where it is.
        dtype: Floating dtype; None leaves the model's.
        checkpoint: Folder for a checkpoint, written every ``checkpoint_every`` steps; when it holds one of this
            same fit, the fit goes on from there, bit for bit on CPU.
        checkpoint_every: Steps between checkpoints.
        time_limit: Most seconds that this call may take steps; the averaged posterior so far is returned.
        encoder: For models with local latents: a module from a batch's data to a context; None gives each datum its
            own parameters. For a simulator: a module from standardised data ``(datum, *shape)`` to a context, or a name
            such as ``"set(outputs=16)"`` (see :mod:`vifamily.posterior.amortised`).
        local_family: For models with local latents: the family of one datum's latents; None takes mean field.
        compile: Whether to compile the steps of ``adam``: ``"auto"`` where it pays; what cannot be compiled runs in
            torch, and the record's notes say why. Callbacks and trackers then see up to a hundred steps at once.
        show_plan: Whether to print the plan before the first step: what is used of model and family, the estimator,
            the solver and what to beware of. ``vf.plan`` gives it without a fit.

    Returns:
        The posterior: draws, density, summary, diagnosis. For a simulator an
        :class:`~vifamily.posterior.amortised.AmortisedPosterior`, which gives the posterior of an observation when it
        is called with one; its objective is ``inclusive_kl``, or any that evaluates the log joint where the simulator
        has a likelihood.

    Raises:
        IncompatibleError: If model, family and objective cannot meet.
        UnknownNameError: If a name is not registered.
        ConfigError: If a number is out of range, or the checkpoint folder cannot be written.
        CheckpointError: If the checkpoint is corrupt or belongs to another fit.
        NonFiniteLossError: If the loss stops being finite; its ``posterior`` is the last finite state.

    Warns:
        ConvergenceWarning: If the fit ended before its stopping rule was met and no one asked it to.

    Ctrl-C ends the fit after the step in progress and returns the averaged posterior so far.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", family="full_rank", seed=0)
        >>> posterior.record.stop_reason
        'converged'
    """
    _check_numbers(seed, steps, restarts, checkpoint_every, time_limit)
    calls = _checked_callbacks(callbacks)
    if isinstance(model, Simulator):
        return _amortised(  # type: ignore[return-value]
            model, family, objective, solver, draws=draws, local_family=local_family, checkpoint=checkpoint,
            device=device, dtype=dtype, encoder=encoder, seed=seed, steps=steps, restarts=restarts,
            batch_size=batch_size, init=init, callbacks=calls, tracker=tracker, progress=progress,
            time_limit=time_limit, compile=compile, show_plan=show_plan,
        )  # fmt: skip
    if isinstance(encoder, str):
        raise ConfigError(
            f"an encoder by name ({encoder!r}) is for simulators: for the local latents of a model give a module from "
            "a batch's data to a context."
        )
    if tracker is not None and (isinstance(tracker, type) or not isinstance(tracker, Tracker)):
        what = f"the class {tracker.__name__}" if isinstance(tracker, type) else type(tracker).__name__
        raise ConfigError(
            f"a tracker is an object with start, log and finish, such as CsvTracker('a.csv'), got {what}."
        )
    planned = make_plan(
        model, family, objective, solver, draws=draws, batch_size=batch_size, device=device, dtype=dtype,
        compile=compile,
    )  # fmt: skip
    planned.solver.check_steps(steps)
    if show_plan:
        print(planned, flush=True)
    folder = None if checkpoint is None else checkpoints.prepare(checkpoint)
    loop = FitLoop(planned, seed=seed, most_steps=steps or _MOST_STEPS, restarts=restarts, init=init, folder=folder,
                 every=checkpoint_every, encoder=encoder, local_family=local_family,
                    watched=bool(calls) or tracker is not None)  # fmt: skip
    posterior = loop.run(calls, tracker, FitProgress(show=progress, most_steps=steps or _MOST_STEPS), time_limit)
    warn_if_unfinished(posterior, steps)
    return posterior


def _amortised(
    model: Simulator, family: Any, objective: Any, solver: Any, *, local_family: Any,
    checkpoint: Any, device: Any, dtype: torch.dtype | None, steps: int | None, compile: Any, show_plan: bool,
    **options: Any,
) -> AmortisedPosterior:  # fmt: skip
    """Fit a simulator; what has no meaning for one is refused."""
    if solver != "auto" and solver != "adam":
        raise ConfigError("a simulator is fitted by 'adam' on simulated pairs: leave solver out.")
    for name, value, instead in (
        ("local_family", local_family, "a simulator's parameters are all of one kind"),
        (
            "checkpoint",
            checkpoint,
            "store the simulations, simulator.simulations(..., folder=...), and save the result",
        ),
    ):
        if value is not None:
            raise ConfigError(f"{name}= is not for simulators: {instead}.")
    if compile is True:
        raise ConfigError("compile=True is not for simulators: their steps run in torch.")
    if device is not None or dtype is not None:
        where = model.device if device is None else torch.device(device)
        model = model.moved(device=where, dtype=dtype or model.dtype)
    if show_plan:
        print(plan(model, family, objective), flush=True)
    found = fit_amortised(model, family, objective, steps=steps, **options)
    warn_if_unfinished(found, steps)
    return found


def warn_if_unfinished(posterior: Posterior | AmortisedPosterior, steps: int | None) -> None:
    """Warn where a fit that was left to its stopping rule ended before the rule was met."""
    record = posterior.record
    if steps is None and record.stop_reason in ("max_steps", "smallest_step", "most_draws"):
        warnings.warn(
            f"the fit stopped after {record.steps} steps ({record.stop_reason}) before its averages settled: look at "
            "posterior.diagnose(), and try more draws=, another family, or init= this posterior to go on.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _check_numbers(seed: int, steps: int | None, restarts: int, every: int, time_limit: float | None) -> None:
    check_seed(seed)
    for name, value in (("steps", steps), ("restarts", restarts), ("checkpoint_every", every)):
        optional = value is None and name == "steps"
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
    number = isinstance(time_limit, (int, float)) and not isinstance(time_limit, bool)
    if time_limit is not None and not (number and time_limit > 0):
        raise ConfigError(f"time_limit must be a positive number of seconds, got {time_limit!r}.")


def _checked_callbacks(callbacks: Any) -> tuple[Callable[[StepReport], Any], ...]:
    found = (callbacks,) if callable(callbacks) else callbacks
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(callable(call) for call in found):
        raise ConfigError(f"callbacks must be functions that take a StepReport, got {callbacks!r:.80}.")
    return tuple(found)
