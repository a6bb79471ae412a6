"""Pictures of a posterior, drawn by the functions of :mod:`vifamily.plots` from plain arrays."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError

if TYPE_CHECKING:
    from vifamily.posterior._posterior import Posterior

__all__ = ["draw_plot"]

_KINDS = ("pairs", "marginals", "contour", "trace", "khat")


def draw_plot(
    posterior: Posterior,
    kind: str,
    *,
    reference: Any,
    num_draws: int,
    seed: int | None,
    path: str | os.PathLike[str] | None,
) -> Any:
    """Draw one kind of picture; see :meth:`vifamily.posterior.Posterior.plot`."""
    from vifamily import plots  # matplotlib is slow to import and most sessions draw nothing

    if kind not in _KINDS:
        raise ConfigError(f"no plot is called {kind!r}: choose one of {', '.join(_KINDS)}.")
    if kind == "trace":
        trace = posterior.record.trace
        if "loss" not in trace or not len(trace["loss"]):
            raise NotAvailableError("this posterior has no trace of its loss.")
        figure = plots.loss_trace(
            trace["step"], trace["loss"], trace.get("loss_error"), step_size=trace.get("step_size")
        )
    elif kind == "khat":
        _, weights = posterior.importance_weights(max(num_draws, 25), seed=seed)
        figure = plots.k_hat(weights.k_hat, weights.threshold, log_weights=weights.log_weight.numpy())
    elif kind == "contour":
        figure = _contour(posterior, plots.contour, num_draws, seed)
    else:
        draws, names, exact = _columns(posterior, reference, num_draws, seed)
        draw = plots.pairs if kind == "pairs" else plots.marginals
        figure = draw(draws, names, reference=exact, label=posterior.record.family)
    if path is not None:
        figure.savefig(path)
    return figure


def _columns(
    posterior: Posterior, reference: Any, num_draws: int, seed: int | None
) -> tuple[np.ndarray, list[str], np.ndarray | None]:
    """Draws, their names, and reference draws in the same columns."""
    theta = posterior.sample(num_draws, seed=seed)
    known = getattr(posterior.problem, "reference", None) if reference is None else reference
    exact = getattr(known, "draws", None) if hasattr(known, "draws") else known
    if reference is None and known is not None and exact is not None:
        return _array(posterior.problem.columns(theta)), list(known.names), np.asarray(exact)
    draws = _array(posterior.layout.flatten(theta))
    return draws, posterior.layout.columns(), None if exact is None else np.asarray(exact)


def _contour(posterior: Posterior, contour: Any, num_draws: int, seed: int | None) -> Any:
    if posterior.dim != 2:
        raise NotAvailableError(f"a contour needs two unconstrained coordinates, this posterior has {posterior.dim}.")
    posterior.require_model("a contour")
    like = posterior.family.shift
    z = posterior.draws(num_draws, seed=seed)

    def log_p(points: np.ndarray) -> np.ndarray:
        return _array(posterior.log_joint_in_chunks(torch.as_tensor(points).to(like)))

    return contour(log_p, _array(z), names=posterior.layout.unconstrained_columns())


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
