"""A simulator with a likelihood at many observations at once, one beside each datum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from vifamily.errors import ModelError, NotAvailableError, ShapeError, VifamilyError
from vifamily.models._base import Model, check_result
from vifamily.types import Batch, Capability

if TYPE_CHECKING:
    from vifamily.models.simulator import Simulator

__all__ = ["SimulatorAtData"]

_TRIAL_DATA, _TRIAL_DRAWS = 3, 4
_AGREEMENT = 1e-4


class SimulatorAtData(Model):
    """A simulator at each of several observations: what objectives need that average over data.

    Its points have a leading datum axis, ``(datum, ..., dim)``, in the place of restarts; the log joint at row ``i`` is
    that of observation ``i``.

    A likelihood is written for one observation. Many are evaluated in one call where that gives the same numbers: first
    as rows that belong together, each point with its observation; then by ``torch.vmap`` over the observations; else
    one observation after the other. Which of these it is, is tried on a few points.

    Args:
        simulator: A simulator with a likelihood, and with a prior that has a density.
        x: Observations ``(datum, *shape)``; None for a model that is planned with, not evaluated.

    Raises:
        NotAvailableError: If the simulator has no likelihood, or its prior no density.
    """

    def __init__(self, simulator: Simulator, x: Tensor | None = None) -> None:
        super().__init__(simulator.layout, dtype=simulator.dtype, device=simulator.device)
        if simulator.log_likelihood_function is None or Capability.PRIOR not in simulator.capabilities:
            raise NotAvailableError(
                "the log joint needs a likelihood and the density of the prior: give the simulator log_likelihood=, "
                "and a prior with log_prob."
            )
        self.simulator, self.x = simulator, x
        self.space, self.num_categories = simulator.space, simulator.num_categories
        smooth = frozenset() if simulator.num_categories is not None else frozenset({Capability.SCORE})
        self.capabilities = simulator.capabilities | smooth | {Capability.LOG_JOINT}
        self.way: Literal["paired", "vmap", "each"] | None = None

    def given(self, x: Tensor) -> Self:
        """Take other observations of the same shape; returns itself, which remembers how the likelihood is called."""
        self.x = x.to(self.device, self.dtype)
        return self

    def _log_prior(self, z: Tensor) -> Tensor:
        return self.simulator._log_prior(z)

    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the prior on unconstrained space, ``(num_draws, dim)``."""
        return self.simulator.sample_prior(num_draws, generator=generator)

    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        if self.x is None:
            raise NotAvailableError("there are no observations: give them, model.given(x).")
        if z.shape[0] % len(self.x):
            raise ShapeError(f"points must have an axis of {len(self.x)} observations first, got {z.shape[0]} rows.")
        rows = z.unflatten(0, (len(self.x), -1))
        return self.log_likelihood_at(rows).flatten() + self._log_prior(z)

    def log_likelihood_at(self, z: Tensor) -> Tensor:
        """Log likelihood of each observation at points of its own, ``(datum, draw, dim) -> (datum, draw)``."""
        x = self.x
        if x is None:
            raise NotAvailableError("there are no observations: give them, model.given(x).")
        if len(x) == 1:
            return self._evaluate("each", z, x)
        if self.way is None:
            self.way = self._tried(z.detach(), x)
        return self._evaluate(self.way or "each", z, x)

    # -- ways to call --------------------------------------------------------------------------------------------------
    def _argument(self, z: Tensor) -> Any:
        theta = self.layout.constrain(z)
        return theta if self.simulator.prior.named else next(iter(theta.values()))

    def _call(self, z: Tensor, x: Tensor) -> Tensor:
        function: Any = self.simulator.log_likelihood_function
        try:
            out: Tensor = function(self._argument(z), x)
        except VifamilyError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise ModelError(f"the log likelihood raised: {error}") from error
        return out

    def _evaluate(self, way: str, z: Tensor, x: Tensor) -> Tensor:
        count, draws = z.shape[:2]
        if way == "paired":
            repeated = x.unsqueeze(1).expand(count, draws, *x.shape[1:]).flatten(0, 1)
            out = self._call(z.flatten(0, 1), repeated)
            check_result("log_likelihood", out, (count * draws,), z)
            rows: Tensor = out.unflatten(0, (count, draws))
            return rows
        if way == "vmap":
            mapped: Tensor = torch.vmap(self._call)(z, x)
            return mapped
        parts = [self._call(z[i], x[i]) for i in range(count)]
        for part in parts:
            check_result("log_likelihood", part, (draws,), z)
        return torch.stack(parts)

    @torch.no_grad()
    def _tried(self, z: Tensor, x: Tensor) -> Literal["paired", "vmap", "each"] | None:
        """The first way that gives what one observation at a time gives; None where no number is finite."""
        z, x = z[:_TRIAL_DATA, :_TRIAL_DRAWS], x[:_TRIAL_DATA]
        exact = self._evaluate("each", z, x)
        if not bool(exact.isfinite().any()):
            return None
        ways: tuple[Literal["paired", "vmap"], ...] = ("paired", "vmap")
        for way in ways:
            try:
                found = self._evaluate(way, z, x)
            except (VifamilyError, RuntimeError, ValueError, TypeError):
                continue
            if found.shape == exact.shape and torch.allclose(
                found, exact, rtol=_AGREEMENT, atol=_AGREEMENT, equal_nan=True
            ):
                return way
        return "each"
