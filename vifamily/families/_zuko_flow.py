"""A flow built by the user with zuko, as a family."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, ShapeError
from vifamily.families._base import Family, FamilyEntry, uniform_log_weight
from vifamily.families._foreign import load
from vifamily.types import Capability, Draw, LatentSpec, NoiseSpec

__all__ = ["ZukoFlow", "is_zuko"]

_CAPABILITIES = frozenset({Capability.DRAWS, Capability.REPARAMETERISED, Capability.LOG_Q, Capability.CHEAP_LOG_Q})


def is_zuko(obj: Any) -> bool:
    """Whether an object's class comes from zuko, or derives from one that does."""
    return any(base.__module__.split(".")[0] == "zuko" for base in type(obj).__mro__)


@dataclasses.dataclass(frozen=True)
class ZukoFlow(FamilyEntry):
    """A zuko flow without context and with a normal base, used with the density it has.

    zuko's transform maps points to the base, so the density takes one pass and a draw inverts it: for autoregressive
    flows one pass per coordinate. (The family ``flow`` runs the same layers the other way round.)

    Args:
        flow: The flow; families built from it are copies.

    Raises:
        ConfigError: If it is not a flow with a normal base.
    """

    flow: Any = dataclasses.field(repr=False)
    capabilities = _CAPABILITIES
    given = True

    def __post_init__(self) -> None:
        """Check that the object is a flow that can be used."""
        lazy = load("zuko.lazy")
        base = getattr(getattr(self.flow, "base", None), "f", None)
        if not isinstance(self.flow, lazy.Flow) or getattr(base, "__name__", "") != "DiagNormal":
            raise ConfigError(
                f"a zuko {type(self.flow).__name__} cannot be used as a family: it must be a zuko flow "
                "(NSF, MAF, NICE ...) with a normal base and no context."
            )

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> ZukoFamily:
        """Build a copy of the flow in the wanted precision."""
        self.check_space(latent)
        size = int(self.flow.base.loc.shape[-1])
        if size != latent.dim:
            raise ShapeError(f"the zuko flow has {size} features, but the model has {latent.dim} latent coordinates.")
        return ZukoFamily(latent, copy.deepcopy(self.flow).to(dtype=latent.dtype, device=latent.device))


class ZukoFamily(Family):
    """The module of :class:`ZukoFlow`.

    Args:
        latent: What is covered.
        flow: zuko's lazy flow.
    """

    capabilities = _CAPABILITIES
    # layers of any kind may be inside, among them some that vmap does not allow
    vectorised = False

    def __init__(self, latent: LatentSpec, flow: Any) -> None:
        super().__init__(latent)
        self.flow = flow
        self.noise_spec = NoiseSpec((latent.dim,))

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise to draws by the inverse of the flow, with the log density from the same pass."""
        self.check_context(context)
        base = self.flow.base.loc + self.flow.base.scale * noise
        u = self.flow.transform(None).inv(base)
        log_q = self.log_density(u, None)
        return Draw(u, log_q, uniform_log_weight(log_q, noise.shape[0]))

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density in one pass."""
        base, log_jacobian = self.flow.transform(None).call_and_ladj(u)
        scale = self.flow.base.scale
        square = ((base - self.flow.base.loc) / scale).square().sum(-1)
        constant = scale.log().sum() + 0.5 * self.dim * math.log(2 * math.pi)
        out: Tensor = log_jacobian - 0.5 * square - constant
        return out
