"""Sequential inference at one observation, by truncating the prior to where the posterior may be."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.models import Simulations, Simulator
from vifamily.models._data import as_numbers
from vifamily.posterior._posterior import Posterior
from vifamily.posterior.amortised._family import ConditionedFamily
from vifamily.posterior.amortised._fit import fit_amortised
from vifamily.posterior.amortised._posterior import AmortisedPosterior
from vifamily.rng import check_seed, generator, split

__all__ = ["truncated"]

_REGION_DRAWS = 10_000
_PROPOSALS = 10_000
_MOST_PROPOSALS = 2_000_000


@dataclasses.dataclass(frozen=True)
class _Region:
    """Where the log density of a posterior is above a level."""

    family: ConditionedFamily
    threshold: float

    @classmethod
    def of(cls, posterior: AmortisedPosterior, x: Tensor, level: float, source: torch.Generator) -> _Region:
        family = posterior.family.at(x)
        with torch.no_grad():
            values = family.log_prob(family.sample(_REGION_DRAWS, generator=source))
        return cls(family, float(values.double().quantile(level)))

    @torch.no_grad()
    def holds(self, z: Tensor) -> Tensor:
        return self.family.log_prob(z) >= self.threshold


def truncated(
    simulator: Simulator,
    x: Any,
    family: Any = "auto",
    objective: Any = "inclusive_kl",
    *,
    rounds: int = 3,
    simulations: int = 1000,
    level: float = 1e-4,
    seed: int = 0,
    **options: Any,
) -> Posterior:
    r"""Truncated sequential neural posterior estimation: spend simulations where the posterior of one observation is.

    After each round the prior is truncated to the region of highest density that holds ``1 - level`` of the posterior
    at ``x`` found so far, and simulations are drawn from there. Within that region the truncated prior is proportional
    to the prior, so the next fit needs no correction and its target does not change,

    .. math:: \tilde p(\theta) \propto p(\theta)\, 1[q(\theta \mid x_o) > \tau], \qquad
              \text{loss} = -\mathbb{E}_{\tilde p(\theta) p(x \mid \theta)} \log q(\theta \mid x).

    Regions are nested, and earlier simulations inside the newest one are kept: they are draws of the same law.

    Args:
        simulator: The simulator; simulations it carries are not used.
        x: The observation.
        family: A conditional family with a density; ``"auto"`` takes a neural spline flow.
        objective: ``inclusive_kl``, with options.
        rounds: Rounds, the first from the whole prior.
        simulations: New simulations of each round.
        level: Share of the posterior that may be cut off in each round.
        seed: Root seed.
        **options: As for :func:`fit_amortised`: ``encoder``, ``steps``, ``progress``, and so on.

    Returns:
        The posterior at ``x``; the notes of its record say what was accepted in each round. It holds at ``x`` alone.

    Raises:
        ConfigError: If a number is out of range.
        ShapeError: If the observation has another shape than the simulations.

    Source: M. Deistler, P. Goncalves and J. Macke (2022), "Truncated proposals for scalable and hassle-free
    simulation-based inference", algorithm 1.
    """
    for name, value, least in (("rounds", rounds, 1), ("simulations", simulations, 20)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
    if isinstance(level, bool) or not isinstance(level, float) or not 0 < level < 0.5:
        raise ConfigError(f"level must be a share between 0 and one half, got {level!r}.")
    check_seed(seed)
    observed, regions, notes = as_numbers(x, "an observation"), list[_Region](), list[str]()
    pairs = simulator.simulations(simulations, seed=split(seed, "truncated simulations"))
    posterior = _fitted(simulator, pairs, family, objective, seed, 0, options)
    for index in range(1, rounds):
        source = generator(seed, "truncated round", index)
        regions.append(_Region.of(posterior, observed, level, source))
        z, share = _from_prior(simulator, regions, simulations, source)
        notes.append(f"round {index + 1}: {share:.2%} of the prior accepted")
        if len(z) < simulations:
            notes.append(f"warning: too little of the prior was left after {index} round(s): ended there")
            break
        inside = regions[-1].holds(simulator.unconstrained(pairs.theta))
        kept = Simulations(pairs.theta[inside], pairs.x[inside], pairs.non_finite)
        theta = simulator.constrain(z)
        new = Simulations.of(simulator.layout.flatten(theta), simulator.simulate(theta, generator=source))
        pairs = Simulations.join([kept, new])
        posterior = _fitted(simulator, pairs, family, objective, seed, index, options)
    record = dataclasses.replace(posterior.record, notes=(*posterior.record.notes, *notes))
    out = posterior(observed)
    out.record = record
    return out


def _fitted(
    simulator: Simulator, pairs: Simulations, family: Any, objective: Any, seed: int, index: int, options: Any
) -> AmortisedPosterior:
    return fit_amortised(
        simulator.with_simulations(pairs), family, objective, seed=split(seed, "truncated fit", index), **options
    )


def _from_prior(
    simulator: Simulator, regions: list[_Region], num: int, source: torch.Generator
) -> tuple[Tensor, float]:
    """Draw from the prior inside all regions by rejection; fewer than asked where hardly any are inside."""
    found: list[Tensor] = []
    tried = accepted = 0
    while accepted < num and tried < _MOST_PROPOSALS:
        z = simulator.sample_prior(_PROPOSALS, generator=source)
        for region in reversed(regions):
            z = z[region.holds(z)]
        found.append(z)
        tried, accepted = tried + _PROPOSALS, accepted + len(z)
    return torch.cat(found)[:num], accepted / tried
