"""Importance-weighted bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from vifamily.objectives._base import Estimator, Objective, ValueKind
from vifamily.objectives._power import ESTIMATORS, power_loss
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["Iwae"]


@register("objectives", "iwae")
@dataclasses.dataclass(frozen=True)
class Iwae(Objective):
    r"""Importance-weighted bound over K draws (Burda, Grosse and Salakhutdinov 2016).

    .. math:: \mathcal{L}_K = \mathbb{E}\Big[\log \frac1K \sum_{k=1}^K w_k\Big], \quad w_k = \frac{p(x, z_k)}{q(z_k)},
              \qquad \mathcal{L}_1 = \mathrm{ELBO} \le \mathcal{L}_K \le \log p(x).

    The loss is minus the bound. It tightens with K, the number of draws per step; its best q is wider than the ELBO's
    and is meant to be used with importance weights. The doubly reparameterised gradient (``dreg``, Tucker et al. 2019)
    is the default where the family allows it.

    **Bias.** As a bound over K draws, none: its gradient is unbiased. As an estimate of the log evidence it is low,
    by about :math:`\mathrm{var}(w / p(x)) / (2 K)` where that is small. Over a minibatch the bound of the whole data
    set is not a sum over data, hence biased: refused unless every latent is local, where it is taken per datum.

    **Blind to.** Modes that q does not visit. As K grows, q itself: the bound tends to the log evidence whatever q is.

    **Fails when.** K is large and the gradient is the plain one, whose signal-to-noise ratio falls as
    :math:`1/\sqrt K` (Rainforth et al. 2018); in many dimensions, where one draw carries all the weight; and where q is
    used without its weights, which the bound does not ask to be good.

    Source: Burda, Grosse and Salakhutdinov 2016, equation 8.

    Args:
        estimator: ``"auto"``, ``"enumerated"``, ``"dreg"``, ``"reparameterised"`` or ``"score"`` (with the
            leave-one-out baseline of VIMCO).

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "iwae")
        Iwae(estimator='auto')
    """

    estimator: str = "auto"

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q})
    bias: ClassVar[str | None] = (
        "the bound over {draws} draws has a q of its own, wider than elbo's and meant for importance weighting with as "
        "many draws; it changes with draws="
    )
    value_kind: ClassVar[ValueKind] = "lower_bound"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "per_datum"
    estimators: ClassVar[Mapping[str, Estimator]] = ESTIMATORS
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 16

    @property
    def renyi_order(self) -> float:
        """The bound tends to the log evidence whatever q is, as that of order 0 does."""
        return 0.0

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate minus the bound (see :class:`Objective`)."""
        return power_loss(family, model, noise, batch, alpha=0.0, estimator=self.estimator)
