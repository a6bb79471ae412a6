"""An amortised family at many data at once: one family beside each datum."""

from __future__ import annotations

import torch
from torch import Tensor

from vifamily.errors import NotAvailableError
from vifamily.posterior.amortised._family import LOST, AmortisedFamily
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["FamilyAtData"]


class FamilyAtData:
    """An amortised family at each of several data, which stand in the place of restarts.

    Objectives take several families along a leading axis; here these are the distributions at data ``x``, which one
    network puts out. So every objective that needs a log joint is one of the amortised family as well: its loss is one
    number for each datum.

    Args:
        module: Encoder and conditional family.
        x: Data ``(datum, *shape)``.
    """

    def __init__(self, module: AmortisedFamily, x: Tensor) -> None:
        self.module, self.family, self.size = module, module.family, len(x)
        self.context = module.encode(x)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the family can do at data: no closed-form moments."""
        return (self.family.capabilities - LOST) | {Capability.CONDITIONAL}

    @property
    def restart_shape(self) -> tuple[int, ...]:
        """The leading axis of noise, draws and losses: the data."""
        return (self.size,)

    @property
    def noise_spec(self) -> NoiseSpec:
        """Base noise of one draw."""
        return self.family.noise_spec

    @property
    def latent(self) -> LatentSpec:
        """What is covered."""
        return self.family.latent

    def at(self, x: Tensor) -> FamilyAtData:
        """The same networks at other data."""
        return FamilyAtData(self.module, x)

    def __call__(self, noise: Tensor, context: Tensor | None = None) -> Draw:
        """Map noise ``(datum, draw, *noise_spec.shape)`` to draws ``(datum, draw, dim)``."""
        _no_context(context)
        draw = self.family(noise.transpose(0, 1), self.context)
        log_q = None if draw.log_q is None else draw.log_q.transpose(0, 1)
        log_weight = draw.log_weight.transpose(0, 1) if draw.log_weight.dim() > 1 else draw.log_weight
        return Draw(draw.z.transpose(0, 1), log_q, log_weight)

    def log_prob(self, z: Tensor, context: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Log density at points ``(datum, ..., dim)``, ``(datum, ...)``."""
        _no_context(context)
        at = self.context.detach() if frozen else self.context
        return self.family.log_prob(z.movedim(0, -2), at, frozen=frozen).movedim(-1, 0)

    def entropy(self, context: Tensor | None = None) -> Tensor:
        """Closed-form entropy at each datum, ``(datum,)``."""
        _no_context(context)
        # a law whose spread does not depend on its context has one entropy for all
        return self.family.entropy(self.context) + torch.zeros_like(self.context[:, 0])


def _no_context(context: Tensor | None) -> None:
    if context is not None:
        raise NotAvailableError("the family is at its data already: give no context.")
