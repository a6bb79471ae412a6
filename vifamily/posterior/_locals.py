"""Draws of the latents of single data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError
from vifamily.families.local import LocalFamily
from vifamily.models._base import Model
from vifamily.rng import draw_noise
from vifamily.types import Draw

__all__ = ["sample_local"]


def sample_local(
    family: Any, model: Model, num_draws: int, index: Sequence[int] | Tensor | None, source: torch.Generator
) -> dict[str, Tensor]:
    """Draw the global latents and, with each, the local latents of some data; see ``Posterior.sample_local``."""
    if not isinstance(family, LocalFamily) or model.local_layout is None:
        raise NotAvailableError("this posterior has no local latents: sample() gives everything there is.")
    if index is None:
        index = torch.arange(model.num_data or 0)
    positions = torch.as_tensor(index, dtype=torch.long).reshape(-1)
    if not len(positions) or int(positions.min()) < 0 or int(positions.max()) >= (model.num_data or 0):
        raise ConfigError(
            f"index must name positions from 0 to {(model.num_data or 0) - 1}, got {positions.tolist()[:5]}."
        )
    batch = model.batch_at(positions)
    latent = family.latent
    noise = draw_noise(family.noise_spec, (num_draws,), source, dtype=latent.dtype, device=latent.device)
    spec, shape = family.local_noise_spec, (num_draws, batch.size)
    local_noise = draw_noise(spec, shape, source, dtype=latent.dtype, device=latent.device)
    draw: Draw = family.draw_local(family(noise), local_noise, batch)
    if draw.local is None:
        raise NotAvailableError("the family gave no local draws.")
    return {**model.constrain(draw.z), **model.local_layout.constrain(draw.local)}
