"""The one implementation behind f-divergences and the arc length: normalisation, estimators, state."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vifamily.errors import SpecError
from vifamily.numerics.f_generators import Generator
from vifamily.objectives._base import Estimator, Objective, ValueKind, restart_shape
from vifamily.objectives._ratio_function import Derivatives, RatioFunction, ratio_estimators, ratio_loss
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["Csiszar", "additive", "self_normalised"]

_MARGIN = 0.1
_MEMORY = 0.95
"""What is kept of the running log evidence from step to step."""


def additive(generator: Generator, log_scale: Tensor | float) -> RatioFunction:
    """The mean of ``f(w / c)`` over draws, with a known scale c."""

    def function(log_ratio: Tensor, log_weight: Tensor) -> Derivatives:
        scale = torch.as_tensor(log_scale).to(log_ratio)
        at = log_ratio - scale.reshape(*scale.shape, *[1] * (log_ratio.dim() - scale.dim()))
        weight = log_weight.exp()
        value, slope = weight * generator.value(at), weight * generator.slope(at)
        bend = slope + weight * generator.curvature(at) if generator.smooth else None
        return Derivatives(value.sum(-1), slope, value, bend)

    return function


def self_normalised(generator: Generator) -> RatioFunction:
    r"""The mean of ``f(u)`` over draws with ``u_k = w_k / sum_j a_j w_j``, and its derivatives.

    With :math:`L = \log \sum_j a_j w_j`, :math:`p_k = a_k u_k` (which sum to one), slopes :math:`s_k = f'(u_k) u_k` and
    their derivatives :math:`t_k = s_k + f''(u_k) u_k^2` in :math:`\log u_k`, means A and B of both:

    .. math:: \partial_k V = a_k s_k - p_k A, \qquad
              \partial_k^2 V = a_k t_k (1 - 2 p_k) - p_k (1 - p_k) A + p_k^2 B.

    So the gradient that follows the value is the plain one with the normaliser differentiated too, and the doubly
    reparameterised one has the weights :math:`-a_k f''(u_k) u_k^2 + 2 a_k p_k t_k - p_k^2 (A + B)`, the first of which
    is all that stays with many draws.
    """

    def function(log_ratio: Tensor, log_weight: Tensor) -> Derivatives:
        at = log_ratio - torch.logsumexp(log_ratio + log_weight, -1, keepdim=True)
        weight, share = log_weight.exp(), (log_weight + at).exp()
        value, slope = weight * generator.value(at), weight * generator.slope(at)
        mean_slope = slope.sum(-1, keepdim=True)
        by_ratio = slope - share * mean_slope
        bend = None
        if generator.smooth:
            turn = slope + weight * generator.curvature(at)
            mean_turn = turn.sum(-1, keepdim=True)
            bend = turn * (1 - 2 * share) - share * (1 - share) * mean_slope + share.square() * mean_turn
        return Derivatives(value.sum(-1), by_ratio, value - share * mean_slope, bend)

    return function


@dataclasses.dataclass(frozen=True)
class Csiszar(Objective):
    """What f-divergences share; a subclass gives :meth:`_generator` and the fields ``normalise`` and ``estimator``."""

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q})
    value_kind: ClassVar[ValueKind] = "divergence"
    _way: ClassVar[str] = "self"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "per_datum"
    estimators: ClassVar[Mapping[str, Estimator]] = ratio_estimators(bend=True, additive=False, model_parameters=False)
    freezes_model: ClassVar[bool] = True
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 16

    def __post_init__(self) -> None:
        asked: Any = getattr(self, "normalise", "auto")
        number = isinstance(asked, (int, float)) and not isinstance(asked, bool) and math.isfinite(asked)
        if not number and asked not in ("auto", "self", "running", "none"):
            raise SpecError(
                f"normalise must be 'auto', 'self', 'running', 'none', or the log evidence as a number, got {asked!r}."
            )
        generator = self._generator()
        if asked == "auto":
            # summed over all states the evidence is exact, and nothing need be carried
            summed = getattr(self, "estimator", "auto") == "enumerated"
            way = "none" if generator.shift_only else "self" if summed else "running"
        else:
            way = asked if isinstance(asked, str) else "known"
        scaled = way in ("none", "known")
        # minus the evidence lower bound, up to a constant
        bound = generator.shift_only and scaled
        for name, value in {
            "_way": way,
            "estimators": ratio_estimators(bend=generator.smooth, additive=scaled, model_parameters=False),
            "invariant_to_constants": generator.shift_only or not scaled,
            "bias": "" if scaled else None,
            "freezes_model": not bound,
            "subsampling": "unbiased" if bound else "per_datum",
            "value_kind": "divergence" if way != "none" else "lower_bound" if bound else "surrogate",
        }.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @abc.abstractmethod
    def _generator(self) -> Generator:
        """The convex function; raises SpecError for options that name none."""

    @property
    def linear_in_draws(self) -> bool:
        """True of the evidence lower bound alone: others would be driven to where q slips between balanced draws."""
        return not self.freezes_model and getattr(self, "estimator", "auto") != "score"

    @property
    def renyi_order(self) -> float | tuple[float, float] | None:
        """The order of the Rényi divergence with the same optimum, or a range of them, where that is known.

        Where p is normalised by draws, the ratio's mean is known slowly (its variance may be infinite where that of the
        divergence is not), so that the order is said with a margin.
        """
        order = self._generator().renyi_order
        if order is None or isinstance(order, tuple) or self._way in ("none", "known"):
            return order
        return order - _MARGIN, order + _MARGIN

    @property
    def notes(self) -> tuple[str, ...]:
        """How p was normalised, and what is minimised in consequence."""
        if self._way in ("none", "known") and self._generator().shift_only:
            return ()
        return {
            "self": (
                "p is normalised by the draws of each step: unless they are all states, what is minimised is biased by "
                "order one over their number",
            ),
            "running": ("p is normalised by the mean ratio of the steps so far, an estimate of the evidence",),
            "none": ("the log joint is taken to be normalised; unless it is, this is not the divergence of its name",),
            "known": ("p is normalised by the log evidence that was given",),
        }[self._way]

    def for_fixed_draws(self, solver: str) -> Self:
        """Return this objective with what may be minimised on fixed draws (see :class:`Objective`).

        On fixed draws of a continuous law an f-divergence is least where q slips between them; summed over all states
        it is what it is.
        """
        out = super().for_fixed_draws(solver)
        if self.freezes_model:
            exact = {name: e for name, e in out.estimators.items() if name == "enumerated"}
            object.__setattr__(out, "estimators", exact)
        return out

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Any:
        """Running log evidence, not a number before the first step; None where nothing is carried."""
        return torch.full(restart_shape(family), math.nan, dtype=torch.float64) if self._way == "running" else None

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the divergence (see :class:`Objective`)."""
        # every datum has an evidence of its own, which no number carried from batch to batch can hold
        way = "self" if self._way == "running" and Capability.LOCAL in model.capabilities else self._way
        estimator: str = getattr(self, "estimator", "auto")
        fresh = way == "running" and (state is None or bool(torch.isnan(state).any()))
        generator = self._generator()
        if way == "self" or fresh:
            function = self_normalised(generator)
        elif way == "running":
            function = additive(generator, state)
        else:
            function = additive(generator, float(getattr(self, "normalise", 0.0)) if way == "known" else 0.0)
        loss, ratio, weight = ratio_loss(family, model, noise, batch, function, estimator, self._terms)
        loss = dataclasses.replace(loss, terms={**loss.terms, **self._value_terms(loss.value)})
        if way != "running":
            return loss
        return dataclasses.replace(loss, state=_remembered(None if fresh else state, ratio, weight))

    def _value_terms(self, value: Tensor) -> Mapping[str, Tensor]:
        """Further terms that are functions of the value."""
        return {}

    def _terms(self, log_ratio: Tensor, log_weight: Tensor) -> Mapping[str, Tensor]:
        normaliser = torch.logsumexp(log_ratio + log_weight, -1)
        share = (log_ratio + log_weight - normaliser.unsqueeze(-1)).exp()
        return {"log_evidence": normaliser, "largest_weight": share.amax(-1)}


def _remembered(state: Tensor | None, log_ratio: Tensor, log_weight: Tensor) -> Tensor:
    """Running log evidence: each step's mean ratio is an unbiased estimate of the evidence, whatever q is."""
    now = torch.logsumexp(log_ratio + log_weight, -1)
    if state is None:
        return now
    return torch.logaddexp(state.to(now) + math.log(_MEMORY), now + math.log1p(-_MEMORY))
