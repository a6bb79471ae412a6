"""Energy distance to reference draws."""

from __future__ import annotations

import dataclasses
from typing import Self

from torch import Tensor

from vifamily.numerics.kernels import square_distances
from vifamily.objectives._pairs import Paired
from vifamily.objectives._reference import check_number
from vifamily.registry import register
from vifamily.types import ModelLike

__all__ = ["EnergyDistance"]

_TINY = 1e-30


@register("objectives", "energy_distance")
@dataclasses.dataclass(frozen=True)
class EnergyDistance(Paired):
    r"""Energy distance between draws of q and reference draws of the posterior.

    .. math:: D_\beta(q, p) = 2\, \mathbb{E}\|z - y\|^\beta - \mathbb{E}\|z - z'\|^\beta - \mathbb{E}\|y - y'\|^\beta,
              \qquad z, z' \sim q, \quad y, y' \sim p, \quad 0 < \beta < 2 .

    Minimises :math:`D_\beta`, which is zero where q equals p and positive elsewhere. It evaluates neither the log joint
    nor the density of q, so implicit families are fine; it needs reference draws and reparameterised draws of q. Means
    over pairs leave out a draw with itself (``pairs``); an ``ensemble`` of points is summed over all pairs, which is
    exact (``points``), and becomes a weighted summary of the reference draws. It has no bandwidth to choose: unlike a
    bounded kernel's, its gradient does not fade for draws that lie far out.

    Here it compares draws of the *posterior*. The generalised-Bayes use of the same distance, simulated against
    observed data with a prior, needs reparameterised simulations, which models do not offer.

    **Bias.** None, in value and gradient, for independent draws. The reference draws given are all that is known of p:
    their Monte-Carlo error stays in the answer.

    **Blind to.** Nothing in principle; in practice to what costs little distance: correlations in many dimensions, fine
    structure within a mode, a mode of small weight.

    **Fails when.** The dimension is high: distances between draws become all alike, and the gradient is noise. With
    ``power`` near 2 only means are compared.

    Source: G. J. Székely and M. L. Rizzo, "Energy statistics: a class of statistics based on distances" (2013),
    equation 5; T. Gneiting and A. E. Raftery, "Strictly proper scoring rules" (2007), equation 21.

    Args:
        power: :math:`\beta`, between 0 and 2.
        standardise: Measure each coordinate in units of its standard deviation over all reference draws; False takes
            the coordinates as they are, where those of large spread count most.
        reference_batch: Most reference draws of one step; more take turns. None for all.
        estimator: ``"auto"``, ``"points"`` or ``"pairs"``.

    Raises:
        ConfigError: If ``power`` or ``reference_batch`` is out of range, or ``standardise`` not a boolean.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "implicit(hidden=[])", "energy_distance", seed=0, steps=50)
        >>> posterior.draws(5).shape
        torch.Size([5, 2])
    """

    power: float = 1.0
    standardise: bool = True
    reference_batch: int | None = 4096
    estimator: str = "auto"

    def __post_init__(self) -> None:
        check_number("power", self.power, 0, 2, "a number between 0 and 2")
        super().__post_init__()

    def on_quadrature(self) -> Self:
        """Return the exact sums over pairs, or itself where the kink of the distance is too sharp for a rule."""
        return super().on_quadrature() if self.power >= 1 else self

    def similarity(self, x: Tensor, y: Tensor, model: ModelLike) -> Tensor:
        """Minus the distance to the power (see :class:`~vifamily.objectives._pairs.Paired`)."""
        # at distance zero the root has no gradient, and none is wanted
        out: Tensor = -((square_distances(x, y) + _TINY) ** (0.5 * self.power))
        return out
