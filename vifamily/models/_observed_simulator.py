"""A simulator at one observation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vifamily.errors import DataError, NotAvailableError
from vifamily.models._base import Model, check_result
from vifamily.models._data import as_numbers
from vifamily.types import Batch, Capability

if TYPE_CHECKING:
    from vifamily.models.simulator import Simulator

__all__ = ["ObservedSimulator"]


class ObservedSimulator(Model):
    """A simulator at one observation, an ordinary model.

    Args:
        simulator: The simulator.
        x: The observation.

    Raises:
        DataError: If the observation is not finite.
    """

    def __init__(self, simulator: Simulator, x: Any) -> None:
        super().__init__(simulator.layout, dtype=simulator.dtype, device=simulator.device)
        self.space, self.num_categories = simulator.space, simulator.num_categories
        self.simulator, self.x = simulator, as_numbers(x, "an observation").detach().to("cpu", simulator.dtype)
        if not bool(self.x.isfinite().all()):
            raise DataError("the observation has numbers that are not finite.")
        capabilities = (simulator.capabilities | {Capability.PREDICTIVE}) - {Capability.SIMULATE}
        if simulator.log_likelihood_function is not None and Capability.PRIOR in simulator.capabilities:
            capabilities |= {Capability.LOG_JOINT}
            if self.num_categories is None:
                capabilities |= {Capability.SCORE, Capability.SECOND_ORDER}
        self.capabilities = frozenset(capabilities)

    def _log_prior(self, z: Tensor) -> Tensor:
        return self.simulator._log_prior(z)

    def _log_joint(self, z: Tensor, batch: Batch | None) -> Tensor:
        function = self.simulator.log_likelihood_function
        if function is None or Capability.PRIOR not in self.capabilities:
            raise NotAvailableError(
                "the log joint needs a likelihood and the density of the prior: give the simulator log_likelihood=, "
                "and a prior with log_prob."
            )
        theta = self.layout.constrain(z)
        argument: Any = theta if self.simulator.prior.named else next(iter(theta.values()))
        out = function(argument, self.x.to(z))
        check_result("log_likelihood", out, (z.shape[0],), z)
        return out + self._log_prior(z)

    def sample_prior(self, num_draws: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the prior on unconstrained space, ``(num_draws, dim)``."""
        return self.simulator.sample_prior(num_draws, generator=generator)

    def predictive(self, z: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Simulate one data set for each point, ``x`` ``(draw, *shape)``."""
        return {"x": self.simulator.simulate(self.constrain(z.cpu()), generator=generator)}

    def observed(self) -> dict[str, Tensor]:
        """Return the observation as ``x``."""
        return {"x": self.x}

    def with_observed(self, data: Mapping[str, Tensor]) -> Model:
        """Return the model of another observation ``x``."""
        return ObservedSimulator(self.simulator, self._checked_observed(data)["x"])
