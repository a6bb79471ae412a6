"""The likelihood of draws that belong to several fits: each fit's own law for its own draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vifamily.models._likelihoods import Likelihood

__all__ = ["MixedLikelihood"]


class MixedLikelihood(Likelihood):
    """Laws of one class, each for the draws of one fit; outputs hold the draws of all fits, one after another.

    Args:
        laws: The law of each fit, which has parameters of its own.
        sizes: How many draws each fit has.
    """

    def __init__(self, laws: Sequence[Likelihood], sizes: Sequence[int]) -> None:
        super().__init__()
        self._laws, self._sizes = tuple(laws), list(sizes)
        self.kind, self.output_axes = laws[0].kind, laws[0].output_axes

    @property
    def name(self) -> str:
        """That of each law."""
        return self._laws[0].name

    def event_shape(self, out: torch.Size) -> torch.Size:
        """Shape of one datum, the same under all laws."""
        return [law.event_shape(out) for law in self._laws][0]

    def check_values(self, y: Tensor) -> None:
        """Check that every law can give such data."""
        for law in self._laws:
            law.check_values(y)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log density of each datum, ``(draw, datum)``."""
        return self._apart(outputs, lambda law, part: law.log_prob(part, y))

    @property
    def samples(self) -> bool:
        """Whether all laws draw."""
        return all(law.samples for law in self._laws)

    def sample(self, outputs: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw one datum for each draw and input."""
        return self._apart(outputs, lambda law, part: law.sample(part, generator=generator))

    def mean(self, outputs: Tensor) -> Tensor:
        """Mean of a datum under each draw."""
        return self._apart(outputs, lambda law, part: law.mean(part))

    def variance(self, outputs: Tensor) -> Tensor:
        """Variance of a datum under each draw."""
        return self._apart(outputs, lambda law, part: law.variance(part))

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """Distribution function at ``y``; None if one of the laws has none."""
        found = [law.cdf(part, y) for law, part in self._with(outputs)]
        known = [values for values in found if values is not None]
        return torch.cat(known) if len(known) == len(found) else None

    def _with(self, outputs: Tensor) -> list[tuple[Likelihood, Tensor]]:
        """Each law with the outputs of its own draws."""
        return list(zip(self._laws, outputs.split(self._sizes), strict=True))

    def _apart(self, outputs: Tensor, of: Callable[[Likelihood, Tensor], Tensor]) -> Tensor:
        return torch.cat([of(law, part) for law, part in self._with(outputs)])
