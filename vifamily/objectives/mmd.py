"""Maximum mean discrepancy to reference draws."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.kernels import median_distance, named_kernel
from vifamily.objectives._pairs import Paired, standardised, thinned
from vifamily.objectives._reference import remembered
from vifamily.registry import register
from vifamily.types import ModelLike

__all__ = ["Mmd"]

_MOST_FOR_MEDIAN = 500


@register("objectives", "mmd")
@dataclasses.dataclass(frozen=True)
class Mmd(Paired):
    r"""Squared maximum mean discrepancy between draws of q and reference draws of the posterior.

    .. math:: \mathrm{MMD}^2(q, p) = \mathbb{E}\, k(z, z') + \mathbb{E}\, k(y, y') - 2\, \mathbb{E}\, k(z, y),
              \qquad z, z' \sim q, \quad y, y' \sim p .

    Minimises the largest difference between means under q and p of functions in the unit ball of the kernel's space;
    for ``imq``, ``rbf`` and ``multiscale`` it is zero only where q equals p. It evaluates neither the log joint nor the
    density of q, so implicit families are fine; it needs reference draws and reparameterised draws of q. Means over
    pairs leave out a draw with itself (``pairs``, which may make the value negative); an ``ensemble`` of points is
    summed over all pairs, which is exact (``points``), and becomes a weighted summary of the reference draws.

    **Bias.** None, in value and gradient, for independent draws: the bandwidth depends on the reference draws alone.
    Those are all that is known of p, and their Monte-Carlo error stays in the answer.

    **Blind to.** What is much finer or much coarser than the bandwidth; with ``kernel="linear"`` everything but the
    mean.

    **Fails when.** q starts many bandwidths away: a bounded kernel is flat there and the gradient fades, that of
    ``imq`` slowly, that of ``rbf`` at once (that of ``energy_distance`` does not). In many dimensions distances become
    all alike.

    Source: A. Gretton, K. Borgwardt, M. Rasch, B. Schölkopf and A. Smola, "A kernel two-sample test" (2012), lemma 6;
    as a loss of a sampler: G. K. Dziugaite, D. M. Roy and Z. Ghahramani (2015), Y. Li, K. Swersky and R. Zemel (2015).

    Args:
        kernel: ``"imq"``, ``"rbf"``, ``"multiscale"`` (three bandwidths) or ``"linear"``.
        bandwidth: Unit of length of the kernel, a positive number (of standard deviations, if standardised), or
            ``"median"``: the median distance between reference draws.
        standardise: Measure each coordinate in units of its standard deviation over all reference draws.
        reference_batch: Most reference draws of one step; more take turns. None for all.
        estimator: ``"auto"``, ``"points"`` or ``"pairs"``.

    Raises:
        ConfigError: If the kernel is unknown, or a number or flag cannot be used.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "ensemble(size=10)", "mmd", seed=0, steps=50)
        >>> posterior.record.estimator
        'points'
    """

    kernel: str = "imq"
    bandwidth: float | str = "median"
    standardise: bool = True
    reference_batch: int | None = 4096
    estimator: str = "auto"

    def __post_init__(self) -> None:
        named_kernel(self.kernel)
        number = isinstance(self.bandwidth, (int, float)) and not isinstance(self.bandwidth, bool)
        if self.bandwidth != "median" and not (number and 0 < float(self.bandwidth) < math.inf):
            raise ConfigError(f"mmd(bandwidth=...) is 'median' or a positive number, got {self.bandwidth!r}.")
        super().__post_init__()

    def similarity(self, x: Tensor, y: Tensor, model: ModelLike) -> Tensor:
        """The kernel (see :class:`~vifamily.objectives._pairs.Paired`)."""
        return named_kernel(self.kernel)(x, y, self._unit(model))

    def _unit(self, model: ModelLike) -> float:
        if self.bandwidth != "median":
            return float(self.bandwidth)
        draws = model.reference_draws

        def compute() -> float:
            some = standardised(model, thinned(draws, _MOST_FOR_MEDIAN), standardise=self.standardise)
            return float(median_distance(some))

        return remembered(draws, ("median distance", self.standardise), compute)
