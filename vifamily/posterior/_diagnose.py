"""The figures of a diagnosis, from a posterior."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vifamily.diagnostics.bounds import Estimate, elbo, log_evidence
from vifamily.diagnostics.diagnosis import Diagnosis, Subject, advise
from vifamily.diagnostics.psis import FEWEST_DRAWS, k_hat_threshold, psis
from vifamily.diagnostics.restarts import restart_rhat
from vifamily.diagnostics.stein import SteinTest, kernel_stein
from vifamily.errors import ConfigError, SpecError
from vifamily.posterior._core import check_count
from vifamily.registry import entry_name, parse
from vifamily.rng import generator
from vifamily.types import Capability, Space

if TYPE_CHECKING:
    from vifamily.posterior._posterior import Posterior

__all__ = ["diagnose"]

_STEIN_DRAWS = 500


def diagnose(posterior: Posterior, num_draws: int, seed: int | None) -> Diagnosis:
    """Gather the figures and choose the advice."""
    check_count("num_draws", num_draws)
    if num_draws < FEWEST_DRAWS:
        raise ConfigError(f"a diagnosis needs {FEWEST_DRAWS} draws or more, got num_draws={num_draws!r}.")
    record = posterior.record
    figures: dict[str, Any] = {"num_draws": num_draws, "k_hat_threshold": k_hat_threshold(num_draws)}
    note = _why_no_k_hat(posterior)
    if note is None:
        figures.update(_weights(posterior, num_draws, seed))
    else:
        figures["k_hat_note"] = note
        if record.k_hat is not None:
            figures["k_hat"] = record.k_hat
        figures["stein"] = _stein(posterior, seed)
    figures.update(_agreement(posterior, num_draws, seed))
    found = Diagnosis(
        stop_reason=record.stop_reason,
        converged=record.converged,
        steps=record.steps,
        seconds=record.seconds,
        loss=_last_loss(posterior),
        gradient_snr=record.gradient_snr,
        rhat_iterates=record.rhat_iterates,
        mcse_iterates=record.mcse_iterates,
        num_restarts=record.num_restarts,
        restart_losses=record.restart_losses,
        non_finite=record.non_finite,
        notes=record.notes,
        **figures,
    )
    return dataclasses.replace(found, advice=advise(found, _subject(posterior)))


def _why_no_k_hat(posterior: Posterior) -> str | None:
    family = frozenset(posterior.family.capabilities)
    if Capability.LOG_Q not in family:
        if Capability.FINITE in family:
            return "a finite ensemble of points has no density"
        return "particles have no density" if Capability.PARTICLES in family else "implicit family (no density)"
    if posterior.model is None:
        return "the model is not there; pass it as load(path, model=...)"
    if not posterior.has_log_joint:
        return "the model has no log joint of the global parameters alone"
    return None


def _weights(posterior: Posterior, num_draws: int, seed: int | None) -> dict[str, Any]:
    _, log_p, log_q = posterior.weighted(num_draws, seed=seed)
    ratio = log_p - log_q
    smoothed = psis(ratio)
    broken = int((ratio.isnan() | (ratio == math.inf)).sum())
    zero = int((ratio == -math.inf).sum())
    out: dict[str, Any] = {
        "k_hat": smoothed.k_hat,
        "k_hat_error": smoothed.k_hat_error,
        "importance_ess": smoothed.ess,
        "non_finite_draws": broken,
        "zero_draws": zero,
    }
    if not broken:
        out["log_evidence"] = log_evidence(ratio) if zero < num_draws else None
        out["elbo"] = elbo(ratio) if not zero else Estimate(-math.inf, math.nan)
    return out


def _stein(posterior: Posterior, seed: int | None) -> SteinTest | None:
    """A Stein test, where the model has a score on real space; ensembles of few points are beyond it."""
    model = posterior.model
    if model is None or not posterior.has_log_joint or model.space is not Space.REAL:
        return None
    if Capability.FINITE in posterior.family.capabilities or Capability.SCORE not in model.capabilities:
        return None
    z = posterior.draws(_STEIN_DRAWS, seed=seed)
    score = posterior.scores_in_chunks(z)
    if not bool(score.isfinite().all()):
        return None
    return kernel_stein(z, score, generator=generator(posterior.record.seed, "stein"))


def _agreement(posterior: Posterior, num_draws: int, seed: int | None) -> dict[str, Any]:
    if len(posterior.restarts) < 2:
        return {}
    size = max(4, min(num_draws, 1000))
    root = posterior.record.seed if seed is None else seed
    columns: list[Tensor] = []
    for r, family in enumerate(posterior.restarts):
        z = family.sample(size, generator=generator(root, "agreement", r))
        columns.append(posterior.layout.flatten(posterior.layout.constrain(z)).double())
    values = restart_rhat(torch.stack(columns))
    worst = int(values.nan_to_num(math.inf).argmax())
    return {"restart_rhat": float(values[worst]), "restart_worst": posterior.layout.columns()[worst]}


def _last_loss(posterior: Posterior) -> Estimate | None:
    trace = posterior.record.trace
    if "loss" not in trace or not len(trace["loss"]):
        return None
    error = trace.get("loss_error")
    return Estimate(float(trace["loss"][-1]), math.nan if error is None else float(error[-1]))


def _subject(posterior: Posterior) -> Subject:
    blind = bool(getattr(posterior.objective, "blind_to_mode_weights", False))
    objective = posterior.record.objective if posterior.objective is None else entry_name(posterior.objective)
    return Subject(_base_name(posterior.record.family), _base_name(objective), posterior.dim, blind)


def _base_name(spec: str) -> str:
    try:
        return parse(spec).name
    except SpecError:
        return spec
