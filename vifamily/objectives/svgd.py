"""Stein variational gradient descent: particles that follow scores and repel each other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.kernels import median_distance, named_kernel, stein_direction, stein_terms
from vifamily.numerics.newton import value_and_gradient
from vifamily.objectives._base import ValueKind
from vifamily.objectives._score_based import ScoreBased
from vifamily.objectives.ksd import check_bandwidth
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["Flow", "Svgd"]

Caps = frozenset[Capability]
_MANY = 5


@dataclasses.dataclass(frozen=True)
class Flow:
    """Where particles are driven, and how far they are from equilibrium.

    Attributes:
        direction: Velocity of each particle, ``(..., particle, dim)``.
        discrepancy: Squared kernel Stein discrepancy of the particles, the squared length of the direction in the
            kernel's space, ``(...)``.
        strength: Mean size of the kernel between each particle and all, ``(..., particle)``: how strongly a shift of
            all particles would be felt.
        bandwidth: Unit of length of the kernel, ``(...)``.
    """

    direction: Tensor
    discrepancy: Tensor
    strength: Tensor
    bandwidth: Tensor


@register("objectives", "svgd")
@dataclasses.dataclass(frozen=True)
class Svgd(ScoreBased):
    r"""Stein variational gradient descent: equally weighted particles, driven along scores and apart from each other.

    .. math:: \phi(x) = \frac1n \sum_{j=1}^n k(x_j, x)\, \nabla \log p(x_j) + \nabla_{x_j} k(x_j, x)

    Of all vector fields of unit length in the kernel's space, :math:`\phi` is the one along which
    :math:`\mathrm{KL}(q \,\|\, p)` falls fastest when the particles are moved by it, at the rate
    :math:`\|\phi\|^2 = \mathrm{KSD}^2(q)`, the squared kernel Stein discrepancy of the particles. So it minimises
    reverse KL over smooth laws, but no function of finitely many particles: there is no loss to differentiate. Its
    value is that discrepancy, for comparison; first derivatives of the log joint are enough. The solver
    ``particle_flow`` moves the members of an ``ensemble`` (without jitter), whose weights stay equal.

    The kernel lives in the family's standardised coordinates, so that unlike scales and correlations of the latents are
    those of the Gaussian start. Kernels are those of ``ksd``. ``bandwidth="median"`` takes
    :math:`2 h^2 = \mathrm{med}^2 / \log(n + 1)` from the distances between the particles at every step, with which the
    pulls of the other particles on one add up to about that of itself. With ``kernel="linear"`` the particles end with
    the mean and covariance of a Gaussian posterior, exactly, if there are more of them than dimensions. One particle
    goes to a mode.

    With ``cycles`` the pull of the scores is first tempered: in each cycle of ``cycle_length`` steps the first term is
    multiplied by :math:`\gamma_t = (t / T)^p`, with t the step within the cycle, so that repulsion spreads the
    particles over modes before the scores gather them. After the cycles :math:`\gamma = 1`.

    **Bias.** n particles are not n draws: the fixed point differs from the posterior by an amount that falls with n and
    grows with dimension. On a standard normal law 50 particles end with these variances in place of 1:

    ============== ==== ==== ==== ====
    dimensions        2    5   10   20
    ============== ==== ==== ==== ====
    ``rbf``        0.88 0.64 0.28 0.18
    ``imq``        0.88 0.73 0.60 0.42
    ``linear``     1.00 1.00 1.00 1.00
    ============== ==== ==== ==== ====

    :math:`\phi` is linear in the scores, so a minibatch leaves it unbiased.

    **Blind to.** The weights of separate modes: how many particles a mode gets is decided by where they started. The
    value is as blind as every Stein discrepancy.

    **Fails when.** Dimensions are more than a few (repulsion fades, variances shrink, and nothing in the value
    shows it: look at predictive checks or refit with ``elbo``); particles are fewer than dimensions (they span no
    covariance); tails are heavy; there is one particle, which is a mode and says nothing of spread.

    Source: Liu and Wang (2016), "Stein variational gradient descent", equation 8; Liu and Wang (2018), "Stein
    variational gradient descent as moment matching", for the linear kernel; D'Angelo and Fortuin (2021), "Annealed
    Stein variational gradient descent", for the cycles.

    Args:
        kernel: ``"rbf"``, ``"imq"``, ``"multiscale"`` or ``"linear"``.
        bandwidth: ``"median"``, or a positive number in standardised coordinates.
        cycles: Number of annealing cycles before the scores count in full; 0 for none.
        cycle_length: Steps of a cycle.
        cycle_power: ``p`` above.

    Raises:
        ConfigError: If a field is none of these.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "ensemble(size=20)", "svgd(kernel=linear)", seed=0)
        >>> posterior.record.stop_reason, posterior.record.solver
        ('converged', 'particle_flow')
    """

    kernel: str = "rbf"
    bandwidth: float | str = "median"
    cycles: int = 0
    cycle_length: int = 250
    cycle_power: float = 2.0

    needs_model: ClassVar[Caps] = frozenset({Capability.LOG_JOINT, Capability.SCORE})
    needs_family: ClassVar[Caps] = frozenset({Capability.DRAWS, Capability.PARTICLES})
    value_kind: ClassVar[ValueKind] = "surrogate"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "unbiased"
    value_gradient: ClassVar[bool] = False
    own_solver: ClassVar[str | None] = "particle_flow"
    default_draws: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        named_kernel(self.kernel)
        check_bandwidth("svgd", self.bandwidth)
        for name, least in (("cycles", 0), ("cycle_length", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"svgd({name}=...) must be an integer of at least {least}, got {value!r}.")
        power: Any = self.cycle_power
        if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 < power < math.inf:
            raise ConfigError(f"svgd(cycle_power=...) must be a positive number, got {power!r}.")

    @property
    def annealing_steps(self) -> int:
        """Steps before the scores count in full."""
        return self.cycles * self.cycle_length

    def attraction(self, step: int) -> float:
        """Return the weight of the scores at a step, in (0, 1]."""
        if step >= self.annealing_steps:
            return 1.0
        return float(((step % self.cycle_length + 1) / self.cycle_length) ** self.cycle_power)

    def caution(self, size: int, dim: int) -> str | None:
        """Return what must be said of so many particles in so many dimensions, or None."""
        if size == 1:
            return "one particle goes to a mode and has no spread"
        if size <= dim:
            return f"{size} particles in {dim} dimensions span no covariance: spreads come out too small"
        if dim >= _MANY and self.kernel != "linear":
            return f"in {dim} dimensions the repulsion of {size} particles is weak: spreads come out too small"
        return None

    def width(self, points: Tensor) -> Tensor:
        """Return the bandwidth for particles, ``(..., particle, dim) -> (...)``."""
        if self.bandwidth != "median":
            return torch.full_like(points[..., 0, 0], float(self.bandwidth))
        return median_distance(points) / math.sqrt(2 * math.log(points.shape[-2] + 1))

    def held(self, points: Tensor) -> Self:
        """Return this objective with the bandwidth that it takes from particles ``(particle, dim)`` as a number."""
        return dataclasses.replace(self, bandwidth=float(self.width(points)))

    def flow(self, points: Tensor, score: Tensor, *, attraction: float = 1.0) -> Flow:
        """Return the velocity of each particle and the discrepancy.

        Args:
            points: ``(..., particle, dim)``.
            score: Scores of the posterior at them.
            attraction: Weight of the scores in the velocity.
        """
        width = self.width(points)
        parts = named_kernel(self.kernel).parts(points, points, width)
        stein = stein_terms(parts, points, score, points, score)
        direction = stein_direction(parts, points, score, points, attraction=attraction)
        return Flow(direction, stein.mean((-2, -1)), parts.value.abs().mean(-2), width)

    def direction(self, points: Tensor, score: Tensor, at: Tensor, *, attraction: float = 1.0) -> Tensor:
        """Return the velocity that particles give to any points, ``(..., m, dim)``.

        Args:
            points: ``(..., particle, dim)``.
            score: Scores of the posterior at them.
            at: ``(..., m, dim)``.
            attraction: Weight of the scores.
        """
        parts = named_kernel(self.kernel).parts(points, at, self.width(points))
        return stein_direction(parts, points, score, at, attraction=attraction)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the discrepancy of the particles (see :class:`Objective`); it is reported, not differentiated."""
        with torch.no_grad():
            z = family(noise).z
        to_standard, to_latent = (getattr(family, name, None) for name in ("to_standard", "to_latent"))
        if to_standard is None or to_latent is None:
            points, where = z, lambda u: u
        else:
            points, where = to_standard(z), to_latent
        _, score = value_and_gradient(lambda u: model.log_joint(where(u), batch), points)
        found = self.flow(points, score)
        return Loss(found.discrepancy, found.discrepancy, {"bandwidth": found.bandwidth})
