"""Kernel Stein discrepancy: scores of the posterior, draws of q, and no density of q."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vifamily.errors import ConfigError, IncompatibleError
from vifamily.numerics.kernels import median_distance, named_kernel, stein_kernel
from vifamily.numerics.scores import score
from vifamily.objectives._base import ValueKind
from vifamily.objectives._score_based import ScoreBased
from vifamily.registry import register
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike, Space

__all__ = ["Ksd", "check_bandwidth"]

Caps = frozenset[Capability]


def check_bandwidth(name: str, bandwidth: Any) -> None:
    """Refuse a bandwidth that is neither ``"median"`` nor a positive number.

    Raises:
        ConfigError: If it is not.
    """
    number = isinstance(bandwidth, (int, float)) and not isinstance(bandwidth, bool)
    if bandwidth != "median" and not (number and 0 < bandwidth < math.inf):
        raise ConfigError(f"{name}(bandwidth=...) is 'median' or a positive number, got {bandwidth!r}.")


@register("objectives", "ksd")
@dataclasses.dataclass(frozen=True)
class Ksd(ScoreBased):
    r"""Squared kernel Stein discrepancy between q and the posterior, from draws of q and scores, with no density of q.

    .. math:: \mathrm{KSD}^2(q) = \mathbb{E}_{z, z' \sim q}\big[ s^\top s' k + s^\top \nabla_{z'} k
              + s'^\top \nabla_z k + \operatorname{tr} \nabla_z \nabla_{z'} k \big],
              \qquad s = \nabla_z \log p(x, z),\ s' = \nabla_{z'} \log p(x, z'),

    the square of the largest value that Stein's operator takes on average under q over the unit ball of the kernel's
    space. It is minimised by the reparameterised gradient, which passes through the score. Families without density are
    allowed: this is what ``implicit`` is for.

    Two statistics estimate it on n draws. ``"u"`` leaves out the pairs of a draw with itself: unbiased, and may be
    negative. ``"v"`` keeps them, with the weights of the draws: never negative; for the members of an ``ensemble`` it
    is not an estimate but the discrepancy of the ensemble itself. ``"auto"`` takes ``"v"`` where draws carry weights
    and ``"u"`` elsewhere: with unequal weights, from which strata the draws come would have to be known.

    Members of an ensemble that descend this discrepancy are KSD descent (Korba et al. 2021): ``fit(model,
    "ensemble(size=20)", "ksd(bandwidth=1.0, statistic=v)", solver="lbfgs")``, deterministic, or with ``adam``; their
    weights are fitted too. Members that start on a line of symmetry between modes stay on it, and some are stranded at
    saddles: look at several restarts.

    Kernels, with lengths in units of the bandwidth h: ``"imq"`` :math:`(1 + r^2/h^2)^{-1/2}`, ``"rbf"``
    :math:`\exp(-r^2 / 2h^2)`, ``"multiscale"`` (the mean of three of these at h/2, h and 2h) and ``"linear"``
    :math:`z^\top z'/h^2 + 1`, which sees the means of :math:`s` and of :math:`s z^\top` alone, and for a family that
    cannot match both may move the mean to mend the second moments. ``bandwidth="median"`` is the median distance
    between the draws of each step, held fixed in the gradient: what is followed is the discrepancy under the kernel of
    the moment, and values at different q are not comparable to the last digit. Steps with a bandwidth that is a number
    descend one function.

    **Bias.** ``"u"`` is unbiased in value and gradient for a fixed bandwidth. ``"v"`` on n random draws exceeds the
    discrepancy by a mean of the diagonal over n, which favours a narrow q. A minibatch would add the variance of its
    scores, since both factors share it: minibatches are refused.

    **Blind to.** The weights of separate modes: between the equal mixture of N(-3, 1) and N(3, 1) and one with weights
    0.95 and 0.05 it is 0.0001 (``imq``, h = 1), where the standard deviation of ``"u"`` from 1500 draws is 0.0006.
    ``"rbf"`` is also blind to draws that run off to infinity, in three dimensions or more. Never let it be the only
    check of an answer.

    **Fails when.** q starts narrow at a stationary point of the posterior (a mode, or the valley between two modes):
    begin wide. Dimensions are many: distances concentrate, and the signal drowns in the n (n - 1) pairs. Coordinates
    have unlike scales: the kernel has one length for all of them. The log joint goes through ReLU or other piecewise
    linear functions: the gradient takes second derivatives of it, which are zero there.

    Source: Liu, Lee and Jordan (2016), "A kernelized Stein discrepancy for goodness-of-fit tests", equation 14; Gorham
    and Mackey (2017), "Measuring sample quality with kernels", for the inverse multiquadric.

    Args:
        kernel: ``"imq"``, ``"rbf"``, ``"multiscale"`` or ``"linear"``.
        bandwidth: ``"median"``, or a positive number in the units of the unconstrained latents.
        statistic: ``"auto"``, ``"u"`` or ``"v"``.

    Raises:
        ConfigError: If a field is none of these.

    Example:
        >>> import torch
        >>> from vifamily.models import Density
        >>> from vifamily.families.ensemble import Ensemble
        >>> from vifamily.types import LatentSpec
        >>> family = Ensemble(size=3).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        >>> model = Density(lambda z: -0.5 * z.square().sum(-1), dim=2)
        >>> float(Ksd(bandwidth=1.0).loss(family, model, torch.zeros(1, 0)).value) > 0
        True
    """

    kernel: str = "imq"
    bandwidth: float | str = "median"
    statistic: str = "auto"

    needs_family: ClassVar[Caps] = frozenset({Capability.DRAWS, Capability.REPARAMETERISED})
    value_kind: ClassVar[ValueKind] = "surrogate"
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        named_kernel(self.kernel)
        check_bandwidth("ksd", self.bandwidth)
        if self.statistic not in ("auto", "u", "v"):
            raise ConfigError(f"ksd(statistic=...) is 'auto', 'u' or 'v', got {self.statistic!r}.")
        fixed = self.bandwidth != "median"
        # under a kernel that moves with q its values are not those of one function
        object.__setattr__(self, "value_gradient", fixed)
        if fixed and self.statistic != "v":
            object.__setattr__(self, "value_kind", "divergence")

    def missing(self, model: Caps, family: Caps, space: Space = Space.REAL) -> tuple[str, ...]:
        """Return what a pair lacks (see :class:`Objective`); the unbiased statistic is for equally weighted draws."""
        out = super().missing(model, family, space)
        if self.statistic == "u" and Capability.WEIGHTED in family:
            return (*out, f"family: no {Capability.WEIGHTED} (or statistic='v')")
        return out

    def resolve(self, model: ModelLike, family: FamilyLike) -> Self:
        """Return this objective with its statistic chosen (see :class:`Objective`)."""
        return dataclasses.replace(super().resolve(model, family), statistic=self._statistic(family))

    def _statistic(self, family: FamilyLike) -> str:
        if self.statistic != "auto":
            return self.statistic
        return "v" if Capability.WEIGHTED in family.capabilities else "u"

    def on_quadrature(self) -> Self:
        """Take the statistic that keeps the diagonal: nodes with weights are the law itself, not a sample of it."""
        return dataclasses.replace(self, statistic="v")

    def for_fixed_draws(self, solver: str) -> Self:
        """Return this objective where its value on fixed draws has a minimum (see :class:`Objective`).

        Raises:
            IncompatibleError: If the statistic is unbounded below on fixed draws, or the kernel moves with q.
        """
        if self.statistic != "v" or self.bandwidth == "median":
            raise IncompatibleError(
                f"the solver {solver!r} minimises a value on fixed draws, where the unbiased statistic may have no "
                "minimum and a bandwidth taken from the draws moves the kernel: use ksd(bandwidth=..., statistic='v') "
                "with a number, best on an ensemble, where it is exact; or solver='adam'.",
                missing=("statistic='v' and a bandwidth that is a number",),
            )
        return self

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the discrepancy (see :class:`Objective`)."""
        draw = family(noise)
        z = draw.z
        if z.shape[-2] < 2 and self._statistic(family) == "u":
            raise ConfigError("the unbiased statistic is a mean over pairs of draws: use at least draws=2.")
        s = score(lambda at: model.log_joint(at, batch), z)
        width = median_distance(z, draw.log_weight) if self.bandwidth == "median" else float(self.bandwidth)
        stein = stein_kernel(named_kernel(self.kernel), z, s, bandwidth=width)
        if self._statistic(family) == "v":
            weight = draw.log_weight.exp().expand(z.shape[:-1])
            value = torch.einsum("...i,...ij,...j->...", weight, stein, weight)
        else:
            size = z.shape[-2]
            own = torch.diagonal(stein, dim1=-2, dim2=-1).sum(-1)
            value = (stein.sum((-2, -1)) - own) / (size * (size - 1))
        used = torch.as_tensor(width, dtype=z.dtype, device=z.device).expand(value.shape)
        return Loss(value, value.detach(), {"bandwidth": used.detach()})
