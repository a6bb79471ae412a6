"""Prior and posterior predictive checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vifamily.diagnostics._tables import render
from vifamily.errors import ShapeError

__all__ = ["PredictiveCheck", "predictive_check"]

Statistic = Callable[[Mapping[str, Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class PredictiveCheck:
    """A statistic of the observed data among those of replicated data.

    Attributes:
        observed: The statistic of the observed data.
        replicated: The statistic of each replicated data set, ``(draw,)``.
        p_value: ``P(T(y_rep) >= T(y))``, ties counted half.
        p_value_error: Its Monte-Carlo standard error.
        kind: ``"posterior"`` or ``"prior"``.
    """

    observed: float
    replicated: Tensor
    p_value: float
    p_value_error: float
    kind: str = "posterior"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "kind": self.kind,
            "observed": self.observed,
            "replicated_mean": float(self.replicated.mean()),
            "replicated_sd": float(self.replicated.std()),
            "p_value": self.p_value,
            "p_value_error": self.p_value_error,
        }

    def __str__(self) -> str:
        """Return the figures as a table."""
        rows = [
            ("observed", f"{self.observed:.4g}"),
            ("replicated", f"{float(self.replicated.mean()):.4g} (sd {float(self.replicated.std()):.3g})"),
            ("p-value", f"{self.p_value:.3f} ± {self.p_value_error:.3f}"),
        ]
        note = ""
        if not 0.025 <= self.p_value <= 0.975:
            note = f"The model's {self.kind} predictive seldom gives data with this statistic: it misses this feature."
        return render(f"{self.kind} predictive check", ("figure", "value"), rows, note)


def predictive_check(
    statistic: Statistic, replicated: Mapping[str, Tensor], observed: Mapping[str, Tensor], *, kind: str = "posterior"
) -> PredictiveCheck:
    """Compare a statistic of the observed data with that of replicated data (Gelman, Meng and Stern 1996).

    Args:
        statistic: From a data set (name to tensor, without a draw axis) to a number.
        replicated: Replicated data, name to ``(draw, ...)``.
        observed: Observed data under the same names; what is not replicated (inputs) is the same in every data set.
        kind: What the replications are draws of, ``"posterior"`` or ``"prior"``.

    Returns:
        The two-sided picture: the observed statistic, the replicated ones, and the upper tail probability. A p-value
        near 0 or 1 means the model misses the feature; it is not uniform under the model (the data are used twice),
        and values near one half say little.

    Raises:
        ShapeError: If no name is shared, there are no draws, or the statistic does not give one number.

    Example:
        >>> rep = {"y": torch.randn(200, 50, generator=torch.Generator().manual_seed(0))}
        >>> predictive_check(lambda data: data["y"].max(), rep, {"y": torch.full((50,), 9.0)}).p_value
        0.0
    """
    if not set(observed) & set(replicated):
        raise ShapeError(
            f"replicated data ({', '.join(replicated) or 'none'}) and observed data ({', '.join(observed) or 'none'}) "
            "share no name: nothing to compare."
        )
    sizes = {value.shape[0] if value.dim() else 0 for value in replicated.values()}
    if len(sizes) != 1 or not (size := sizes.pop()):
        raise ShapeError("every replicated tensor must have the same, positive number of draws along its first axis.")
    target = _number(statistic, observed)
    values = torch.tensor(
        [_number(statistic, {**observed, **{k: v[s] for k, v in replicated.items()}}) for s in range(size)],
        dtype=torch.float64,
    )
    p = float((values > target).double().mean() + 0.5 * (values == target).double().mean())
    return PredictiveCheck(target, values, p, math.sqrt(p * (1 - p) / size), kind)


def _number(statistic: Statistic, data: Mapping[str, Tensor]) -> float:
    value = torch.as_tensor(statistic(data))
    if value.numel() != 1:
        raise ShapeError(f"the statistic must give one number per data set, got shape {tuple(value.shape)}.")
    return float(value)
