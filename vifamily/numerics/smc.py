r"""Tempered sequential Monte Carlo: particles moved from a law with draws to one known up to a constant.

Between a start with log density :math:`s` and a target :math:`t`, both up to constants, lie the laws

.. math:: \pi_\tau(z) \propto \exp\{(1 - \tau)\, s(z) + \tau\, t(z)\}, \qquad 0 = \tau_0 < \tau_1 < \dots < \tau_T = 1 .

Weights are updated from one to the next, particles are resampled systematically where their weights have become
unequal, and moved by Metropolis-Hastings steps that keep the law. Several samplers run beside each other along
leading axes, each with randomness of its own, and are what each would be alone.

Source: P. Del Moral, A. Doucet and A. Jasra, "Sequential Monte Carlo samplers" (JRSS B 2006); the choice of the next
temperature by the effective sample size is that of A. Jasra et al., "Inference for Lévy-driven stochastic volatility
models via adaptive sequential Monte Carlo" (Scandinavian Journal of Statistics 2011).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vifamily.errors import ConfigError

__all__ = ["KERNELS", "Particles", "systematic", "tempered_smc"]

KERNELS = ("pcn", "random_walk", "mala")
"""Metropolis-Hastings kernels that move particles."""

MOST_STAGES = 200
"""Stages of a ladder that is chosen as it goes; the last of them goes to the target whatever the weights."""

_GOAL = {"pcn": 0.5, "random_walk": 0.3, "mala": 0.57}
"""Shares of accepted proposals at which step sizes are held."""
_LOG_SMALLEST, _HALVINGS = math.log(1e-12), 14
_WIDENED = 1.5
"""Factor of the covariance of a Gaussian autoregression: particles that lag behind the law are narrower than it, and
proposals from a law as narrow would not let them catch up."""
_SHORTEST, _LONGEST = 0.02, 4.0

Density = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Particles:
    """What a sampler ends with; ``lead`` stands for the leading axes of samplers that run beside each other.

    Attributes:
        z: Particles, ``(*lead, particle, dim)``.
        log_weight: Their log weights, normalised, ``(*lead, particle)``.
        log_evidence: Log of the estimated ratio of the normalisers of target and start, ``(*lead)``.
        stages: Number of temperatures after 0 that were passed, ``(*lead)``.
        acceptance: Share of proposals that were accepted, ``(*lead)``.
    """

    z: Tensor
    log_weight: Tensor
    log_evidence: Tensor
    stages: Tensor
    acceptance: Tensor

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the last weights as a part of the particles, ``(*lead)``."""
        return (-torch.logsumexp(2 * self.log_weight, -1)).exp() / self.log_weight.shape[-1]


@torch.no_grad()
def tempered_smc(
    z: Tensor,
    log_start: Density,
    log_target: Density,
    sources: Sequence[torch.Generator],
    *,
    ladder: Sequence[float] | None = None,
    ess: float = 0.5,
    kernel: str = "pcn",
    moves: int = 3,
    covariance: Tensor | None = None,
) -> Particles:
    r"""Move draws of one law to another.

    With weights :math:`w_k` and the estimate :math:`\hat Z` of the ratio of the normalisers,
    :math:`\hat Z \sum_k w_k f(z_k)` is an unbiased estimate of :math:`Z\, \mathbb{E}_t f`, and
    :math:`\sum_k w_k f(z_k)` one with a bias of order 1/particles, where ladder and proposals are fixed beforehand
    (``ladder=``, ``covariance=``). Chosen from the particles as they come, as by default, they leave both estimates
    consistent.

    Args:
        z: Independent draws of the start, ``(*lead, particle, dim)``, with no axis or one in front.
        log_start: Log density of the start up to a constant, ``(*lead, particle, dim) -> (*lead, particle)``.
        log_target: That of the target.
        sources: Generators on the CPU, one for each sampler.
        ladder: Temperatures from above 0 to 1, increasing; None chooses each such that the effective sample size of
            the weights is a part ``ess`` of what it was.
        ess: That part; on a given ladder, the part of the particles below which they are resampled.
        kernel: ``"pcn"`` (a Gaussian autoregression about the mean of the particles), ``"random_walk"`` or ``"mala"``
            (Langevin proposals; needs densities with gradients).
        moves: Metropolis-Hastings steps at each temperature; at the last, where weights stay, they take off bias.
        covariance: Covariance of proposals, ``(dim, dim)``, with steps of a fixed size and, of ``pcn``, centred at
            zero; None takes mean and covariance of the weighted particles at each temperature, and adapts the size.

    Raises:
        ConfigError: If an option is out of range.

    Example:
        >>> import torch
        >>> source = torch.Generator().manual_seed(0)
        >>> draws = torch.randn(2000, 1, generator=source, dtype=torch.float64)
        >>> found = tempered_smc(
        ...     draws, lambda z: -0.5 * z[..., 0] ** 2, lambda z: -2.0 * (z[..., 0] - 3) ** 2, [source]
        ... )
        >>> abs(float((found.log_weight.exp() @ found.z)[0]) - 3.0) < 0.1
        True
        >>> abs(float(found.log_evidence.exp()) - 0.5) < 0.05
        True
    """
    _checked(z, sources, ladder, ess, kernel, moves)
    lead, count, dim = z.shape[:-2], z.shape[-2], z.shape[-1]
    walk = _Walk(log_start, log_target, kernel, covariance, lead, dim)
    start, target = walk.densities(z)
    log_weight = torch.full_like(start, -math.log(count))
    power, log_evidence = start.new_zeros(lead), start.new_zeros(lead)
    stages, accepted, proposed = (torch.zeros_like(power) for _ in range(3))
    scale = torch.full_like(power, _first_scale(kernel, dim))
    for stage in range(MOST_STAGES if ladder is None else len(ladder)):
        ratio = _no_nan(target - start)
        if ladder is not None:
            after = torch.full_like(power, float(ladder[stage]))
        elif stage == MOST_STAGES - 1:
            after = torch.ones_like(power)
        else:
            after = _next_power(ratio, log_weight, power, ess)
        going = power < 1
        stages = stages + going
        log_weight = log_weight + _times((after - power).unsqueeze(-1), ratio)
        total = torch.logsumexp(log_weight, -1)
        log_evidence, log_weight = log_evidence + total, log_weight - total.unsqueeze(-1)
        power = after
        mean, factor = walk.proposal(z, log_weight)
        noise, uniform, first = _randomness(sources, moves, count, dim, z)
        poor = (power < 1) if ladder is None else (power < 1) & (effective(log_weight) < ess)
        index = torch.where(
            poor.unsqueeze(-1), systematic(log_weight, first), torch.arange(count, device=z.device).expand(*lead, count)
        )
        z = z.gather(-2, index.unsqueeze(-1).expand(z.shape))
        start, target = start.gather(-1, index), target.gather(-1, index)
        log_weight = torch.where(poor.unsqueeze(-1), torch.full_like(log_weight, -math.log(count)), log_weight)
        for move in range(moves):
            z, start, target, rate = walk.step(
                z, start, target, power, mean, factor, scale, noise[..., move, :, :], uniform[..., move, :], going
            )
            accepted, proposed = accepted + going * rate, proposed + going
            if covariance is None:
                scale = torch.where(going, _adapted(scale, rate, kernel), scale)
        if not bool((power < 1).any()):
            break
    return Particles(z, log_weight, log_evidence, stages, accepted / proposed)


def effective(log_weight: Tensor) -> Tensor:
    """Effective sample size of normalised weights as a part of their number, ``(..., particle) -> (...)``."""
    return (-torch.logsumexp(2 * log_weight, -1)).exp() / log_weight.shape[-1]


def systematic(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """Indices of systematic resampling: particle k is taken ``count * weight_k`` times, rounded up or down.

    Args:
        log_weight: Normalised log weights, ``(..., particle)``.
        uniform: One uniform number for each row, ``(...)``.

    Returns:
        Indices ``(..., particle)``, in increasing order.

    Example:
        >>> systematic(torch.tensor([0.5, 0.25, 0.0, 0.25]).log(), torch.tensor(0.5)).tolist()
        [0, 0, 1, 3]
    """
    count = log_weight.shape[-1]
    edges = log_weight.exp().cumsum(-1)
    edges = edges / edges[..., -1:]
    points = (torch.arange(count, dtype=edges.dtype, device=edges.device) + uniform.to(edges).unsqueeze(-1)) / count
    return torch.searchsorted(edges.contiguous(), points.contiguous(), right=True).clamp_max(count - 1)


class _Walk:
    """Metropolis-Hastings steps that keep a tempered law."""

    def __init__(
        self, log_start: Density, log_target: Density, kernel: str, covariance: Tensor | None,
        lead: torch.Size, dim: int,
    ) -> None:  # fmt: skip
        self.log_start, self.log_target, self.kernel = log_start, log_target, kernel
        self.fixed = None if covariance is None else torch.linalg.cholesky(covariance).expand(*lead, dim, dim)

    def densities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both log densities; what is no number counts as no mass."""
        return _no_nan(self.log_start(z)), _no_nan(self.log_target(z))

    def proposal(self, z: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the particles, ``(*lead, 1, dim)`` and ``(*lead, dim, dim)``."""
        if self.fixed is not None:
            return torch.zeros_like(z[..., :1, :]), self.fixed
        weight = log_weight.exp().unsqueeze(-1)
        mean = (weight * z).sum(-2, keepdim=True)
        centred = z - mean
        covariance = (weight * centred).mT @ centred
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        # few particles know little of many correlations: these are shrunk, and no direction is left without width
        dim, count = z.shape[-1], z.shape[-2]
        known = effective(log_weight) * count
        keep = (1 - dim / known).clamp(0.0, 1.0)[..., None, None]
        floor = 1e-6 * variance.amax(-1, keepdim=True) + torch.finfo(z.dtype).tiny ** 0.5
        covariance = keep * covariance + torch.diag_embed((1 - keep.squeeze(-1)) * variance + floor)
        width = _WIDENED if self.kernel == "pcn" else 1.0
        return mean, torch.linalg.cholesky(width * covariance)

    def step(
        self, z: Tensor, start: Tensor, target: Tensor, power: Tensor, mean: Tensor, factor: Tensor, scale: Tensor,
        noise: Tensor, uniform: Tensor, going: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """One step of every particle; returns them, their log densities, and the share of accepted proposals."""
        at, size = power.unsqueeze(-1), scale[..., None, None]
        step = noise @ factor.mT
        correction: Tensor | float = 0.0
        if self.kernel == "pcn":
            size = size.clamp_max(1.0)
            new = mean + (1 - size**2).clamp_min(0.0).sqrt() * (z - mean) + size * step
            # the proposal keeps the normal law with this mean and factor
            correction = 0.5 * (_squared(new - mean, factor) - _squared(z - mean, factor))
        elif self.kernel == "random_walk":
            new = z + size * step
        else:
            drift = self._drift(z, at, factor, size)
            new = z + drift + size * step
            back = self._drift(new, at, factor, size)
            forth = 0.5 * noise.square().sum(-1)
            correction = forth - 0.5 * _squared((z - new - back) / size, factor)
        new_start, new_target = self.densities(new)
        gain = _path(new_start, new_target, at) - _path(start, target, at) + correction
        probability = _no_nan(gain).clamp_max(0.0).exp()
        take = (uniform < probability) & going.unsqueeze(-1)
        return (
            torch.where(take.unsqueeze(-1), new, z),
            torch.where(take, new_start, start),
            torch.where(take, new_target, target),
            probability.mean(-1),
        )

    def _drift(self, z: Tensor, at: Tensor, factor: Tensor, size: Tensor) -> Tensor:
        """Half the squared step along the slope of the log density, in the metric of the proposals."""
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            value = _path(self.log_start(point), self.log_target(point), at)
            (slope,) = torch.autograd.grad(value.sum(), point)
        return 0.5 * size**2 * (_no_nan(slope, 0.0) @ factor @ factor.mT)


def _checked(
    z: Tensor, sources: Sequence[torch.Generator], ladder: Sequence[float] | None, ess: float, kernel: str, moves: int
) -> None:
    if kernel not in KERNELS:
        raise ConfigError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}.")
    if not 0 < ess < 1:
        raise ConfigError(f"ess must be a part of the particles, between 0 and 1, got {ess!r}.")
    if moves < 1:
        raise ConfigError(f"moves must be a positive number of steps, got {moves!r}.")
    if z.dim() not in (2, 3) or z.shape[:-2].numel() != len(sources):
        raise ConfigError(
            f"particles must have shape ([sampler,] particle, dim) with a generator for each sampler, got shape "
            f"{tuple(z.shape)} and {len(sources)} generators."
        )
    if ladder is None:
        return
    rising = all(a < b for a, b in zip((0.0, *ladder), ladder, strict=False))
    if not ladder or not rising or ladder[-1] != 1:
        raise ConfigError(f"ladder must rise from above 0 to 1, got {list(ladder)!r}.")


def _first_scale(kernel: str, dim: int) -> float:
    """Size of the first steps in units of the proposals' spread."""
    known = {"pcn": 0.7, "random_walk": 2.38 / math.sqrt(dim), "mala": 1.65 / dim ** (1 / 6)}
    return float(min(known[kernel], _LONGEST))


def _adapted(scale: Tensor, rate: Tensor, kernel: str) -> Tensor:
    longest = 1.0 if kernel == "pcn" else _LONGEST
    return (scale * (rate - _GOAL[kernel]).exp()).clamp(_SHORTEST, longest)


def _randomness(
    sources: Sequence[torch.Generator], moves: int, count: int, dim: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal numbers, uniform ones, and one uniform number to resample by, of every sampler."""
    lead = like.shape[:-2]
    normal = [torch.randn(moves, count, dim, generator=s, dtype=like.dtype) for s in sources]
    even = [torch.rand(moves * count + 1, generator=s, dtype=like.dtype) for s in sources]
    noise = torch.stack(normal).reshape(*lead, moves, count, dim).to(like.device)
    uniform = torch.stack(even).reshape(*lead, -1).to(like.device)
    return noise, uniform[..., :-1].unflatten(-1, (moves, count)), uniform[..., -1]


def _next_power(ratio: Tensor, log_weight: Tensor, power: Tensor, goal: float) -> Tensor:
    """The largest power up to 1 at which the effective sample size keeps its part, to a percent of the way."""
    # particles without mass under the target are lost at the first step, however short
    live = torch.where(ratio > -torch.inf, log_weight, -torch.inf)
    left, least = 1 - power, goal * _size(live)

    def enough(by: Tensor) -> Tensor:
        return _size(live + _times(by.unsqueeze(-1), ratio)) >= least

    high = left.clamp_min(torch.finfo(left.dtype).tiny).log()
    low = high + _LOG_SMALLEST
    at_once = enough(left)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        good = enough(middle.exp())
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(at_once, torch.ones_like(power), power + low.exp())


def _size(log_weight: Tensor) -> Tensor:
    """Effective sample size of weights that need not be normalised."""
    return (2 * torch.logsumexp(log_weight, -1) - torch.logsumexp(2 * log_weight, -1)).exp()


def _times(power: Tensor, value: Tensor) -> Tensor:
    """A product in which zero times minus infinity is zero."""
    return torch.where(power == 0, torch.zeros_like(value), power * value)


def _path(start: Tensor, target: Tensor, power: Tensor) -> Tensor:
    return _no_nan(_times(1 - power, start) + _times(power, target))


def _squared(centred: Tensor, factor: Tensor) -> Tensor:
    """Squared Mahalanobis lengths, ``(*lead, particle, dim) -> (*lead, particle)``."""
    apart: Tensor = torch.linalg.solve_triangular(factor, centred.mT, upper=False)
    return apart.square().sum(-2)


def _no_nan(value: Tensor, instead: float = -math.inf) -> Tensor:
    return torch.where(value.isnan(), instead, value)
