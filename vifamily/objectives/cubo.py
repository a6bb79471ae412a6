"""Chi upper bounds on the log evidence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.objectives._base import Estimator, Objective, ValueKind
from vifamily.objectives._power import ESTIMATORS, power_loss
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["Cubo"]


@register("objectives", "cubo")
@dataclasses.dataclass(frozen=True)
class Cubo(Objective):
    r"""Chi upper bound of order n on the log evidence: minimises ``D_n(p || q)``, the order n being above 1.

    .. math:: \mathrm{CUBO}_n = \frac1n \log \mathbb{E}_q\Big[\Big(\frac{p(x, z)}{q(z)}\Big)^n\Big]
              = \log p(x) + \frac{n - 1}{n} D_n(p(\cdot \mid x) \,\|\, q) \;\ge\; \log p(x), \qquad n > 1.

    Minimised, by the plain path gradient, the doubly reparameterised one (that of ``renyi`` at order 1 - n, with
    coefficients :math:`(1 - n) v_k + n v_k^2`) or the score function. It is ``renyi(alpha=1 - n)`` under its own name:
    a q that is too narrow anywhere is punished, so the answer covers the posterior and is wider than its marginals
    where the family does not contain it. Beside the ELBO it brackets the log evidence from above.

    **Bias.** An upper bound of the exact expectation only: over K draws the logarithm is biased low, so that the value
    printed is no certificate. Near the posterior, to second order in its distance, the loss over K draws is
    :math:`\tfrac12 (n - 1 - n / K)` times the variance of the log ratio: it has its minimum there only for
    :math:`K > n / (n - 1)`, and fewer draws are refused.

    **Blind to.** How far q reaches beyond the posterior: too wide a q costs little.

    **Fails when.** Dimensions are many: the ratios to the power n have so heavy a tail that a few draws decide, the
    value over K draws is far below the bound and the gradient mostly noise. Above some ten dimensions look at the
    effective sample size. At n = 1 the bound is the log evidence whatever q is, which is why n = 1 is refused.

    Source: Dieng, Tran, Ranganath, Paisley and Blei (2017), "Variational inference via chi upper bound minimization",
    section 2; the doubly reparameterised gradient after Tucker et al. (2019).

    Args:
        n: Order of the bound, any finite number above 1.
        estimator: ``"auto"``, ``"enumerated"``, ``"dreg"``, ``"reparameterised"`` or ``"score"``.

    Raises:
        ConfigError: If n is not above 1, or draws are too few for it.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "cubo(n=3)").renyi_order
        -2.0
    """

    n: float = 2.0
    estimator: str = "auto"

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q})
    value_kind: ClassVar[ValueKind] = "upper_bound"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "per_datum"
    estimators: ClassVar[Mapping[str, Estimator]] = ESTIMATORS
    min_draws: ClassVar[int] = 3
    default_draws: ClassVar[int] = 32

    def __post_init__(self) -> None:
        """Check the order."""
        number = isinstance(self.n, (int, float)) and not isinstance(self.n, bool)
        if not (number and 1 < self.n < math.inf):
            raise ConfigError(
                f"cubo(n=...) must be a finite number above 1, got {self.n!r}: at 1 the bound is the log evidence "
                "whatever q is, and below 1 it is a lower bound (renyi)."
            )
        super().__post_init__()
        least = math.floor(self.n / (self.n - 1)) + 1
        object.__setattr__(self, "min_draws", max(2, least))
        object.__setattr__(self, "default_draws", max(32, 2 * least))

    @property
    def renyi_order(self) -> float:
        """The order 1 - n of the divergence of q from the posterior."""
        return 1.0 - self.n

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the bound (see :class:`Objective`)."""
        return power_loss(family, model, noise, batch, alpha=1.0 - self.n, estimator=self.estimator)
