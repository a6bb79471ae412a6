"""Pyro's automatic guides, turned into the families they describe."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.families._base import Family, FamilyEntry
from vifamily.families._foreign import load
from vifamily.families._pyro_guide import arguments_of, private_store
from vifamily.families.ensemble import Ensemble
from vifamily.families.full_rank import FullRank
from vifamily.families.low_rank import LowRank
from vifamily.families.mean_field import MeanField
from vifamily.rng import scoped
from vifamily.types import Capability, LatentSpec

__all__ = ["ConvertedGuide", "convert_autoguide", "is_autoguide"]

_SUPPORTED = "AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta"


@dataclasses.dataclass(frozen=True)
class ConvertedGuide(FamilyEntry):
    """A Gaussian (or point) family that starts with the parameters of an automatic guide.

    The guide is read, never trained: what is fitted is the family.

    Args:
        guide: The guide.
        model: The Pyro model, for the order of its sites.
        inner: The entry of the family.
    """

    guide: Any = dataclasses.field(repr=False)
    model: Any = dataclasses.field(repr=False)
    inner: FamilyEntry
    given = True

    def __post_init__(self) -> None:
        """Take over what the family can do."""
        object.__setattr__(self, "capabilities", self.inner.capabilities - {Capability.CONDITIONAL})
        object.__setattr__(self, "restrict_scale", self.inner.restrict_scale)

    def build(self, latent: LatentSpec, *, generator: torch.Generator) -> Family:
        """Build the family at the guide's parameters, setting the guide up first where it never ran."""
        self.check_space(latent)
        family: Any = self.inner.build(latent, generator=generator)
        with private_store(keep=True), scoped(generator), torch.no_grad():
            if self.guide.prototype_trace is None:
                args, kwargs = arguments_of(self.model)
                self.guide(*args, **kwargs)
            _start(family, self.guide, self.model)
        built: Family = family
        return built


def is_autoguide(obj: Any) -> bool:
    """Whether an object is one of Pyro's automatic guides."""
    return any(base.__module__.startswith("pyro.infer.autoguide") for base in type(obj).__mro__)


def convert_autoguide(guide: Any, model: Any) -> FamilyEntry:
    """Return the entry of the family that an automatic guide describes.

    Raises:
        ConfigError: If the guide's class is not one of those that have a counterpart.
    """
    guides = load("pyro.infer.autoguide")
    inner: FamilyEntry
    if isinstance(guide, guides.AutoMultivariateNormal):
        inner = FullRank()
    elif isinstance(guide, guides.AutoLowRankMultivariateNormal):
        # Pyro's own default for the rank, which it fills in only when the guide first runs
        inner = LowRank(rank=guide.rank or max(1, round(model.layout.dim**0.5)))
    elif isinstance(guide, (guides.AutoNormal, guides.AutoDiagonalNormal)):
        inner = MeanField()
    elif type(guide) is guides.AutoDelta:
        inner = Ensemble(size=1)
    else:
        raise ConfigError(
            f"{type(guide).__name__} has no counterpart among the families; those that have are {_SUPPORTED}. "
            "For a flow, use family='flow(kind=maf)'."
        )
    return ConvertedGuide(guide, model, inner)


def _start(family: Any, guide: Any, model: Any) -> None:
    """Copy the parameters of a guide that has been set up."""
    guides = load("pyro.infer.autoguide")
    layout = model.layout
    sites = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    if set(sites) != set(layout.names):
        raise ConfigError(
            f"the guide covers the sites {sorted(sites)}, but the model has {sorted(layout.names)}: "
            "build the guide from the same model."
        )
    if type(guide) is guides.AutoDelta:
        point = layout.unconstrain({k: v.to(family.shift) for k, v in guide.median().items()})
        family.start_at(point, torch.ones_like(point))
        family.points.copy_(point.expand_as(family.points))
        return
    if isinstance(guide, guides.AutoNormal):
        pairs = {name: guide._get_loc_and_scale(name) for name in layout.names}
        loc = torch.cat([pairs[name][0].reshape(-1) for name in layout.names]).to(family.shift)
        sd = torch.cat([pairs[name][1].reshape(-1) for name in layout.names]).to(family.shift)
        family.start_at(loc, sd)
        return
    order = _positions(sites, layout)
    loc, scale = guide.loc[order].to(family.shift), guide.scale.to(family.shift)
    if isinstance(guide, guides.AutoMultivariateNormal):
        factor = (scale[:, None] * guide.scale_tril.to(scale))[order]
        family.start_at(loc, torch.linalg.cholesky(factor @ factor.mT))
    elif isinstance(guide, guides.AutoLowRankMultivariateNormal):
        family.loc.copy_(loc)
        family.log_diagonal.copy_(scale[order].log())
        family.factor.copy_(guide.cov_factor[order])
    else:
        family.start_at(loc, scale[order])


def _positions(sites: list[str], layout: Any) -> Tensor:
    """Where each coordinate of the layout sits in a guide's latent vector."""
    starts, place = {}, 0
    for name in sites:
        starts[name] = place
        place += layout[name].size
    parts = [torch.arange(starts[name], starts[name] + layout[name].size) for name in layout.names]
    return torch.cat(parts)
