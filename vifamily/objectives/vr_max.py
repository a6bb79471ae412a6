"""The VR-max objective: the largest of K ratios."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from torch import Tensor

from vifamily.objectives._base import Objective, ValueKind
from vifamily.objectives._power import power_loss
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["VrMax"]


@register("objectives", "vr_max")
@dataclasses.dataclass(frozen=True)
class VrMax(Objective):
    r"""VR-max: maximises the largest of K log ratios, so that only one draw is differentiated.

    .. math:: \text{loss} = -\,\mathbb{E}\Big[\max_{k \le K} \log \frac{p(x, z_k)}{q(z_k)}\Big],
              \qquad z_1, \dots, z_K \sim q.

    Minimised by the path gradient of the draw with the largest ratio. It was proposed as a fast stand-in for the
    importance-weighted bound in training decoders: its estimate is that of the Rényi bound at minus infinity. It is not
    ``renyi(alpha=-inf)``, which is the same number with the other sign: there it is an upper bound on the log evidence
    and is minimised; here, as published, it is maximised. With latents of single data the maximum is taken per datum.

    **Bias.** It is no bound: its expectation lies between the ELBO and the log evidence plus log K, and can be above
    the log evidence. What is maximised depends on K and need not be largest at the posterior, even where the family
    contains it. For a normal posterior with sd 1 and normal q with sd s its value is
    :math:`\tfrac12 (1 - s^2)\, \mathbb{E}\max_k e_k^2 + \log s` for s below 1, and with the minimum in place of the
    maximum above it: s = 1 is a local minimum, and the best q has :math:`s^2 = 1 / \mathbb{E}\min_k e_k^2`,
    2.75 with two draws and growing without bound in K.

    **Blind to.** All draws but one.

    **Fails when.** Taken for a posterior approximation with many draws: see the bias. Use it to train model parameters
    with few draws, and another objective for q.

    Source: Li and Turner (2016), "Rényi divergence variational inference", section 4.2.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "vr_max").value_kind
        'surrogate'
    """

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_JOINT, Capability.SCORE})
    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q, Capability.REPARAMETERISED})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "per_datum"
    value_gradient: ClassVar[bool] = True
    targets_posterior: ClassVar[bool] = False
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 4

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate minus the largest log ratio (see :class:`Objective`)."""
        return power_loss(family, model, noise, batch, alpha=-math.inf, estimator="reparameterised", sign=-1.0)
