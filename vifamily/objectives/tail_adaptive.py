"""Tail-adaptive f-divergence: draws weighted by the rank of their density ratio."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vifamily.errors import ConfigError, SpecError
from vifamily.objectives._base import Estimator, Objective, ValueKind, log_ratio_parts
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["TailAdaptive", "tail_weights"]


def tail_weights(log_ratio: Tensor, beta: float) -> Tensor:
    """Weights proportional to the ``beta``-th power of the share of draws whose ratio is at least as large.

    Equal ratios get equal weights.

    Args:
        log_ratio: ``(..., draw)``.
        beta: The power; with a negative one the largest ratio gets the largest weight.

    Returns:
        ``(..., draw)``, summing to one.

    Example:
        >>> tail_weights(torch.tensor([3.0, 1.0, 2.0, 0.5]), -1.0)
        tensor([0.4800, 0.1600, 0.2400, 0.1200])
    """
    ordered = log_ratio.contiguous().sort(-1).values
    larger = log_ratio.shape[-1] - torch.searchsorted(ordered, log_ratio.contiguous())
    return torch.softmax(beta * larger.to(log_ratio).log(), -1)


@register("objectives", "tail_adaptive")
@dataclasses.dataclass(frozen=True)
class TailAdaptive(Objective):
    r"""Tail-adaptive f-divergence: the path gradient of an f-divergence whose f is chosen anew from the draws.

    .. math:: \nabla = -\sum_k \rho_k\, \nabla_z \log w(z_k)\, \frac{\partial z_k}{\partial \lambda}, \qquad
              \rho_k \propto \hat F(w_k)^{\beta}, \quad \hat F(w_k) = \tfrac1K \#\{j : w_j \ge w_k\}.

    The path gradient of an f-divergence weighs draws by :math:`f''(w) w^2`, whose mean over q is infinite for most
    mass-covering f once the tail of w is heavy. Here the weight is a power of the tail probability of w itself, so its
    mean is finite whatever the tail is. The largest ratio gets the largest weight, by the factor :math:`K^{-\beta}`
    over the smallest; ``beta=0`` is sticking the landing for reverse KL. At ``beta=-1`` the mean of the weights before
    they are normalised grows like log K, so that q gets wider with more draws. What is minimised is, for the f of the
    step, :math:`D_f(q \| p)`, with q held fixed in w; there is no one function that goes down, so the value that is
    reported (minus the importance-weighted bound of the same draws) is not what the gradient follows. The model's own
    parameters stay as they are.

    **Bias.** The weights depend on all draws of a step, so with few draws the gradient is not that of any divergence;
    it is zero at q = p for every number of draws. Only ranks enter, so no normaliser is needed.

    **Blind to.** Modes in which q has no draws, and how much larger the largest ratios are than the others.

    **Fails when.** A single step has few draws: ranks of four ratios say little. In high dimension the largest ratio is
    an accident of the draws, and gets most of the weight all the same.

    Source: Wang, Liu and Liu (2018), "Variational inference with tail-adaptive f-divergence", algorithm 1. A widely
    used implementation has the ranks upside down, and gives the largest ratio the smallest weight.

    Args:
        beta: The power, at most 0.
        estimator: ``"auto"`` or ``"stl"``, the only one.

    Raises:
        SpecError: If ``beta`` is positive or not a number.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "tail_adaptive(beta=-0.5)").beta
        -0.5
    """

    beta: float = -1.0
    estimator: str = "auto"

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_JOINT, Capability.SCORE})
    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.REPARAMETERISED, Capability.LOG_Q})
    value_kind: ClassVar[ValueKind] = "none"
    freezes_model: ClassVar[bool] = True
    # a path gradient tells nothing about the weights of draws that carry their own
    estimators: ClassVar[Mapping[str, Estimator]] = {
        "stl": Estimator(
            never_model=frozenset({Capability.LOCAL}),
            never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}),
            value_gradient=False,
        )
    }
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 32

    def __post_init__(self) -> None:
        number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool) and math.isfinite(self.beta)
        if not number or self.beta > 0:
            raise SpecError(
                f"beta must be a number of at most 0, got {self.beta!r}: a positive one would give the largest ratio "
                "the smallest weight."
            )
        super().__post_init__()

    @property
    def renyi_order(self) -> float | tuple[float, float]:
        """Reverse KL without weights; with them wider, and the wider the more draws there are."""
        return 1.0 if self.beta == 0 else (-1.0, 1.0)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the surrogate (see :class:`Objective`)."""
        draw = family(noise)
        num_draws = draw.z.shape[-2]
        if num_draws < 2:
            raise ConfigError("ranks of density ratios need several draws: use at least draws=2.")
        log_p, _, _ = log_ratio_parts(model, draw, batch)
        ratio = log_p - family.log_prob(draw.z, frozen=True)
        fixed = ratio.detach()
        weight = tail_weights(fixed, float(self.beta))
        surrogate = -(weight * ratio).sum(-1)
        value = math.log(num_draws) - torch.logsumexp(fixed, -1)
        return Loss(surrogate, value, {"largest_weight": weight.amax(-1), "log_ratio": fixed.mean(-1)})
