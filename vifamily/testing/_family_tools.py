"""How the contracts of families build families and draw from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vifamily.errors import NotAvailableError
from vifamily.families import Family, FamilyEntry
from vifamily.rng import draw_noise
from vifamily.testing._report import Broken, NotApplicable
from vifamily.testing._tools import seeded
from vifamily.types import Capability, Draw, LatentSpec, Space

__all__ = ["DRAWS", "FamilyTools", "refuses", "works_or_refuses"]

_SPACES = {
    Space.REAL: LatentSpec(2),
    Space.CIRCLE: LatentSpec(2, space=Space.CIRCLE),
    Space.SIMPLEX: LatentSpec(3, space=Space.SIMPLEX),
    Space.DISCRETE: LatentSpec(2, space=Space.DISCRETE, num_categories=(2, 3)),
}
DRAWS = 5


class FamilyTools:
    """Builds families of one entry, away from where they start.

    Args:
        entry: The entry.
    """

    def __init__(self, entry: FamilyEntry) -> None:
        self.entry = entry

    # -- building ------------------------------------------------------------------------------------------------------
    def latent(self, **changes: Any) -> LatentSpec:

        base = _SPACES[self.entry.space]
        given = getattr(getattr(self.entry, "family", None), "latent", None)
        return dataclasses.replace(base if given is None else given, **changes)

    def build(self, *, seed: int = 0, by: float = 0.2, mapped: bool = True, **changes: Any) -> Family:
        """Build, move away from the start, and set an affine map that is not the identity."""
        family = self.entry.build(self.latent(**changes), generator=seeded(seed))
        generator = seeded(seed + 1)
        with torch.no_grad():
            for parameter in family.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                # weights of networks are moved less, the wider the layer: densities stay smooth enough for a grid
                parameter.add_(by * noise / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0))
        if mapped and family.latent.space is Space.REAL:
            dim = family.dim
            scale = 0.3 * torch.tril(torch.ones(dim, dim, dtype=torch.float64), -1)
            scale = scale + torch.diag(torch.linspace(0.7, 1.3, dim, dtype=torch.float64))
            family.precondition(torch.linspace(-0.4, 0.6, dim, dtype=torch.float64), scale)
        return family

    def draw(self, family: Family, rows: int = DRAWS, *, seed: int = 3) -> Draw:
        out: Draw = family(draw_noise(family.noise_spec, (rows,), seeded(seed), dtype=family.latent.dtype))
        return out

    def has(self, family: Family, capability: Capability) -> bool:
        return capability in family.capabilities

    def need_density(self, family: Family) -> None:
        if not self.has(family, Capability.LOG_Q):
            raise NotApplicable("it has no density")


def works_or_refuses(family: Family, capability: Capability, works: Any) -> None:
    """Check that a call gives finite numbers where the capability is declared, and is refused where it is not."""
    if capability in family.capabilities:
        if not bool(torch.isfinite(works()).all()):
            raise Broken(
                got=f"a {capability!s} that is not finite", expected=f"a finite {capability!s}, since it is declared"
            )
        return
    refuses(works, f"{capability!s} without declaring it")


def refuses(call: Any, what: str) -> None:
    """Check that a call is refused as not available."""
    try:
        call()
    except NotAvailableError:
        return
    raise Broken(got=f"{what}", expected="NotAvailableError")
