"""What an amortised fit goes on from: a posterior of the same parameters, with the family that it has."""

from __future__ import annotations

from typing import Any

from vifamily import registry
from vifamily.errors import ConfigError
from vifamily.families import FamilyEntry
from vifamily.models import Simulator
from vifamily.plan import describe
from vifamily.posterior.amortised._posterior import AmortisedPosterior

__all__ = ["checked_init", "entry_of"]


def checked_init(init: Any, simulator: Simulator) -> AmortisedPosterior | None:
    """The posterior to go on from, or None for a start of its own."""
    if isinstance(init, str) and init == "auto":
        return None
    if not isinstance(init, AmortisedPosterior):
        raise ConfigError("init of an amortised fit is 'auto', or an amortised posterior to go on from.")
    if init.layout != simulator.layout:
        raise ConfigError("init is an amortised posterior of other parameters than this simulator's.")
    if init.family.latent.dtype != simulator.dtype:
        raise ConfigError(
            f"init has networks in {init.family.latent.dtype} and the simulator gives {simulator.dtype}: "
            "give the simulator the same dtype=."
        )
    return init


def entry_of(init: AmortisedPosterior | None, entry: FamilyEntry, *, chosen: bool) -> FamilyEntry:
    """The family of the fit: that of the posterior it goes on from, where it was not chosen to be another."""
    given = None if init is None else init.family.family.spec
    if given is None or given == describe(entry):
        return entry
    if chosen:
        raise ConfigError(
            f"init is a {given} and goes on as one, but the family asked for is {describe(entry)}: leave family out."
        )
    found: FamilyEntry = registry.build("families", given)
    return found
