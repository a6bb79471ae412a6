"""A model at one point, as the functions that a stability analysis asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics._stability_units import Labelled
from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.types import Batch, Capability

__all__ = ["ModelUnits"]


class ModelUnits:
    """The log likelihoods of a model's data at one point, and what else can be asked of the model there.

    Args:
        model: A model with a log likelihood per datum.
        z: The point, ``(dim,)``.
        batch: Data to use, or None for the model's own.

    Raises:
        NotAvailableError: If the model has no log likelihood per datum.
        ShapeError: If the point has another shape.
    """

    def __init__(self, model: Any, z: Tensor, batch: Batch | None) -> None:
        if Capability.PER_DATUM not in model.capabilities:
            raise NotAvailableError(
                f"stability needs {Capability.PER_DATUM}, which {type(model).__name__} does not give: write the model "
                "as LikelihoodModel, or use unit_stability with a function of your own."
            )
        if z.shape != (model.dim,):
            raise ShapeError(f"the point must have shape ({model.dim},), got {tuple(z.shape)}.")
        self.model, self.batch = model, batch
        self.point = z.detach().clone().requires_grad_()
        self.labels = tuple(model.layout.unconstrained_columns())

    def log_likelihood(self) -> Tensor:
        """Log likelihood of each datum at the point."""
        return self._under(self.batch)()

    def _under(self, batch: Batch | None) -> Callable[[], Tensor]:
        def function() -> Tensor:
            out: Tensor = self.model.log_likelihood(self.point[None], batch)
            return out[0]

        return function

    def units(self, name: str) -> Tensor | None:
        """Return the unit of each datum, or None where each is its own."""
        if name not in ("datum", "group"):
            raise ConfigError(f"units must be 'datum', 'group' or the unit of each datum, got {name!r}.")
        if name == "datum":
            return None
        group: Tensor = self.model.groups_of(self.batch)[0]
        return group

    # -- labels of the model -------------------------------------------------------------------------------------------
    def _data(self) -> tuple[Any, int]:
        source = getattr(self.model, "source", None)
        if self.batch is not None:
            return self.batch.data, self.batch.size
        if source is None:
            raise NotAvailableError(
                f"the data of {type(self.model).__name__} cannot be given other labels: use curvature='hessian', or "
                "unit_stability with labelled=."
            )
        return source.whole(), int(self.model.num_data)

    def _relabelled(self, labels: Mapping[str, Tensor]) -> Batch:
        data, size = self._data()
        if isinstance(data, Mapping):
            unknown = [name for name in labels if name not in data]
            if unknown:
                raise ConfigError(f"the model simulates {unknown}, which its data do not name.")
            return Batch({**data, **labels}, size)
        (label,) = labels.values()
        return Batch((*data[:-1], label) if isinstance(data, (tuple, list)) else label, size)

    def drawn(self, num_draws: int, generator: torch.Generator | None) -> list[Labelled]:
        """Log likelihoods under labels drawn from the model."""
        if generator is None:
            raise ConfigError("labels drawn from the model need generator=; or give label_values=.")
        if self.batch is not None:
            raise NotAvailableError("a model simulates its own data only: for a batch, give label_values=.")
        if isinstance(num_draws, bool) or not isinstance(num_draws, int) or num_draws < 1:
            raise ConfigError(f"num_label_draws must be a positive integer, got {num_draws!r}.")
        with torch.no_grad():
            drawn = self.model.predictive(self.point.detach().expand(num_draws, -1), generator=generator)
        return [
            Labelled(self._under(self._relabelled({name: value[r] for name, value in drawn.items()})))
            for r in range(num_draws)
        ]

    def enumerated(self, values: Sequence[float]) -> list[Labelled]:
        """Log likelihoods under each value of a label, with its probability."""
        data, size = self._data()
        last = data[-1] if isinstance(data, (tuple, list)) else data
        name, label = self._only(data if isinstance(data, Mapping) else {"y": last})
        if label.shape != (size,):
            raise NotAvailableError(f"label_values= needs one label per datum, got {name!r} of {tuple(label.shape)}.")
        out = []
        for value in values:
            function = self._under(self._relabelled({name: torch.full_like(label, value)}))
            with torch.no_grad():
                out.append(Labelled(function, function().exp()))
        return out

    @staticmethod
    def _only(named: Mapping[str, Tensor]) -> tuple[str, Tensor]:
        if "y" in named:
            return "y", named["y"]
        if len(named) == 1:
            return next(iter(named.items()))
        raise NotAvailableError(f"label_values= needs to know which of {sorted(named)} is the label: call it 'y'.")

    # -- the rest ------------------------------------------------------------------------------------------------------
    def split(
        self, outputs: Callable[[Any, Any], Tensor], log_likelihood_of: Callable[[Tensor, Any], Tensor]
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """Outputs at the point, and from outputs to log likelihoods."""
        data, _ = self._data()
        named = getattr(self.model, "_named", True)

        def at_point() -> Tensor:
            z = self.point[None]
            return outputs(self.model.constrain(z) if named else z, data)[0]

        return at_point, lambda found: log_likelihood_of(found, data)

    def prior_precision(self, num_units: int | None) -> Tensor:
        """Precision of the model's normal prior over the number of units, ``(dim,)``."""
        if Capability.GAUSSIAN_PRIOR not in self.model.capabilities:
            raise NotAvailableError(
                "prior_precision='model' needs a normal prior: give LikelihoodModel((mean, sd), ...)."
            )
        _, sd = self.model.gaussian_prior()
        count = num_units or len(self.log_likelihood())
        out: Tensor = sd**-2 / count
        return out
