"""Thermodynamic variational objective: the evidence as an integral over a path from q to the posterior."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.errors import ConfigError, SpecError
from vifamily.objectives._base import Estimator, Objective, ValueKind, log_ratio_parts
from vifamily.objectives._ratio_function import Derivatives, ratio_estimators, ratio_loss
from vifamily.registry import register
from vifamily.types import Batch, Capability, Draw, FamilyLike, Loss, ModelLike

__all__ = ["Thermodynamic", "path_points", "thermodynamic_sum"]

_MOST = 1000


def path_points(partitions: int, schedule: Any, first: float) -> tuple[float, ...]:
    """Left ends of the intervals of a partition of [0, 1], the first of them 0.

    Args:
        partitions: Number of intervals.
        schedule: ``"log"`` (evenly in the logarithm from ``first`` to 1), ``"linear"``, or the inner points.
        first: The first inner point of ``"log"``.

    Returns:
        As many numbers as there are intervals.

    Raises:
        SpecError: If these are no partition.

    Example:
        >>> path_points(3, "log", 0.01), path_points(4, "linear", 0.01)
        ((0.0, 0.01, 0.1), (0.0, 0.25, 0.5, 0.75))
    """
    whole = isinstance(partitions, int) and not isinstance(partitions, bool)
    if not whole or not 1 <= partitions <= _MOST:
        raise SpecError(f"partitions must be an integer from 1 to {_MOST}, got {partitions!r}.")
    if not isinstance(first, (int, float)) or isinstance(first, bool) or not 0 < first < 1:
        raise SpecError(f"first must lie between 0 and 1, got {first!r}.")
    if isinstance(schedule, str) and schedule in ("log", "linear"):
        if schedule == "linear":
            return tuple(k / partitions for k in range(partitions))
        inner = [first ** (1 - k / (partitions - 1)) for k in range(partitions - 1)] if partitions > 1 else []
        return (0.0, *inner)
    points = list(schedule) if isinstance(schedule, Sequence) and not isinstance(schedule, str) else None
    numbers = points is not None and all(isinstance(p, (int, float)) and not isinstance(p, bool) for p in points)
    rising = numbers and points is not None and all(a < b for a, b in zip([0.0, *points], [*points, 1.0], strict=True))
    if points is None or not rising or len(points) != partitions - 1:
        raise SpecError(
            "schedule must be 'log', 'linear', or the inner points of the partition, rising inside (0, 1) and one "
            f"fewer than partitions={partitions}; got {schedule!r}."
        )
    return (0.0, *(float(p) for p in points))


def _tempered(log_ratio: Tensor, log_weight: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Self-normalised weights of the law between q and p at ``beta``, and the mean log ratio under it, ``(..., 1)``."""
    weight = torch.softmax(log_weight + beta * log_ratio, -1)
    return weight, (weight * log_ratio).sum(-1, keepdim=True)


def thermodynamic_sum(log_ratio: Tensor, log_weight: Tensor, points: Sequence[float]) -> Derivatives:
    r"""Left Riemann sum of the mean log ratio along the path, from weighted draws of q, and its derivatives.

    With :math:`v_k` the weights at :math:`\beta`, :math:`\mu` the mean under them and :math:`r_k = l_k - \mu`, one
    term has :math:`\partial_k \mu = v_k (1 + \beta r_k)` and
    :math:`\partial_k^2 \mu = \beta v_k [(1 + \beta r_k)(1 - 2 v_k) + 1]`.

    Args:
        log_ratio: ``(..., draw)``.
        log_weight: Normalised log weights, ``(draw,)`` or ``(..., draw)``.
        points: Left ends of the intervals.

    Returns:
        The sum and its derivatives.

    Example:
        >>> w = torch.tensor([0.0, 1.0], dtype=torch.float64); u = torch.full((2,), 0.5, dtype=torch.float64).log()
        >>> [round(float(thermodynamic_sum(w, u, path_points(n, "linear", 0.1)).value), 4) for n in (1, 2, 100)]
        [0.5, 0.5612, 0.619]
    """
    value = by_ratio = by_weight = bend = torch.zeros_like(log_ratio[..., :1])
    for beta, end in zip(points, [*points[1:], 1.0], strict=True):
        weight, mean = _tempered(log_ratio, log_weight, beta)
        apart = log_ratio - mean
        value = value + (end - beta) * mean
        by_ratio = by_ratio + (end - beta) * weight * (1 + beta * apart)
        by_weight = by_weight + (end - beta) * weight * apart
        bend = bend + (end - beta) * beta * weight * ((1 + beta * apart) * (1 - 2 * weight) + 1)
    return Derivatives(value.squeeze(-1), by_ratio, by_weight, bend)


@register("objectives", "thermodynamic")
@dataclasses.dataclass(frozen=True)
class Thermodynamic(Objective):
    r"""Thermodynamic variational objective: a lower bound on the evidence by a left Riemann sum.

    .. math:: \log p(x) = \int_0^1 \mathbb{E}_{\pi_\beta}[\log w]\, \mathrm{d}\beta \ge
              \sum_{j=0}^{J-1} (\beta_{j+1} - \beta_j)\, \mathbb{E}_{\pi_{\beta_j}}[\log w], \qquad
              \pi_\beta \propto q^{1 - \beta} p^\beta, \quad w = \frac{p(x, z)}{q(z)},

    with :math:`\beta_0 = 0` and :math:`\beta_J = 1`. The integrand rises in beta, so the left sum is a lower bound; its
    first term is the evidence lower bound, which it is with one partition. The loss is minus the sum. Expectations
    under the path are estimated by self-normalised importance sampling from q.

    Estimators: ``enumerated``, ``dreg``, ``reparameterised`` and ``score`` have the mean of the gradient of the
    K-draw estimate. ``covariance`` is the source's: with the draws held fixed,

    .. math:: \nabla \mathbb{E}_{\pi_\beta}[\log w] = \mathbb{E}_{\pi_\beta}[\nabla \log w] + \mathrm{Cov}_{\pi_\beta}
              \big[\log w,\ (1 - \beta) \nabla \log q + \beta \nabla \log p\big].

    It needs no path through the draws, so it serves discrete latents; its own self-normalisation biases it by O(1/K)
    against the gradient of the K-draw estimate.

    **Bias.** On K draws the sum lies below :math:`\log \frac1K \sum_k w_k`, being the left sum of that number's own
    path, so the estimate is a lower bound on the evidence in expectation for every K and every partition; it is a
    biased estimate, of O(1/K), of the sum of the formula. With many partitions it becomes the importance-weighted
    bound.

    **Blind to.** Modes in which q has no draws: every law on the path is seen through draws of q.

    **Fails when.** The terms with beta near 1 rest on few draws, as all importance sampling in high dimension; then
    fewer partitions or a smaller ``first`` are steadier. With many partitions and few draws the gradient is that of the
    importance-weighted bound, and so is its noise.

    Source: Masrani, Le and Wood (2019), "The thermodynamic variational objective", equations 8 and 12 and their
    appendix on the covariance gradient; the doubly reparameterised gradient and the bound for every K are derived in
    ``docs/divergences.md``.

    Args:
        partitions: Number of intervals.
        schedule: ``"log"`` (evenly in the logarithm from ``first`` to 1), ``"linear"``, or the inner points.
        first: The first inner point of ``"log"``.
        estimator: ``"auto"``, ``"enumerated"``, ``"dreg"``, ``"reparameterised"``, ``"score"`` or ``"covariance"``.

    Raises:
        SpecError: If these are no partition of [0, 1], or there is no such estimator.

    Example:
        >>> from vifamily import registry
        >>> registry.build("objectives", "thermodynamic(partitions=2, schedule=[0.1])").points
        (0.0, 0.1)
    """

    partitions: int = 5
    schedule: Any = "log"
    first: float = 0.025
    estimator: str = "auto"

    needs_family: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_Q})
    value_kind: ClassVar[ValueKind] = "lower_bound"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "per_datum"
    estimators: ClassVar[Mapping[str, Estimator]] = {
        **ratio_estimators(bend=True, additive=False, model_parameters=True),
        "covariance": Estimator(
            family=frozenset({Capability.DRAWS}),
            never_family=frozenset({Capability.WEIGHTED, Capability.LOG_Q_BOUND}),
            never_model=frozenset({Capability.LOCAL}),
            value_gradient=False,
            unbiased=False,
        ),
    }
    min_draws: ClassVar[int] = 2
    default_draws: ClassVar[int] = 16

    def __post_init__(self) -> None:
        path_points(self.partitions, self.schedule, self.first)
        super().__post_init__()
        if self.partitions == 1:
            object.__setattr__(self, "subsampling", "unbiased")

    @property
    def points(self) -> tuple[float, ...]:
        """Left ends of the intervals."""
        return path_points(self.partitions, self.schedule, self.first)

    @property
    def linear_in_draws(self) -> bool:
        """With one partition the bound is a mean over draws."""
        return self.partitions == 1 and self.estimator not in ("score", "covariance")

    @property
    def renyi_order(self) -> float | tuple[float, float]:
        """Reverse KL with one partition; with more, between it and the importance-weighted bound."""
        return 1.0 if self.partitions == 1 else (0.0, 1.0)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate minus the bound (see :class:`Objective`)."""
        if self.estimator == "covariance":
            return self._covariance(family, model, family(noise), batch)

        def negative(log_ratio: Tensor, log_weight: Tensor) -> Derivatives:
            d = thermodynamic_sum(log_ratio, log_weight, self.points)
            return Derivatives(-d.value, -d.by_ratio, -d.by_weight, None if d.bend is None else -d.bend)

        return ratio_loss(family, model, noise, batch, negative, self.estimator, _terms)[0]

    def _covariance(self, family: FamilyLike, model: ModelLike, draw: Draw, batch: Batch | None) -> Loss:
        num_draws = draw.z.shape[-2]
        if num_draws < 2:
            raise ConfigError("a covariance needs several draws: use at least draws=2.")
        z, even = draw.z.detach(), draw.log_weight.detach()
        log_p, _, _ = log_ratio_parts(model, Draw(z, None, even), batch)
        log_q = family.log_prob(z)
        ratio = (log_p - log_q).detach()
        bound = torch.zeros_like(ratio[..., 0])
        signal = torch.zeros_like(bound)
        for beta, end in zip(self.points, [*self.points[1:], 1.0], strict=True):
            weight, mean = _tempered(ratio, even, beta)
            apart = weight * (ratio - mean)
            if beta == 0:
                # the sample's own mean is taken off: this makes up for the draw's share in it
                apart = apart * num_draws / (num_draws - 1)
            path = (1 - beta) * log_q + beta * log_p
            signal = signal + (end - beta) * ((weight * (log_p - log_q)).sum(-1) + (apart * path).sum(-1))
            bound = bound + (end - beta) * mean.squeeze(-1)
        return Loss(bound.neg() - (signal - signal.detach()), bound.neg(), dict(_terms(ratio, even)))


def _terms(log_ratio: Tensor, log_weight: Tensor) -> Mapping[str, Tensor]:
    normaliser = torch.logsumexp(log_ratio + log_weight, -1)
    share = (log_ratio + log_weight - normaliser.unsqueeze(-1)).exp()
    return {"importance_bound": -normaliser, "largest_weight": share.amax(-1)}
