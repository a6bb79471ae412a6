"""Variational Rényi bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from vifamily.errors import SpecError
from vifamily.objectives._base import Estimator, Objective, ValueKind
from vifamily.objectives._power import ESTIMATORS, power_loss
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["Renyi"]


@register("objectives", "renyi")
@dataclasses.dataclass(frozen=True)
class Renyi(Objective):
    r"""Variational Rényi bound of order alpha (Li and Turner 2016).

    .. math:: \mathcal{L}_\alpha = \frac{1}{1 - \alpha}
              \log \mathbb{E}_q\Big[\Big(\frac{p(x, z)}{q(z)}\Big)^{1 - \alpha}\Big]
              = \log p(x) - D_\alpha(q \,\|\, p(\cdot \mid x)).

    The loss is minus the bound for ``alpha >= 0``, where it bounds the log evidence from below, and the bound itself
    for ``alpha < 0``, where it bounds it from above: there it is the chi upper bound of order ``n = 1 - alpha`` (CUBO,
    Dieng et al. 2017). Maximising an upper bound, as some programs do, drives q away even from a posterior that it
    contains.

    One global ratio per draw. ``alpha`` in (0, 1) lies between inclusive and exclusive KL; the limits are the ELBO at
    1, the importance-weighted bound at 0, the largest log ratio at minus infinity (minimised) and the smallest at
    infinity (maximised). Lower and upper are statements about the exact expectation: the Monte-Carlo value over K draws
    is biased down for alpha < 1 and up for alpha > 1, and what is optimised is its expectation over K draws.

    This is not the per-datum objective ``renyi_predictive``. Here the whole ratio is taken to the power 1 - alpha once,
    and for every alpha the bound is best at the exact posterior; there each datum's likelihood is taken to the power
    alpha, and away from alpha = 0 the optimum is a predictively oriented posterior. Only ``renyi(alpha=1)`` and
    ``renyi_predictive(alpha=0)``, both the ELBO, are the same.

    The gradient's signal falls fast with dimension for alpha away from 1 (Geffner and Domke 2021): above some ten
    dimensions look at the effective sample size before trusting a wider posterior.

    Args:
        alpha: Any real number, or ``inf`` or ``-inf``.
        estimator: ``"auto"``, ``"enumerated"``, ``"dreg"`` (for finite alpha), ``"reparameterised"`` or ``"score"``.

    Raises:
        SpecError: If ``alpha`` is not a number, or there is no such estimator at this alpha.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "renyi(alpha=0.5)")
        Renyi(alpha=0.5, estimator='auto')
    """

    alpha: float = 0.5
    estimator: str = "auto"

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q})
    value_kind: ClassVar[ValueKind] = "lower_bound"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "per_datum"
    estimators: ClassVar[Mapping[str, Estimator]] = ESTIMATORS
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or math.isnan(self.alpha):
            raise SpecError(f"alpha must be a real number or plus or minus infinity, got {self.alpha!r}.")
        if math.isinf(self.alpha):
            object.__setattr__(self, "estimators", {n: e for n, e in ESTIMATORS.items() if n != "dreg"})
        super().__post_init__()
        if self.alpha < 0:
            object.__setattr__(self, "value_kind", "upper_bound")

    @property
    def renyi_order(self) -> float:
        """The order, alpha itself."""
        return float(self.alpha)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate minus the bound (see :class:`Objective`)."""
        return power_loss(family, model, noise, batch, alpha=float(self.alpha), estimator=self.estimator)
