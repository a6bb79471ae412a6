"""An amortised posterior corrected at one observation: importance weights by the likelihood, and a fit where needed."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, NotAvailableError, VifamilyWarning
from vifamily.models import ObservedSimulator
from vifamily.models._data import as_numbers
from vifamily.numerics.psis import FEWEST_DRAWS, Psis, psis
from vifamily.posterior import Posterior
from vifamily.rng import generator, split
from vifamily.types import Capability

if TYPE_CHECKING:
    from vifamily.posterior.amortised._posterior import AmortisedPosterior

__all__ = ["Refined", "refine"]

_POOL = 4000
_OBJECTIVE = "reweighted_wake"


@dataclasses.dataclass(frozen=True)
class Refined:
    """Draws of the exact posterior of one observation, by weights, and what the weights say.

    Attributes:
        sample: Name to draws ``(num_draws, *shape)`` in their supports, chosen by the weights.
        draws: The same draws on unconstrained space, ``(num_draws, dim)``.
        proposals: Points that were weighed, ``(pool, dim)``.
        weights: Their smoothed weights and k-hat.
        k_hat_before: k-hat of the amortised posterior as it was.
        log_evidence: Estimate of the log evidence at the observation.
        log_evidence_error: Its standard error.
        posterior: The posterior that proposed: the amortised one, or the one that was fitted on at the observation.
        tuned: Whether it was fitted on there.
    """

    sample: dict[str, Tensor]
    draws: Tensor
    proposals: Tensor
    weights: Psis
    k_hat_before: float
    log_evidence: float
    log_evidence_error: float
    posterior: Posterior
    tuned: bool

    @property
    def k_hat(self) -> float:
        """Tail index of the weights; see :class:`~vifamily.diagnostics.Psis`."""
        return self.weights.k_hat

    @property
    def ess(self) -> float:
        """Effective number of the weighed points."""
        return self.weights.ess

    @property
    def reliable(self) -> bool:
        """Whether k-hat is at or below its threshold, so that the draws can be trusted."""
        return self.weights.reliable

    def mean(self) -> dict[str, Tensor]:
        """Weighted means of the named parameters."""
        share = self.weights.log_weight.exp()
        named = self.posterior.constrain(self.proposals)
        return {n: torch.tensordot(share.to(v), v, dims=1) for n, v in named.items()}

    def __str__(self) -> str:
        """One sentence."""
        how = f"after a fit at the observation ({self.k_hat_before:.2f} before)" if self.tuned else "as it was"
        said = "reliable" if self.reliable else "not reliable: a few points carry most of the weight"
        return (
            f"k-hat {self.k_hat:.2f} {how}, threshold {self.weights.threshold:.2f}: {said}; {self.ess:.0f} effective "
            f"of {self.weights.num_draws} points, log evidence {self.log_evidence:.3f} +- {self.log_evidence_error:.3f}"
        )


def refine(
    amortised: AmortisedPosterior,
    x: Any,
    num_draws: int = 1000,
    *,
    pool: int | None = None,
    defensive: float = 0.05,
    tune: bool = True,
    steps: int = 500,
    seed: int | None = None,
) -> Refined:
    """See :meth:`AmortisedPosterior.refine`."""
    _check(num_draws, pool, defensive, tune, steps)
    simulator = amortised._require_simulator()
    if simulator.log_likelihood_function is None or Capability.PRIOR not in simulator.capabilities:
        raise NotAvailableError(
            "importance weights need the likelihood and the density of the prior: Simulator(prior, simulate, "
            "log_likelihood=...), and a prior with log_prob."
        )
    root = amortised.record.seed if seed is None else seed
    count = max(4 * num_draws, _POOL) if pool is None else pool
    posterior, tuned = amortised(x), False
    z, weights, ratio = _weighed(posterior, count, defensive, split(root, "refine"))
    before = weights.k_hat
    if not weights.reliable and tune:
        nearer = _fitted_at(amortised, x, steps, split(root, "refine fit"))
        found = _weighed(nearer, count, defensive, split(root, "refine again"))
        # a fit that went astray is not taken over
        if found[1].k_hat < before or found[1].ess > weights.ess:
            posterior, tuned, (z, weights, ratio) = nearer, True, found
    if not bool(weights.log_weight.isfinite().any()):
        raise NotAvailableError("every point has weight zero under the model: there is nothing to choose from.")
    if not weights.reliable:
        warnings.warn(
            f"k-hat {weights.k_hat:.2f} is above {weights.threshold:.2f}: a few points carry most of the weight, so "
            "the refined draws are no better founded than the fit. Take more steps=, a richer family, or "
            "vf.fit(simulator.at(x), ...).",
            VifamilyWarning,
            stacklevel=3,
        )
    chosen = torch.multinomial(weights.log_weight.exp(), num_draws, replacement=True,
                               generator=generator(root, "refine choice"))  # fmt: skip
    draws = z[chosen.to(z.device)]
    evidence, error = _evidence(ratio)
    return Refined(posterior.constrain(draws), draws, z, weights, before, evidence, error, posterior, tuned)


@torch.no_grad()
def _weighed(posterior: Posterior, count: int, defensive: float, seed: int) -> tuple[Tensor, Psis, Tensor]:
    """Points of q and some of the prior, weighed as draws of the mixture of the two."""
    model = posterior.model
    if not isinstance(model, ObservedSimulator):
        raise NotAvailableError("importance weights need the simulator.")
    from_prior = round(defensive * count)
    source = generator(seed, "points")
    z = posterior.family.sample(count - from_prior, generator=source)
    if from_prior:
        z = torch.cat([z, model.sample_prior(from_prior, generator=source).to(z)])
    log_q = posterior.family.log_prob(z).double()
    if from_prior:
        share = from_prior / count
        log_q = torch.logaddexp(log_q + math.log1p(-share), model.log_prior(z).double() + math.log(share))
    ratio = posterior.log_joint_in_chunks(z) - log_q
    return z, psis(ratio), ratio


def _fitted_at(amortised: AmortisedPosterior, x: Any, steps: int, seed: int) -> Posterior:
    """The posterior after steps of the wake phase at the observation, from where the amortised fit ended."""
    from vifamily.posterior.amortised._fit import fit_amortised

    simulator = amortised._require_simulator()
    observed = amortised.family.one(as_numbers(x, "an observation"))
    found = fit_amortised(
        simulator.with_observations(observed), amortised.family.family.spec or "flow", _OBJECTIVE,
        encoder=amortised.family.encoder.net if amortised.encoder_spec is None else amortised.encoder_spec,
        init=amortised, steps=steps, seed=seed, progress=False,
    )  # fmt: skip
    return found(x)


def _evidence(ratio: Tensor) -> tuple[float, float]:
    kept = ratio[ratio.isfinite()]
    top = kept.max()
    weight = (kept - top).exp()
    mean = weight.sum() / len(ratio)
    square = weight.square().sum() / len(ratio)
    error = ((square - mean**2).clamp_min(0) / len(ratio)).sqrt() / mean
    return float(top + mean.log()), float(error)


def _check(num_draws: int, pool: int | None, defensive: float, tune: bool, steps: int) -> None:  # noqa: FBT001
    for name, value, least in (("num_draws", num_draws, 1), ("pool", pool, FEWEST_DRAWS), ("steps", steps, 1)):
        if value is None and name == "pool":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
    if isinstance(defensive, bool) or not isinstance(defensive, (int, float)) or not 0 <= defensive < 1:
        raise ConfigError(f"defensive must be a share from 0 to below 1, got {defensive!r}.")
    if not isinstance(tune, bool):
        raise ConfigError(f"tune must be True or False, got {tune!r}.")
