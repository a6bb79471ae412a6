"""What every objective is: a loss of (family, model, noise, batch), and what it needs of both.

An objective is a frozen dataclass marked with ``@register("objectives", name)``. Draw axes are reduced with
``dim=-1`` (``dim=-2`` under a datum axis), so that the same code serves one fit and many restarts at once.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vifamily.errors import IncompatibleError, SpecError
from vifamily.registry import entry_name
from vifamily.types import Batch, Capability, Draw, FamilyLike, Loss, ModelLike, Space

__all__ = ["Estimator", "Objective", "log_ratio_parts", "restart_shape", "weighted_sum"]

ValueKind = Literal["lower_bound", "upper_bound", "divergence", "surrogate", "none"]
Caps = frozenset[Capability]


@dataclasses.dataclass(frozen=True, slots=True)
class Estimator:
    """When a gradient estimator may be used.

    Attributes:
        model: What it needs of the model.
        family: What it needs of the family.
        never_model: What the model must not have.
        never_family: What the family must not have.
        unless_asked: Reasons for which ``"auto"`` passes it over though it is allowed: capabilities that the family or
            the model should have.
        value_gradient: Whether the surrogate's gradient is that of the value on the same noise, so that a solver may
            minimise the value on fixed draws; not so for score functions and for estimators that hold a density fixed.
        unbiased: Whether its mean is the gradient of the value's mean for every number of draws. Where not, the
            difference vanishes as draws grow, and the contract kit checks that.
    """

    model: Caps = frozenset()
    family: Caps = frozenset()
    never_model: Caps = frozenset()
    never_family: Caps = frozenset()
    unless_asked: Caps = frozenset()
    value_gradient: bool = True
    unbiased: bool = True

    def lacks(self, model: Caps, family: Caps) -> tuple[str, ...]:
        """Return what stands in the way, in words."""
        return (
            *(f"model: {c}" for c in sorted(self.model - model)),
            *(f"family: {c}" for c in sorted(self.family - family)),
            *(f"model: no {c}" for c in sorted(self.never_model & model)),
            *(f"family: no {c}" for c in sorted(self.never_family & family)),
        )


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """A loss to be minimised.

    Class attributes say what it needs and what it is; they are read before the first step, by ``vifamily list``,
    the docs and the contract kit. An objective with several gradient estimators has a field ``estimator`` that is
    ``"auto"`` or the name of one.
    """

    needs_model: ClassVar[Caps] = frozenset({Capability.LOG_JOINT})
    needs_family: ClassVar[Caps] = frozenset()
    never_model: ClassVar[Caps] = frozenset()
    """What the model must not have, for every estimator: local latents, say, where the log joint is taken whole."""
    estimators: ClassVar[Mapping[str, Estimator]] = {}
    """Gradient estimators, best first; ``"auto"`` takes the first that fits."""
    spaces: ClassVar[frozenset[Space]] = frozenset(Space)
    value_kind: ClassVar[ValueKind] = "surrogate"
    """What the value is. Of a lower bound on the log evidence it is the negative, an upper bound is minimised as it
    stands; a divergence is zero at the posterior; a surrogate orders answers without being any of these; none means
    that the number says nothing."""
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    """Whether a minibatch gives an unbiased loss; ``per_datum``: only where every latent is local."""
    value_gradient: ClassVar[bool] = False
    """Of an objective without estimators: see :attr:`Estimator.value_gradient`."""
    blind_to_mode_weights: ClassVar[bool] = False
    """Whether posteriors that differ in the weights of separate modes alone look the same to it."""
    freezes_model: ClassVar[bool] = False
    """Whether the model's own parameters stay as they are: a match of scores can be faked by moving the target."""
    bias: ClassVar[str | None] = None
    """What a finite number of draws does to the answer, a clause that plans show (``{draws}`` stands for the draws per
    step); empty for nothing. None: plans call biased what weighs by ratios and is not linear in its draws, and what is
    declared ``biased_at_posterior``."""
    by_pairs: ClassVar[bool] = False
    """Whether a simulator's pairs are all that it needs of one, beside what it needs of other models."""
    inclusive: ClassVar[bool] = False
    """Whether it stands for ``KL(p || q)``, so that a Gaussian q ends at the mean and the (marginal) variances of p."""
    biased_at_posterior: ClassVar[bool] = False
    """Whether on finitely many draws its mean gradient does not vanish at the posterior, but shrinks as draws are
    added."""
    invariant_to_constants: ClassVar[bool] = True
    """Whether a constant added to the log joint leaves the gradient as it is. Where not, the objective takes the log
    joint to be normalised, or to be so by a log evidence that it was told."""
    targets_posterior: ClassVar[bool] = True
    """Whether with many draws it is least at the posterior, where the family contains it."""
    state_by_row: ClassVar[bool] = False
    """Whether its state is a tensor with a row for each restart that is nobody else's business, so that the data of an
    amortised fit may stand in the place of restarts. Rows may grow at the first step; new numbers are then zero in
    those that were not there."""
    own_solver: ClassVar[str | None] = None
    """Name of the only solver that can drive it (closed-form updates, particle flows), or None for gradient descent."""

    @property
    def pairs_alone(self) -> bool:
        """Whether on a simulator it learns from simulated pairs alone, and evaluates no log joint."""
        both = self.needs_model & {Capability.SIMULATE, Capability.LOG_JOINT}
        return self.by_pairs or both == {Capability.SIMULATE}

    @property
    def linear_in_draws(self) -> bool:
        """Whether the loss is a plain mean over draws, so that balanced noise leaves it unbiased."""
        return False

    @property
    def noise_per_datum(self) -> bool:
        """Whether each datum of a step has noise of its own: ``draws`` times the size of the batch rows of it."""
        return False

    @property
    def renyi_order(self) -> float | tuple[float, float] | None:
        """Order alpha of the Rényi divergence ``D_alpha(q || p)`` that the loss stands for with many draws, or None.

        Reverse KL is of order 1. A pair is a range of orders between which its answers lie; None says that it is of
        another kind. The contract kit checks what is stated on a target that q does not contain.
        """
        return None

    @property
    def weighs_by_ratio(self) -> bool:
        """Whether draws of q are weighed by powers of p / q, so that few of them carry the gradient in many dimensions.

        Unless an entry says otherwise: where both log densities are needed, the order is not 1, and it is no match of
        scores, which is blind to the weights of modes.
        """
        both = Capability.LOG_JOINT in self.needs_model and Capability.LOG_Q in self.needs_family
        return both and not self.blind_to_mode_weights and self.renyi_order != 1

    @property
    def warmup_steps(self) -> int:
        """Steps during which the loss is still on its way to what it stands for; no fit counts as converged before."""
        return 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the choice made, in words; shown with the plan and kept in the record."""
        return ()

    @property
    def predictive_order(self) -> float | None:
        """Order alpha of the per-datum Rényi objective that the loss stands for with many draws and data, or None.

        The contract kit checks what is stated on data that are more spread out than the model says.
        """
        return None

    min_draws: ClassVar[int] = 1
    default_draws: ClassVar[int] = 16

    def __post_init__(self) -> None:
        asked = getattr(self, "estimator", "auto")
        if asked != "auto" and asked not in self.estimators:
            raise SpecError(
                f"{entry_name(self)!r} has no estimator {asked!r}; it has: {', '.join(['auto', *self.estimators])}."
            )

    def missing(self, model: Caps, family: Caps, space: Space = Space.REAL) -> tuple[str, ...]:
        """Return what a pair lacks, in words; empty when the objective can run on it."""
        out = [f"model: {c}" for c in sorted(self.needs_model - model)]
        out += [f"family: {c}" for c in sorted(self.needs_family - family)]
        out += [f"model: no {c}" for c in sorted(self.never_model & model)]
        if space not in self.spaces:
            out.append(f"space: {space} is not one of {', '.join(sorted(self.spaces))}")
        if not out and self.estimators and self._estimator(model, family) is None:
            asked = getattr(self, "estimator", "auto")
            options = self.estimators if asked == "auto" else {asked: self.estimators[asked]}
            reasons = [list(e.lacks(model, family)) for e in options.values()]
            fewest = min(reasons, key=len)
            out += fewest
        return tuple(out)

    def resolve(self, model: ModelLike, family: FamilyLike) -> Self:
        """Return this objective with its estimator chosen.

        Raises:
            IncompatibleError: Naming the missing capabilities.
        """
        of_model, of_family = frozenset(model.capabilities), frozenset(family.capabilities)
        lacking = self.missing(of_model, of_family, getattr(model, "space", Space.REAL))
        if lacking:
            raise IncompatibleError(f"the objective {entry_name(self)!r} needs {'; '.join(lacking)}.", missing=lacking)
        if not self.estimators:
            return self
        return dataclasses.replace(self, estimator=self._estimator(of_model, of_family))  # type: ignore[call-arg]

    def on_quadrature(self) -> Self:
        """Return this objective for draws that are the nodes of a quadrature rule, not a sample.

        The same in most cases; a statistic that leaves out the pairs of a draw with itself keeps them here.
        """
        return self

    def for_shared_noise(self, solver: str) -> Self:
        """Return this objective without estimators that take a draw for every datum; the same in most cases.

        Args:
            solver: Name of the solver that asks, for the message.

        Raises:
            IncompatibleError: If such an estimator was asked for.
        """
        if self.noise_per_datum:
            raise IncompatibleError(
                f"the solver {solver!r} takes one draw for all data, and this {entry_name(self)!r} one for each: use "
                "estimator='auto', or solver='adam'.",
                missing=("an estimator with a draw for all data",),
            )
        shared = {name: e for name, e in self.estimators.items() if Capability.EXAMPLE_NOISE not in e.model}
        if len(shared) == len(self.estimators):
            return self
        out = copy.copy(self)
        object.__setattr__(out, "estimators", shared)
        return out

    def for_fixed_draws(self, solver: str) -> Self:
        """Return this objective with only the estimators that follow the value on fixed draws.

        Args:
            solver: Name of the solver that asks, for the message.

        Raises:
            IncompatibleError: If none does, or the one asked for does not.
        """
        asked = getattr(self, "estimator", "auto")
        following = {name: e for name, e in self.estimators.items() if e.value_gradient}
        if asked in following or (asked == "auto" and following) or (not self.estimators and self.value_gradient):
            out = copy.copy(self)
            object.__setattr__(out, "estimators", following)
            return out
        what = f"the estimator {asked!r} of" if asked != "auto" else "the objective"
        other = f"one of {', '.join(['auto', *following])}, or " if following else ""
        raise IncompatibleError(
            f"the solver {solver!r} minimises a value on fixed draws, and the gradient of {what} {entry_name(self)!r} "
            f"is not that of its value there: use {other}solver='adam'.",
            missing=("a gradient of the value on fixed draws",),
        )

    def _estimator(self, model: Caps, family: Caps) -> str | None:
        asked = getattr(self, "estimator", "auto")
        fitting = [n for n, e in self.estimators.items() if asked in ("auto", n) and not e.lacks(model, family)]
        cheap = [n for n in fitting if self.estimators[n].unless_asked <= family | model]
        return next(iter(cheap or fitting), None)

    def init_state(self, model: ModelLike, family: FamilyLike, *, generator: torch.Generator) -> Any:
        """Return what :meth:`loss` receives as ``state`` at the first step.

        A tensor is checkpointed. For several families at once (see ``restart_shape`` of a stack) it has the restart
        axis first, and its rows are what each would carry alone.
        """
        return None

    def after_warmup(self, state: Any) -> Any:
        """Return the state that :meth:`init_state` gave as it would be after :attr:`warmup_steps` steps."""
        return state

    @abc.abstractmethod
    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the loss.

        Args:
            family: The family, or several stacked along a leading restart axis.
            model: The model.
            noise: ``([restart,] draw, *noise_spec.shape)``.
            batch: The data to use, or None for all.
            state: What the last call returned as state, or :meth:`init_state`.

        Returns:
            Surrogate, value and terms.
        """


def restart_shape(family: FamilyLike) -> tuple[int, ...]:
    """Leading axis of a stack of families, ``(restart,)``; ``()`` for one family."""
    return tuple(getattr(family, "restart_shape", ()))


def weighted_sum(log_weight: Tensor, value: Tensor) -> Tensor:
    """Weighted mean over the draw axis, ``(..., draw) -> (...)``."""
    return (log_weight.exp() * value).sum(-1)


def log_ratio_parts(
    model: ModelLike, draw: Draw, batch: Batch | None
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Log joint of draws, log density of their local part, and the named parts.

    Args:
        model: Any model with a log joint.
        draw: Draws of the family, with local latents where the model has them.
        batch: The data to use, or None for all.

    Returns:
        The log joint ``(..., draw)`` with the likelihood scaled to the whole data set; the log density of the local
        draws, scaled likewise, or None; the parts of the log joint by name.
    """
    if draw.local is not None and draw.local_log_q is not None and batch is not None:
        scale = model.scale(batch)
        prior = model.log_prior(draw.z)
        local = scale * model.log_local(draw.z, draw.local, batch).sum(-1)
        return prior + local, scale * draw.local_log_q.sum(-1), {"log_prior": prior, "log_local": local}
    if Capability.PER_DATUM in model.capabilities and Capability.PRIOR in model.capabilities:
        prior = model.log_prior(draw.z)
        likelihood = model.scale(batch) * model.log_likelihood(draw.z, batch).sum(-1)
        return prior + likelihood, None, {"log_prior": prior, "log_likelihood": likelihood}
    joint = model.log_joint(draw.z, batch)
    return joint, None, {"log_joint": joint}
