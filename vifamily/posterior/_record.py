"""What a fit leaves behind beside the family: how it went."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vifamily.checkpoint import field
from vifamily.errors import CheckpointError

__all__ = ["FitRecord", "versions"]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on.

    Example:
        >>> sorted(versions())
        ['numpy', 'pyro-ppl', 'python', 'torch', 'vifamily', 'zuko']
    """
    out = {"python": platform.python_version()}
    for name in ("vifamily", "torch", "numpy", "pyro-ppl", "zuko"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


@dataclasses.dataclass(frozen=True)
class FitRecord:
    """How a fit went.

    Attributes:
        objective: Spec of the objective.
        estimator: Gradient estimator used, or None where there is no choice.
        family: Spec of the family.
        solver: Spec of the solver.
        seed: Root seed.
        steps: Steps taken.
        stop_reason: ``"converged"``, ``"max_steps"``, ``"smallest_step"``, ``"most_draws"``, ``"interrupted"``,
            ``"time_limit"``, ``"callback"``, ``"non_finite"`` or ``"closed_form"``.
        converged: Whether the stopping rule was met.
        seconds: Wall time.
        draws_per_step: Draws of the family per step.
        num_restarts: Restarts run.
        trace: Columns of equal length: ``step``, ``loss``, ``loss_error``, ``step_size`` and ``term:NAME``, thinned.
        restart_losses: Final loss of each restart.
        best_restart: The restart whose family the posterior is.
        non_finite: Non-finite losses or gradients met.
        gradient_snr: Signal-to-noise ratio of the gradient at the end, or None.
        rhat_iterates: Worst R-hat of the iterates at the end, or None.
        mcse_iterates: Worst Monte-Carlo error of the averaged iterates in posterior standard deviations, or None.
        k_hat: Pareto k-hat of the importance weights that the draws carry, for solvers that weigh them, or None.
        mean_errors: Monte-Carlo error of the mean of each unconstrained coordinate, in its own units, where the solver
            gives one; empty otherwise.
        dropped_per_epoch: Data left over in each epoch of minibatches.
        notes: What a reader should know: how the fit was started, what was chosen for the user.
        versions: Versions of the packages that made it.
    """

    objective: str
    estimator: str | None
    family: str
    solver: str
    seed: int
    steps: int
    stop_reason: str
    converged: bool
    seconds: float
    draws_per_step: int
    num_restarts: int = 1
    trace: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    restart_losses: tuple[float, ...] = ()
    best_restart: int = 0
    non_finite: int = 0
    gradient_snr: float | None = None
    rhat_iterates: float | None = None
    mcse_iterates: float | None = None
    mean_errors: tuple[float, ...] = ()
    k_hat: float | None = None
    dropped_per_epoch: int = 0
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_plain(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return plain data, and the trace as tensors."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "trace"}
        plain["versions"] = dict(self.versions)
        return plain, {key: torch.as_tensor(np.array(value, dtype=np.float64)) for key, value in self.trace.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], trace: Mapping[str, Tensor]) -> FitRecord:
        """Build a record from :meth:`to_plain`'s data.

        Raises:
            CheckpointError: If an entry is missing or of the wrong type.
        """
        values: dict[str, Any] = {}
        for name, (kind, optional) in _FIELDS.items():
            values[name] = field(plain, name, kind, optional=optional)
        losses, notes = field(plain, "restart_losses", list), field(plain, "notes", list)
        errors = field(plain, "mean_errors", list) if "mean_errors" in plain else []
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in errors):
            raise CheckpointError("the saved entry 'mean_errors' must be a list of numbers; the file is damaged.")
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in losses):
            raise CheckpointError("the saved entry 'restart_losses' must be a list of numbers; the file is damaged.")
        if any(not isinstance(v, str) for v in notes):
            raise CheckpointError("the saved entry 'notes' must be a list of texts; the file is damaged.")
        packages = field(plain, "versions", dict)
        if any(not isinstance(v, str) for v in packages.values()):
            raise CheckpointError("the saved entry 'versions' must map names to texts; the file is damaged.")
        if (
            any(v.dim() != 1 or v.dtype != torch.float64 for v in trace.values())
            or len({len(v) for v in trace.values()}) > 1
        ):
            raise CheckpointError("the saved trace must be columns of one length; the file is damaged.")
        return cls(
            **values,
            restart_losses=tuple(float(v) for v in losses),
            mean_errors=tuple(float(v) for v in errors),
            notes=tuple(notes),
            versions=dict(packages),
            trace={key: value.numpy() for key, value in trace.items()},
        )


_FIELDS: dict[str, tuple[type, bool]] = {
    "objective": (str, False),
    "estimator": (str, True),
    "family": (str, False),
    "solver": (str, False),
    "seed": (int, False),
    "steps": (int, False),
    "stop_reason": (str, False),
    "converged": (bool, False),
    "seconds": (float, False),
    "draws_per_step": (int, False),
    "num_restarts": (int, False),
    "best_restart": (int, False),
    "non_finite": (int, False),
    "gradient_snr": (float, True),
    "rhat_iterates": (float, True),
    "mcse_iterates": (float, True),
    "k_hat": (float, True),
    "dropped_per_epoch": (int, False),
}
