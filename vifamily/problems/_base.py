"""What a named problem is: a model, and what is known about its posterior."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ReferenceDataError, ShapeError
from vifamily.models import Model
from vifamily.rng import generator

__all__ = ["NUM_DRAWS", "Kind", "Problem", "Reference", "exact_draws", "indexed"]

Kind = Literal["analytic", "quadrature", "nuts", "published"]

NUM_DRAWS = 2000
"""Reference draws of every problem that has draws."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What is known about a posterior, on the constrained scale.

    Attributes:
        kind: Where it comes from: ``"analytic"`` (closed form), ``"quadrature"`` (numerical integration, exact to at
            least eight digits), ``"nuts"`` (a long Markov chain of ours) or ``"published"`` (somebody else's).
        names: Names of the columns, such as ``"mu"`` or ``"theta[0]"``, counted from 0.
        mean: Posterior means, one per column.
        sd: Posterior standard deviations, one per column.
        draws: Posterior draws ``(num_draws, column)``, close to independent, or None.
        log_evidence: Log of the integral of the joint density as the model gives it, or None when unknown.
        note: How it was made, its accuracy, and the command that makes it again.
        mean_error: Monte-Carlo standard error of ``mean``, or None where the mean is exact.

    Raises:
        ReferenceDataError: If lengths disagree, a value is not finite or a standard deviation is not positive.

    Example:
        >>> import numpy as np
        >>> Reference("analytic", ("x",), np.zeros(1), np.ones(1), None, 0.0, "standard normal").names
        ('x',)
    """

    kind: Kind
    names: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    draws: np.ndarray | None = None
    log_evidence: float | None = None
    note: str = ""
    mean_error: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ReferenceDataError(f"a reference is one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        size = len(self.names)
        if len(set(self.names)) != size or size == 0:
            raise ReferenceDataError(f"a reference needs at least one column and distinct names, got {self.names}.")
        for label in ("mean", "sd", "mean_error"):
            value = getattr(self, label)
            if value is None and label == "mean_error":
                continue
            value = np.asarray(value, dtype=np.float64)
            if value.shape != (size,) or not np.isfinite(value).all():
                raise ReferenceDataError(
                    f"the reference's {label} must be {size} finite numbers, one per name, got shape {value.shape}."
                )
            object.__setattr__(self, label, value)
        if not (self.sd > 0).all():
            raise ReferenceDataError(f"the reference's standard deviations must be positive, got {self.sd}.")
        if self.draws is not None:
            draws = np.asarray(self.draws, dtype=np.float64)
            if draws.ndim != 2 or draws.shape[1] != size or not len(draws) or not np.isfinite(draws).all():
                raise ReferenceDataError(
                    f"the reference's draws must be finite and of shape (draw, {size}), got {draws.shape}."
                )
            object.__setattr__(self, "draws", draws)

    def column(self, name: str) -> int:
        """Return the position of a column.

        Raises:
            ReferenceDataError: If there is no such column.
        """
        if name not in self.names:
            raise ReferenceDataError(f"the reference has no column {name!r}; it has {', '.join(self.names)}.")
        return self.names.index(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model with what is known about its posterior.

    Attributes:
        name: The registered name.
        model: The model.
        reference: What is known, or None.
        description: One or two sentences on what the problem is and what makes it hard.
        quantities: From constrained parameters to the reference's columns ``(draw, column)``, where those are not
            simply the parameters one after the other.
    """

    name: str
    model: Model
    reference: Reference | None
    description: str
    quantities: Callable[[dict[str, Tensor]], Tensor] | None = None

    def columns(self, theta: dict[str, Tensor]) -> Tensor:
        """Return the values that the reference speaks of.

        Args:
            theta: Constrained parameters, name to ``(draw, *shape)``.

        Returns:
            ``(draw, column)``, in the order of ``reference.names``.

        Raises:
            ShapeError: If the number of columns is not the reference's.
        """
        out: Tensor = self.model.layout.flatten(theta) if self.quantities is None else self.quantities(theta)
        if self.reference is not None and out.shape[-1] != len(self.reference.names):
            raise ShapeError(
                f"the problem {self.name!r} gave {out.shape[-1]} columns, "
                f"its reference has {len(self.reference.names)}."
            )
        return out


def exact_draws(name: str, make: Callable[[torch.Generator], Tensor]) -> np.ndarray:
    """Return :data:`NUM_DRAWS` independent draws of a named problem; the same ones at every call.

    Args:
        name: Name of the problem, part of the seed.
        make: From a generator to draws ``(NUM_DRAWS, column)``.
    """
    return make(generator(0, f"reference/{name}")).numpy()


def indexed(name: str, size: int) -> tuple[str, ...]:
    """Return ``name[0], ..., name[size - 1]``."""
    return tuple(f"{name}[{i}]" for i in range(size))
