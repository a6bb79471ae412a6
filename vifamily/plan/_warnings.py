"""What a plan warns of: read off what objective, model and family declare, so that no entry is named here."""

from __future__ import annotations

from collections.abc import Iterator

from vifamily.families import Family
from vifamily.models import Model
from vifamily.objectives import Estimator, Objective
from vifamily.types import Capability

__all__ = ["MANY_DIMENSIONS", "chosen_estimator", "warnings_of"]

MANY_DIMENSIONS = 20
"""Coordinates above which weights by density ratios leave little signal in a gradient."""

_SEVERAL_PLACES = frozenset({Capability.WEIGHTED, Capability.FINITE, Capability.PARTICLES})


def chosen_estimator(objective: Objective) -> Estimator | None:
    """The estimator that an objective will use; None where there is no choice, or none is made yet."""
    return objective.estimators.get(getattr(objective, "estimator", ""))


def warnings_of(
    objective: Objective, model: Model, family: Family, *, draws: int, batch_size: int | None
) -> tuple[str, ...]:
    """Return what should be known before a fit that can run, in sentences.

    Args:
        objective: The objective, its estimator chosen.
        model: The model.
        family: The family, built.
        draws: Draws per step.
        batch_size: Data per step, or None for all.
    """
    of_family = frozenset(family.capabilities)
    return (
        *_blindness(objective, of_family),
        *_ratios(objective, model.dim),
        *_few_draws(objective, draws),
        *_batches(objective, batch_size),
        *_cost(objective, of_family | model.capabilities),
        *_curvature(objective),
        *_value(objective),
    )


def _blindness(objective: Objective, family: frozenset[Capability]) -> Iterator[str]:
    if not objective.blind_to_mode_weights:
        return
    held = "" if not family & _SEVERAL_PLACES else " (of this family's parts, those of the start)"
    yield (
        "blind to the weights of separate modes: posteriors that differ in nothing else look the same to it, so where "
        f"starts lie in several modes the weights between them mean nothing{held}. Look at k-hat, compare restarts, or "
        "refit with elbo from here"
    )


def _ratios(objective: Objective, dim: int) -> Iterator[str]:
    if objective.weighs_by_ratio and dim > MANY_DIMENSIONS:
        yield (
            f"weighs draws by density ratios in {dim} dimensions: away from order 1 the signal of the gradient falls "
            "fast with the dimension. Look at the importance ESS before trusting a posterior that is wider than elbo's"
        )


def _few_draws(objective: Objective, draws: int) -> Iterator[str]:
    estimator = chosen_estimator(objective)
    declared = objective.biased_at_posterior or not (estimator is None or estimator.unbiased)
    if objective.bias is not None:
        yield from [objective.bias.format(draws=draws)] if objective.bias else []
    elif declared or (objective.weighs_by_ratio and not objective.linear_in_draws):
        yield (
            f"biased in the number of draws: what is minimised is an expectation over {draws} draws, which differs "
            "from its limit in many draws by O(1/draws)"
        )
    if objective.value_kind == "upper_bound":
        yield "the value is estimated from draws and lies below the upper bound on average: it certifies nothing"
    if not objective.invariant_to_constants:
        yield (
            "takes the log joint to be normalised: with another constant in it this is another objective. Give the log "
            "evidence where the entry takes one"
        )


def _batches(objective: Objective, batch_size: int | None) -> Iterator[str]:
    if batch_size is not None and objective.subsampling == "biased":
        yield (
            "biased on minibatches: the loss is no sum over data, so the answer depends on batch_size. Compare with "
            "larger batches"
        )


def _cost(objective: Objective, has: frozenset[Capability]) -> Iterator[str]:
    estimator = chosen_estimator(objective)
    lacking = frozenset() if estimator is None else estimator.unless_asked - has
    if lacking:
        yield (
            f"the estimator {getattr(objective, 'estimator', '')} is meant for where there is "
            f"{' and '.join(sorted(lacking))}, which there is not here: each step costs many times as much"
        )


def _curvature(objective: Objective) -> Iterator[str]:
    estimator = chosen_estimator(objective)
    needs = objective.needs_model | (frozenset() if estimator is None else estimator.model)
    if Capability.SECOND_ORDER in needs:
        yield (
            "takes second derivatives of the log joint, which are zero almost everywhere where it goes through ReLU or "
            "other piecewise linear functions: use smooth ones there (a plan cannot see inside the model)"
        )


def _value(objective: Objective) -> Iterator[str]:
    if objective.value_kind == "none":
        yield (
            "has no value that orders answers: neither the loss nor the choice among restarts by it says anything. "
            "Fits end by their parameters' settling; judge them by the diagnosis"
        )
