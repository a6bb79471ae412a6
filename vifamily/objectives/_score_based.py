"""What objectives share that compare scores: what they need, and what they leave alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from vifamily.objectives._base import Objective, ValueKind
from vifamily.types import Capability, Space

__all__ = ["ScoreBased"]

Caps = frozenset[Capability]


class ScoreBased(Objective):
    """An objective that sees the posterior through its score alone.

    Its reparameterised gradient differentiates the score, so the log joint must be twice differentiable: with networks
    of rectified linear units inside, second derivatives are zero almost everywhere and the gradient is wrong without
    any sign of it.
    """

    needs_model: ClassVar[Caps] = frozenset({Capability.LOG_JOINT, Capability.SCORE, Capability.SECOND_ORDER})
    spaces: ClassVar[frozenset[Space]] = frozenset({Space.REAL})
    value_kind: ClassVar[ValueKind] = "divergence"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    value_gradient: ClassVar[bool] = True
    blind_to_mode_weights: ClassVar[bool] = True
    freezes_model: ClassVar[bool] = True
    never_family: ClassVar[Caps] = frozenset()
    """What the family must not have."""

    def missing(self, model: Caps, family: Caps, space: Space = Space.REAL) -> tuple[str, ...]:
        """Return what a pair lacks, in words (see :class:`Objective`); local latents have no score here."""
        out = super().missing(model, family, space)
        more = [f"model: no {Capability.LOCAL}"] if Capability.LOCAL in model else []
        return (*out, *more, *(f"family: no {c}" for c in sorted(self.never_family & family)))
