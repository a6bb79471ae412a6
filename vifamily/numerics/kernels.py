r"""Positive-definite kernels with the derivatives that Stein's identity needs, in closed form.

Points are ``(..., n, dim)`` against ``(..., m, dim)``; leading axes (restarts) broadcast, and so does a bandwidth with
one number for each. Every kernel here is of the form in which

.. math:: \nabla_x k(x, y) = a(x, y)\,(x - y) + b(x, y)\,y, \qquad
          \nabla_y k(x, y) = -a(x, y)\,(x - y) + b(x, y)\,x,

so that Stein kernels and directions are products of matrices: no tensor ``(n, m, dim)`` is kept for them.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from vifamily.errors import ConfigError, DataError, ShapeError

__all__ = [
    "KERNELS",
    "Imq",
    "Kernel",
    "KernelParts",
    "Linear",
    "Radial",
    "Rbf",
    "Sum",
    "checked_pair",
    "median_bandwidth",
    "median_distance",
    "named_kernel",
    "square_distances",
    "stein_direction",
    "stein_kernel",
    "stein_terms",
]

_LARGEST_DIFFERENCE = 4_000_000
Bandwidth = float | Tensor


@dataclasses.dataclass(frozen=True)
class KernelParts:
    """A kernel between points, with what makes up its first derivatives; each ``(..., n, m)``.

    Attributes:
        value: ``k(x_i, y_j)``.
        slope: ``a`` in ``grad_x k = a (x - y) + b y``.
        cross: ``b``.
        trace: ``sum_c d^2 k / dx_c dy_c``.
    """

    value: Tensor
    slope: Tensor
    cross: Tensor
    trace: Tensor


def square_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances, ``(..., n, dim), (..., m, dim) -> (..., n, m)``, twice differentiable.

    By differences, which lose no digits; where those would be large, by products of centred points.

    Example:
        >>> square_distances(torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0]])).tolist()
        [[1.0], [4.0]]
    """
    if x.numel() * y.shape[-2] <= _LARGEST_DIFFERENCE:
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    centre = x.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x @ y.mT).clamp_min(0)


def _per_pair(bandwidth: Bandwidth) -> Bandwidth:
    """A bandwidth per leading axis, made to broadcast over pairs."""
    return bandwidth[..., None, None] if isinstance(bandwidth, Tensor) else bandwidth


class Kernel(abc.ABC):
    """A positive-definite kernel; lengths are measured in units of ``bandwidth``."""

    @abc.abstractmethod
    def parts(self, x: Tensor, y: Tensor, bandwidth: Bandwidth = 1.0) -> KernelParts:
        """Evaluate the kernel and its derivatives between all pairs.

        Args:
            x: ``(..., n, dim)``.
            y: ``(..., m, dim)``.
            bandwidth: Unit of length, a positive number or one per leading axis ``(...)``.
        """

    def __call__(self, x: Tensor, y: Tensor, bandwidth: Bandwidth = 1.0) -> Tensor:
        """Values between all pairs, ``(..., n, m)``."""
        return self.parts(x, y, bandwidth).value

    def gradient(self, x: Tensor, y: Tensor, bandwidth: Bandwidth = 1.0) -> Tensor:
        """Gradient in the first argument between all pairs, ``(..., n, m, dim)``."""
        parts = self.parts(x, y, bandwidth)
        apart = x.unsqueeze(-2) - y.unsqueeze(-3)
        return parts.slope.unsqueeze(-1) * apart + parts.cross.unsqueeze(-1) * y.unsqueeze(-3)

    def cross_trace(self, x: Tensor, y: Tensor, bandwidth: Bandwidth = 1.0) -> Tensor:
        """Trace of the matrix of mixed second derivatives, ``(..., n, m)``."""
        return self.parts(x, y, bandwidth).trace


class Radial(Kernel):
    """A kernel ``f(t)`` of the squared distance ``t = |x - y|^2 / h^2`` alone."""

    @abc.abstractmethod
    def profile(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``f``, ``f'`` and ``f''`` at squared distances."""

    def parts(self, x: Tensor, y: Tensor, bandwidth: Bandwidth = 1.0) -> KernelParts:
        """Evaluate from squared distances (see :class:`Kernel`)."""
        square = _per_pair(bandwidth) ** 2
        t = square_distances(x, y) / square
        value, first, second = self.profile(t)
        trace = -(2 * x.shape[-1] * first + 4 * t * second) / square
        return KernelParts(value, 2 * first / square, torch.zeros_like(value), trace)


@dataclasses.dataclass(frozen=True)
class Rbf(Radial):
    r"""Gaussian kernel :math:`\exp(-\|x - y\|^2 / 2 h^2)`.

    Its Stein discrepancy does not control convergence in three dimensions or more: draws may run off to infinity while
    it goes to zero (Gorham and Mackey 2017).

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> Rbf()(x, x).round(decimals=4)
        tensor([[1.0000, 0.1353],
                [0.1353, 1.0000]])
    """

    def profile(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the exponential and its derivatives."""
        value = torch.exp(-0.5 * t)
        return value, -0.5 * value, 0.25 * value


@dataclasses.dataclass(frozen=True)
class Imq(Radial):
    r"""Inverse multiquadric :math:`(c^2 + \|x - y\|^2 / h^2)^{\beta}` with :math:`-1 < \beta < 0`.

    Heavy tails: its Stein discrepancy controls convergence in any number of dimensions, for targets with tails like
    those of a normal law or lighter, convex far out (Gorham and Mackey 2017, theorem 8).

    Args:
        offset: ``c``, positive.
        power: ``beta``, between -1 and 0.

    Raises:
        ConfigError: If one is out of its range.

    Example:
        >>> float(Imq()(torch.zeros(1, 2), torch.tensor([[1.0, 1.4142135]]))[0, 0])
        0.5
    """

    offset: float = 1.0
    power: float = -0.5

    def __post_init__(self) -> None:
        if not self.offset > 0 or not -1 < self.power < 0:
            raise ConfigError(
                f"an inverse multiquadric needs offset > 0 and -1 < power < 0, got {self.offset} and {self.power}."
            )

    def profile(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the power and its derivatives."""
        base, beta = self.offset**2 + t, self.power
        value = base**beta
        return value, beta * value / base, beta * (beta - 1) * value / base**2


@dataclasses.dataclass(frozen=True)
class Linear(Kernel):
    r"""Linear kernel :math:`x^\top y / h^2 + c`: Stein's method then matches means and covariances, and nothing else.

    Args:
        offset: ``c``, positive; without it means would not be matched.

    Raises:
        ConfigError: If the offset is not positive.

    Example:
        >>> float(Linear()(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]]))[0, 0])
        5.0
    """

    offset: float = 1.0

    def __post_init__(self) -> None:
        if not self.offset > 0:
            raise ConfigError(f"a linear kernel needs offset > 0, got {self.offset}.")

    def parts(self, x: Tensor, y: Tensor, bandwidth: Bandwidth = 1.0) -> KernelParts:
        """Evaluate from inner products (see :class:`Kernel`)."""
        square = _per_pair(bandwidth) ** 2
        value = x @ y.mT / square + self.offset
        cross = torch.ones_like(value) / square
        return KernelParts(value, torch.zeros_like(value), cross, x.shape[-1] * cross)


@dataclasses.dataclass(frozen=True)
class Sum(Kernel):
    """A weighted sum of kernels, each with its own multiple of the bandwidth.

    Args:
        kernels: The kernels.
        weights: Positive weights; equal ones that sum to one by default.
        factors: Multiples of the bandwidth; ones by default.

    Raises:
        ConfigError: If there are no kernels, the lengths differ, or a number is not positive.

    Example:
        >>> both = Sum((Rbf(), Linear()), weights=(0.5, 2.0))
        >>> float(both(torch.zeros(1, 1), torch.zeros(1, 1))[0, 0])
        2.5
    """

    kernels: tuple[Kernel, ...]
    weights: tuple[float, ...] | None = None
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        size = len(self.kernels)
        for name in ("weights", "factors"):
            given = getattr(self, name)
            if not size or (given is not None and (len(given) != size or not all(v > 0 for v in given))):
                raise ConfigError(
                    f"a sum of kernels needs one or more kernels and as many positive {name}, got {size} and {given}."
                )

    def parts(self, x: Tensor, y: Tensor, bandwidth: Bandwidth = 1.0) -> KernelParts:
        """Add up the parts of the kernels (see :class:`Kernel`)."""
        size = len(self.kernels)
        weights, factors = self.weights or (1 / size,) * size, self.factors or (1.0,) * size
        found = [k.parts(x, y, factor * bandwidth) for k, factor in zip(self.kernels, factors, strict=True)]

        def total(name: str) -> Tensor:
            return torch.stack([w * getattr(p, name) for w, p in zip(weights, found, strict=True)]).sum(0)

        return KernelParts(*(total(f.name) for f in dataclasses.fields(KernelParts)))


KERNELS: dict[str, Kernel] = {
    "imq": Imq(),
    "rbf": Rbf(),
    "linear": Linear(),
    "multiscale": Sum((Rbf(), Rbf(), Rbf()), factors=(0.5, 1.0, 2.0)),
}
"""Kernels by the name that objectives take."""


def named_kernel(name: Any) -> Kernel:
    """Return a kernel by name.

    Raises:
        ConfigError: If there is none of this name.

    Example:
        >>> named_kernel("imq")
        Imq(offset=1.0, power=-0.5)
    """
    if not isinstance(name, str) or name not in KERNELS:
        raise ConfigError(f"there is no kernel {name!r}; the kernels are {', '.join(KERNELS)}.")
    return KERNELS[name]


# --- Stein ---


def stein_kernel(
    kernel: Kernel,
    x: Tensor,
    score_x: Tensor,
    y: Tensor | None = None,
    score_y: Tensor | None = None,
    *,
    bandwidth: Bandwidth = 1.0,
) -> Tensor:
    r"""Stein kernel between points, from scores alone.

    .. math:: h(x, y) = s(x)^\top s(y)\, k + s(x)^\top \nabla_y k + s(y)^\top \nabla_x k
              + \operatorname{tr} \nabla_x \nabla_y k

    Its mean over draws ``x`` of the law with score ``s`` is zero for every ``y`` (Liu, Lee and Jordan 2016, equation
    14); its mean over two independent draws of another law is that law's squared kernel Stein discrepancy.

    Args:
        kernel: The kernel.
        x: ``(..., n, dim)``.
        score_x: Scores at them, alike.
        y: ``(..., m, dim)``; None takes ``x``.
        score_y: Scores at them.
        bandwidth: Unit of length of the kernel.

    Returns:
        ``(..., n, m)``.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> stein_kernel(Rbf(), x, -x).round(decimals=3)
        tensor([[ 1.0000, -0.6070],
                [-0.6070,  2.0000]])
    """
    other, score_other = (x, score_x) if y is None or score_y is None else (y, score_y)
    parts = kernel.parts(x, other, bandwidth)
    return stein_terms(parts, x, score_x, other, score_other)


def stein_terms(parts: KernelParts, x: Tensor, score_x: Tensor, y: Tensor, score_y: Tensor) -> Tensor:
    """Stein kernel from the parts of a kernel that are there already; see :func:`stein_kernel`."""
    # inner products with centred points: differences between far points would lose digits otherwise
    centre = x.detach().mean(-2, keepdim=True)
    own_x = (score_x * (x - centre)).sum(-1).unsqueeze(-1)
    own_y = (score_y * (y - centre)).sum(-1).unsqueeze(-2)
    moved = score_x @ (y - centre).mT - own_x + (x - centre) @ score_y.mT - own_y
    out = (score_x @ score_y.mT) * parts.value + parts.slope * moved + parts.trace
    both = (score_x * x).sum(-1).unsqueeze(-1) + (score_y * y).sum(-1).unsqueeze(-2)
    return out + parts.cross * both


def stein_direction(parts: KernelParts, x: Tensor, score: Tensor, at: Tensor, *, attraction: float = 1.0) -> Tensor:
    r"""Direction of Stein variational gradient descent at points, from points with equal weights.

    .. math:: \phi(y) = \frac1n \sum_j \gamma\, k(x_j, y)\, s(x_j) + \nabla_{x_j} k(x_j, y)

    Args:
        parts: Parts of the kernel between ``x`` and ``at``, ``(..., n, m)``.
        x: ``(..., n, dim)``.
        score: Scores at them.
        at: ``(..., m, dim)``.
        attraction: ``gamma``, the weight of the pull along the scores; 1 but for annealing.

    Returns:
        ``(..., m, dim)``.
    """
    centre = x.detach().mean(-2, keepdim=True)
    pull = attraction * (parts.value.mT @ score)
    push = parts.slope.mT @ (x - centre) - parts.slope.sum(-2).unsqueeze(-1) * (at - centre)
    return (pull + push + parts.cross.sum(-2).unsqueeze(-1) * at) / x.shape[-2]


# --- bandwidths ---


@torch.no_grad()
def median_distance(x: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Weighted median of the distances between distinct points, for each leading axis; no gradient passes.

    Pairs count by the product of their weights and those at distance zero not at all, so that a point written as two of
    half its weight changes nothing. Where half the weight falls between two distances it is their mean.

    Args:
        x: ``(..., n, dim)``.
        log_weight: Log weights ``(n,)`` or ``(..., n)``; None for equal ones.

    Returns:
        ``(...)``, positive; 1 where no two points differ or a point is not finite.

    Example:
        >>> float(median_distance(torch.tensor([[0.0], [1.0], [3.0]])))
        2.0
    """
    size = x.shape[-2]
    rows, columns = torch.triu_indices(size, size, 1, device=x.device)
    distance = (x[..., rows, :] - x[..., columns, :]).square().sum(-1).sqrt()
    if distance.shape[-1] == 0:
        return torch.ones_like(x[..., 0, 0])
    weight = torch.ones_like(distance)
    if log_weight is not None:
        weight = (log_weight[..., rows] + log_weight[..., columns]).exp().expand_as(distance)
    weight = torch.where(distance > 0, weight, torch.zeros_like(weight))
    distance, order = distance.sort(-1)
    share = weight.gather(-1, order).cumsum(-1)
    total = share[..., -1:]
    # rounding of the sums must not decide on which side of the middle a pair lies
    low, high = (share >= (0.5 - 1e-6) * total).int().argmax(-1), (share > (0.5 + 1e-6) * total).int().argmax(-1)
    ends = [distance.gather(-1, at.unsqueeze(-1)).squeeze(-1) for at in (low, high)]
    middle = 0.5 * (ends[0] + ends[1])
    return torch.where((total.squeeze(-1) > 0) & (middle > 0) & middle.isfinite(), middle, torch.ones_like(middle))


def checked_pair(x: Any, y: Any, *, fewest: int = 1) -> tuple[Tensor, Tensor]:
    """Two samples as finite float64 matrices on the CPU with the same columns.

    Raises:
        ShapeError: If one is not a matrix, has fewer than ``fewest`` draws, or their columns differ.
        DataError: If a value is not finite.
    """
    out = []
    for sample in (x, y):
        tensor = torch.as_tensor(sample).detach().to("cpu", torch.float64)
        if tensor.dim() != 2 or tensor.shape[0] < fewest or tensor.shape[1] < 1:
            raise ShapeError(
                f"a sample must have shape (draw, quantity) with {fewest} draws or more, got {tuple(tensor.shape)}."
            )
        if not bool(tensor.isfinite().all()):
            raise DataError("a sample holds NaN or infinite values; leave those draws out, or see why they are there.")
        out.append(tensor)
    if out[0].shape[1] != out[1].shape[1]:
        raise ShapeError(
            f"two samples must have the same quantities, got {out[0].shape[1]} and {out[1].shape[1]} columns."
        )
    return out[0], out[1]


def median_bandwidth(x: Any, y: Any, *, largest: int = 1000) -> float:
    """Median heuristic: the median distance between points of the pooled sample.

    Args:
        x: ``(draw, quantity)``.
        y: ``(other draw, quantity)``.
        largest: At most so many points of each sample are used, evenly spaced in their order.

    Returns:
        The median of the distances between distinct pairs, in the units of the quantities; 1 when it is zero.

    Example:
        >>> median_bandwidth(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]]))
        2.0
    """
    a, b = checked_pair(x, y)
    pooled = torch.cat([s[:: max(1, math.ceil(s.shape[0] / largest))] for s in (a, b)])
    if pooled.shape[0] < 2:
        return 1.0
    distance = torch.nn.functional.pdist(pooled)
    return float(distance.median()) or 1.0
