"""Discrete Stein divergence: operator variational inference on a few states, the best test function in closed form."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.objectives._base import Caps, Objective, ValueKind
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike, Space

__all__ = ["DiscreteStein"]


@register("objectives", "discrete_stein")
@dataclasses.dataclass(frozen=True)
class DiscreteStein(Objective):
    r"""Discrete Stein divergence: operator variational inference on enumerated states ``0, 1, ..., c``.

    The operator takes differences of a test function f with :math:`f(0) = 0` along the states, in the order in which
    the family lists them,

    .. math:: (O f)(z) = \frac{f(z + 1)\, p(z + 1) - f(z)\, p(z)}{p(z)}, \qquad
              \mathbb{E}_q[O f] = \sum_{z \ge 1} f(z) \, q(z) \, (r_z - 1), \qquad
              r_z = \frac{q(z - 1)}{p(z - 1)} \Big/ \frac{q(z)}{p(z)},

    whose mean under p is a telescoping sum, zero. f is a table, one number per state, and its best answer is known, so
    that no game is played: with the penalty :math:`\tau E_q f^2` on its size

    .. math:: 4 \tau \sup_f \bigl(\mathbb{E}_q[O f] - \tau \, \mathbb{E}_q f^2\bigr)
              = \sum_{z \ge 1} q(z) \, (r_z - 1)^2,

    which is minimised (``distance="penalised"``). ``distance="square"`` is the published :math:`t(a) = a^2`, over
    tables with :math:`|f| \le 1`: the square of :math:`\sum_{z \ge 1} q(z) |r_z - 1|`. Both are zero only where all
    ratios :math:`q(z) / p(z)` of neighbours are equal, that is at the posterior. Value and gradient are exact sums;
    only differences of :math:`\log p` enter, so that no evidence is needed.

    **Bias.** None on all data. The operator is not linear in :math:`\log p`: minibatches are refused.

    **Blind to.** The weights of modes that are separated by states of next to no probability: a term counts with
    q(z), and only ratios of neighbours are compared. It depends on the order of the states, which for several
    coordinates is that of reading them as digits.

    **Fails when.** A state has probability zero under the model (its ratios do not exist, and the loss is not finite);
    there are many states, since all are enumerated; or a family of independent coordinates is far from the target:
    large ratios, which enter squared, then dominate, and the loss is badly conditioned.

    Source: Ranganath, Altosaar, Tran and Blei (2016), arXiv 1610.09033, appendix C, after Ley and Swan (2013); the
    closed forms are elementary.

    Args:
        distance: ``"penalised"`` or ``"square"``.

    Raises:
        ConfigError: If the distance is neither.

    Example:
        >>> import torch, vifamily as vf
        >>> log_p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
        >>> model = vf.models.Density(lambda t: log_p[t["k"].long()], parameters={"k": ((), "integer_interval(0, 2)")})
        >>> posterior = vf.fit(model, "categorical", "discrete_stein", seed=0)
        >>> posterior.family.log_probabilities().exp()[0].round(decimals=3).tolist()
        [0.5, 0.2, 0.3]
    """

    distance: str = "penalised"

    needs_model: ClassVar[Caps] = frozenset({Capability.LOG_JOINT})
    needs_family: ClassVar[Caps] = frozenset({Capability.DRAWS, Capability.ENUMERATED})
    spaces: ClassVar[frozenset[Space]] = frozenset({Space.DISCRETE})
    value_kind: ClassVar[ValueKind] = "divergence"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    value_gradient: ClassVar[bool] = True
    blind_to_mode_weights: ClassVar[bool] = True
    freezes_model: ClassVar[bool] = True
    reads_states_in_order: ClassVar[bool] = True
    """Draws are the states, one after the other: none may be left out, repeated or moved."""

    @property
    def linear_in_draws(self) -> bool:
        """There is no noise: all states are there."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance not in ("penalised", "square"):
            raise ConfigError(f"distance must be 'penalised' or 'square', got {self.distance!r}.")

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the divergence (see :class:`Objective`)."""
        draw = family(noise)
        log_q = draw.log_weight
        log_ratio = log_q - model.log_joint(draw.z, batch)
        gap = torch.expm1(-log_ratio.diff(dim=-1))
        weight = log_q[..., 1:].exp()
        square = self.distance == "square"
        value = (weight * gap.abs()).sum(-1).square() if square else (weight * gap.square()).sum(-1)
        return Loss(value, value.detach())
