"""Objectives that compare draws of q with reference draws, pair by pair."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.objectives._base import Estimator, Objective, ValueKind, weighted_sum
from vifamily.objectives._reference import check_part, first_state, reference_part, reference_sd, remembered
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["Paired", "standardised", "thinned"]

_PATH = frozenset({Capability.REPARAMETERISED})
_MOST_PAIRED = 2000


def standardised(model: ModelLike, points: Tensor, *, standardise: bool) -> Tensor:
    """Return points with each coordinate in units of its standard deviation over all reference draws, if asked."""
    return points / reference_sd(model) if standardise else points


@dataclasses.dataclass(frozen=True)
class Paired(Objective):
    """A squared distance ``E c(z, z') + E c(y, y') - 2 E c(z, y)`` for a similarity ``c``, z of q and y of p.

    Subclasses give :meth:`similarity` and the fields ``standardise`` and ``reference_batch``. Its estimators:
    ``points``, where the family is its points and weights, so that sums over all pairs are exact; ``pairs``, where
    draws are independent and the mean over pairs of different draws is unbiased. Strata are not independent, hence the
    exclusion.
    """

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.REFERENCE_DRAWS})
    never_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOCAL})
    needs_family: ClassVar[frozenset[Capability]] = _PATH
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "points": Estimator(family=_PATH | {Capability.FINITE}, never_family=frozenset({Capability.LOG_Q})),
        "pairs": Estimator(family=_PATH, never_family=frozenset({Capability.WEIGHTED})),
    }
    value_kind: ClassVar[ValueKind] = "divergence"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 64

    def __post_init__(self) -> None:
        own: Any = self
        check_part(own.reference_batch)
        if not isinstance(own.standardise, bool):
            raise ConfigError(f"standardise must be True or False, got {own.standardise!r}.")
        super().__post_init__()

    @abc.abstractmethod
    def similarity(self, x: Tensor, y: Tensor, model: ModelLike) -> Tensor:
        """Similarity between all pairs, ``(..., n, dim), (..., m, dim) -> (..., n, m)``."""

    def on_quadrature(self) -> Self:
        """Return this objective with sums over all pairs, which are exact for the nodes and weights of a rule."""
        return dataclasses.replace(self, estimator="points")  # type: ignore[call-arg]

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Tensor | None:
        """Count steps where the reference draws take turns."""
        own: Any = self
        self._reference(model)
        return first_state(model, family, own.reference_batch)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the squared distance (see :class:`Objective`)."""
        own: Any = self
        draw = family(noise)
        part, after = reference_part(model, own.reference_batch, state)
        z = standardised(model, draw.z, standardise=own.standardise)
        y = standardised(model, part, standardise=own.standardise)
        across = -2 * weighted_sum(draw.log_weight, self.similarity(z, y, model).mean(-1))
        within = self._within(self.similarity(z, z, model), draw.log_weight)
        value = across + within + self._reference(model)
        return Loss(value, value.detach(), {"across": across.detach(), "within": within.detach()}, after)

    def _within(self, values: Tensor, log_weight: Tensor) -> Tensor:
        own: Any = self
        if own.estimator == "points":
            weight = log_weight.exp()
            return (weight.unsqueeze(-1) * weight.unsqueeze(-2) * values).sum((-1, -2))
        count = values.shape[-1]
        return (values.sum((-1, -2)) - values.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count * (count - 1))

    def _reference(self, model: ModelLike) -> float:
        """Mean similarity of two different reference draws: q has no part in it, so it is computed once."""
        own: Any = self

        def compute() -> float:
            y = standardised(model, thinned(model.reference_draws, _MOST_PAIRED), standardise=own.standardise)
            values, count = self.similarity(y, y, model), y.shape[0]
            return float((values.sum() - values.diagonal().sum()) / (count * (count - 1)))

        what = dataclasses.replace(self, estimator="auto", reference_batch=None)  # type: ignore[call-arg]
        return remembered(model.reference_draws, what, compute)


def thinned(draws: Tensor, most: int) -> Tensor:
    """At most so many of the draws, evenly spaced in their order."""
    return draws[:: -(-draws.shape[0] // most)]
