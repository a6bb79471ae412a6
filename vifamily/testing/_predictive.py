"""The contract of per-datum Rényi objectives: a known spread on data that are more spread out than the model says."""

from __future__ import annotations

import math
from typing import Any

import torch

from vifamily import registry
from vifamily.testing import targets, tolerances
from vifamily.testing._report import Broken, NotApplicable
from vifamily.testing._tools import descend, grid_noise, seeded
from vifamily.types import LatentSpec

__all__ = ["check_predictive"]


def check_predictive(objective: Any) -> None:
    """A descent with many draws ends at the Gaussian that is best for the stated ``predictive_order``."""
    alpha = objective.predictive_order
    if alpha is None:
        raise NotApplicable("it states no predictive_order, so there is no closed form to compare with")
    target = targets.overdispersed()
    family = registry.build("families", "full_rank").build(LatentSpec(1), generator=seeded(0))
    if objective.missing(frozenset(target.model.capabilities), frozenset(family.capabilities), target.model.space):
        raise NotApplicable("it does not run on a full-rank Gaussian with this target")
    wanted = targets.predictive_sd(alpha)
    family.start_at(
        torch.tensor([0.3 * wanted], dtype=torch.float64), torch.tensor([[1.25 * wanted]], dtype=torch.float64)
    )
    resolved = objective.resolve(target.model, family)
    descend(resolved, family, target.model, grid_noise(family.noise_spec, 100), steps=150, rate=0.1)
    mean, covariance = (part.detach() for part in family.moments())
    sd = float(covariance[0, 0].sqrt())
    off = abs(math.log(sd / wanted))
    if not (off < tolerances.MOMENTS and float(mean.abs().max()) < tolerances.MOMENTS * wanted):
        raise Broken(
            got=f"mean {float(mean[0]):.4f}, sd {sd:.4f}",
            expected=f"mean 0, sd {wanted:.4f} (location model of unit noise on data of variance two, alpha {alpha:g})",
        )
