"""Where the contracts of objectives are checked: an objective on a target with a family."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from vifamily import registry
from vifamily.families import Family
from vifamily.families.local import LocalFamily
from vifamily.models import Model
from vifamily.objectives import Objective
from vifamily.rng import draw_noise
from vifamily.testing import targets, tolerances
from vifamily.testing._tools import agree, flat_gradient, seeded
from vifamily.types import Batch, LatentSpec, Loss

__all__ = ["Setting", "build_at", "exact_family", "local_family", "moved", "unbiased"]

AnyFamily = TypeVar("AnyFamily", bound=Family)


@dataclasses.dataclass(frozen=True)
class Setting:
    """An objective with its estimator chosen, where it can run."""

    objective: Objective
    target: targets.Target
    family: Family
    estimator: str | None

    def noise(self, draws: int, *, copies: int | None = None, seed: int = 1) -> Tensor:
        leading = (draws,) if copies is None else (copies, draws)
        return draw_noise(self.family.noise_spec, leading, seeded(seed), dtype=self.target.model.dtype)

    def loss(
        self, family: Any, noise: Tensor, model: Any = None, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        model = self.target.model if model is None else model
        state = self.state(family, model) if state is None else state
        return self.objective.loss(family, model, noise, batch, state)

    def state(self, family: Any, model: Any = None) -> Any:
        model = self.target.model if model is None else model
        return self.objective.after_warmup(self.objective.init_state(model, family, generator=seeded(0)))


def build_at(target: targets.Target, spec: str) -> Family:
    """Build a family for a target, a little away from where it starts and from the answer."""
    model = target.model
    latent = LatentSpec(model.dim, model.space, model.num_categories, None, model.dtype, model.device)
    family: Family = registry.build("families", spec).build(latent, generator=seeded(0))
    return moved(family, 0.3, seed=5)


def local_family(model: Model) -> LocalFamily:
    """Build mean field with a table of local parameters, moved away from where it starts."""
    mean_field = registry.build("families", "mean_field")
    shared = mean_field.build(LatentSpec(model.dim), generator=seeded(0))
    family = LocalFamily.from_entries(shared, mean_field, model.local_dim, generator=seeded(0), num_data=model.num_data)
    return moved(family, 0.3, seed=6)


def moved(family: AnyFamily, by: float, *, seed: int) -> AnyFamily:
    """Return a copy with normal noise of sd ``by`` added to every parameter."""
    out, generator = copy.deepcopy(family), seeded(seed)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return out


def exact_family(s: Setting) -> Family:
    """Return a copy of the family set to the exact posterior of the target."""
    family = s.family.copy()
    mean, covariance = s.target.moments()
    family.start_at(mean, torch.linalg.cholesky(covariance))
    return family


def unbiased(parts: list[Loss], whole: Loss, family: Family) -> None:
    """Check that the losses of an epoch's batches, and their gradients, average to those of all data."""
    mean = torch.stack([loss.value for loss in parts]).mean(0)
    agree(mean, whole.value, tolerances.EXACT, "the loss of all data as the mean over an epoch's batches")
    gradient = torch.stack([flat_gradient(loss, family) for loss in parts]).mean(0)
    agree(
        gradient,
        flat_gradient(whole, family),
        tolerances.EXACT,
        "the gradient of all data as the mean over an epoch's batches",
    )
