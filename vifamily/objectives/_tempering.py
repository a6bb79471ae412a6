"""Objectives made of another one that sees a tempered target."""

from __future__ import annotations

import abc
import copy
import dataclasses
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vifamily.errors import ConfigError, IncompatibleError, SpecError
from vifamily.objectives._base import Objective
from vifamily.registry import Spec, build, entry_name
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike, Space

__all__ = ["PARTS", "Compound", "TemperedModel", "packed", "unpacked"]

PARTS = ("joint", "likelihood")
_TAKEN_OVER = (
    "needs_family", "spaces", "value_kind", "subsampling", "value_gradient", "blind_to_mode_weights", "freezes_model",
    "invariant_to_constants", "targets_posterior", "min_draws", "default_draws",
)  # fmt: skip


class TemperedModel:
    """A model with its log joint, or its log likelihood alone, multiplied by a number.

    Args:
        model: The model.
        beta: The number, the inverse of a temperature.
        part: ``"joint"`` or ``"likelihood"``.
    """

    def __init__(self, model: Any, beta: float, part: str) -> None:
        self._model, self._beta, self._part = model, beta, part
        self.capabilities = seen(frozenset(model.capabilities), part)

    def log_joint(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Tempered log joint."""
        joint: Tensor = self._model.log_joint(z, batch)
        if self._part == "joint":
            return self._beta * joint
        prior: Tensor = self._model.log_prior(z)
        return prior + self._beta * (joint - prior)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log prior, tempered where the joint is."""
        prior: Tensor = self._model.log_prior(z)
        return self._beta * prior if self._part == "joint" else prior

    def log_likelihood(self, z: Tensor, batch: Batch | None = None) -> Tensor:
        """Tempered log likelihood per datum."""
        out: Tensor = self._beta * self._model.log_likelihood(z, batch)
        return out

    def log_local(self, z: Tensor, local: Tensor, batch: Batch) -> Tensor:
        """Tempered log of local prior times likelihood per datum."""
        out: Tensor = self._beta * self._model.log_local(z, local, batch)
        return out

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on."""
        return getattr(self._model, name)


def seen(capabilities: frozenset[Capability], part: str) -> frozenset[Capability]:
    """What a tempered model can do: a Gaussian prior to a power is not a Gaussian prior with its normaliser."""
    return capabilities - {Capability.GAUSSIAN_PRIOR} if part == "joint" else capabilities


@dataclasses.dataclass(frozen=True)
class Compound(Objective):
    """What ``annealed`` and ``tempered`` share; a subclass has the fields ``of``, ``part`` and ``estimator``."""

    needs_family: ClassVar[frozenset[Capability]] = frozenset()

    def __post_init__(self) -> None:
        fields: Any = self
        given, part, asked = fields.of, fields.part, fields.estimator
        if part not in PARTS:
            raise SpecError(f"part must be one of {', '.join(PARTS)}, got {part!r}.")
        of = build("objectives", given) if isinstance(given, (str, Spec)) else given
        if not isinstance(of, Objective):
            raise ConfigError(f"of must be an objective such as 'elbo' or Elbo(), got {type(given).__name__}.")
        if of.own_solver is not None or callable(getattr(of, "critic", None)):
            raise IncompatibleError(
                f"{entry_name(self)!r} cannot be made of {entry_name(of)!r}, which is more than the descent of a loss. "
                "Use for example 'elbo' or 'renyi(alpha=0.5)'.",
                missing=("an objective that is the descent of a loss",),
            )
        own = getattr(of, "estimator", "auto")
        estimators = of.estimators if own == "auto" else {own: of.estimators[own]}
        inner = of
        if asked != "auto" and asked in estimators:
            inner = dataclasses.replace(of, estimator=asked)  # type: ignore[call-arg]
        object.__setattr__(self, "of", of)
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "estimators", estimators)
        object.__setattr__(
            self, "needs_model", of.needs_model | ({Capability.PRIOR} if part == "likelihood" else frozenset())
        )
        for name in _TAKEN_OVER:
            object.__setattr__(self, name, getattr(of, name))
        super().__post_init__()

    @property
    def inner(self) -> Objective:
        """The objective that sees the tempered target, its estimator chosen where this one's is."""
        out: Objective = self.__dict__["_inner"]
        return out

    @property
    def linear_in_draws(self) -> bool:
        """As of the objective it is made of."""
        return self.inner.linear_in_draws

    @property
    def renyi_order(self) -> float | tuple[float, float] | None:
        """As of the objective it is made of."""
        return self.inner.renyi_order

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the objective it is made of."""
        return self.inner.notes

    def missing(
        self, model: frozenset[Capability], family: frozenset[Capability], space: Space = Space.REAL
    ) -> tuple[str, ...]:
        """Return what a pair lacks, in words (see :class:`Objective`)."""
        part: str = getattr(self, "part", "joint")
        if part == "likelihood" and Capability.LOCAL in model:
            return (f"model: no {Capability.LOCAL} (their prior and likelihood come as one: use part=joint)",)
        return super().missing(seen(model, part), family, space)

    def _estimator(self, model: frozenset[Capability], family: frozenset[Capability]) -> str | None:
        return super()._estimator(seen(model, getattr(self, "part", "joint")), family)

    def for_fixed_draws(self, solver: str) -> Self:
        """Return this objective with what the one it is made of may do on fixed draws (see :class:`Objective`)."""
        inner = self.inner.for_fixed_draws(solver)
        out = copy.copy(self)
        object.__setattr__(out, "_inner", inner)
        object.__setattr__(out, "estimators", inner.estimators)
        return out

    @abc.abstractmethod
    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the loss (see :class:`Objective`)."""

    def _tempered_loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None, state: Any, beta: float
    ) -> Loss:
        tempered: Any = TemperedModel(model, beta, getattr(self, "part", "joint"))
        loss = self.inner.loss(family, tempered, noise, batch, state)
        return dataclasses.replace(loss, terms={**loss.terms, "inverse_temperature": torch.full_like(loss.value, beta)})


def packed(step: int, state: Tensor | None, restarts: tuple[int, ...] = ()) -> Tensor:
    """Write a step and a state as one vector, so that it is kept with a checkpoint like any other state.

    Args:
        step: The step.
        state: A state whose leading axis is that of the restarts, where there are several.
        restarts: Their number as a shape.

    Returns:
        ``([restart,] number)``: each row is what one restart alone would have.
    """
    if state is None:
        return torch.full((*restarts, 1), float(step), dtype=torch.float64)
    own = state.shape[len(restarts) :]
    head = torch.tensor([float(step), float(len(own)), *map(float, own)], dtype=torch.float64, device=state.device)
    values = state.detach().reshape((*restarts, -1)).double()
    return torch.cat([head.expand(*restarts, head.numel()), values], -1)


def unpacked(vector: Tensor) -> tuple[int, Tensor | None]:
    """Read what :func:`packed` wrote."""
    row = vector.reshape(-1, vector.shape[-1])[0]
    step = int(row[0])
    if row.numel() == 1:
        return step, None
    axes = int(row[1])
    shape = [int(n) for n in row[2 : 2 + axes].tolist()]
    return step, vector[..., 2 + axes :].reshape((*vector.shape[:-1], *shape))
