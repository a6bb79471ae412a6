r"""Convex functions behind f-divergences, as functions of the logarithm of the density ratio.

An f-divergence is :math:`D_f = \mathbb{E}_q[f(p/q)]` with f convex and :math:`f(1) = 0`. Everything that an estimator
of its value or gradient needs is one of four functions of :math:`x = \log u`:

- ``value``: :math:`f(u)`;
- ``slope``: :math:`f'(u)\,u`, the derivative of the value in x (reparameterised gradients);
- ``intercept``: :math:`f(u) - f'(u)\,u` (score-function gradients);
- ``curvature``: :math:`f''(u)\,u^2` (path gradients with q held fixed), the weight with which a draw pulls on q.

The dual :math:`u f(1/u)` exchanges slope and intercept, :math:`\text{slope}^*(x) = e^x\,\text{intercept}(-x)` and so
on; so each function takes a second argument m and returns itself times :math:`e^m`, computed in one exponent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from vifamily.errors import ConfigError

__all__ = ["KINDS", "Generator", "arc_length", "f_generator"]

Term = Callable[[Tensor, Tensor], Tensor]
_ROOT_HALF = math.sqrt(0.5)
_LOG_2 = math.log(2.0)
_NEAR = 1e-6


@dataclasses.dataclass(frozen=True)
class Generator:
    """The function f of one f-divergence; each field takes ``(x, m)`` and returns its function times ``exp(m)``.

    Attributes:
        value_term: ``f(u)``.
        slope_term: ``f'(u) u``.
        intercept_term: ``f(u) - f'(u) u``.
        curvature_term: ``f''(u) u^2``, or None where f has a kink, so that a second derivative misses part of it.
        renyi_order: Order alpha, or range of orders, of the Rényi divergences ``D_alpha(q || p)`` with which it agrees
            about the best q; None where it is not known to agree with any.
    """

    value_term: Term
    slope_term: Term
    intercept_term: Term
    curvature_term: Term | None
    renyi_order: float | tuple[float, float] | None = None

    @property
    def smooth(self) -> bool:
        """Whether the curvature says all: f has no kink."""
        return self.curvature_term is not None

    @property
    def shift_only(self) -> bool:
        """Whether ``f(c u)`` is ``f(u)`` plus a constant, so that p need not be normalised.

        That is so where the curvature is constant, of the reverse Kullback-Leibler divergence alone.
        """
        if self.curvature_term is None:
            return False
        at = self.curvature(torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64))
        return bool((at - at[1]).abs().max() < 1e-12)

    def value(self, log_u: Tensor) -> Tensor:
        """``f(u)``, elementwise."""
        return self.value_term(log_u, torch.zeros_like(log_u))

    def slope(self, log_u: Tensor) -> Tensor:
        """``f'(u) u``, elementwise; at a kink the mean of both sides."""
        return self.slope_term(log_u, torch.zeros_like(log_u))

    def intercept(self, log_u: Tensor) -> Tensor:
        """``f(u) - f'(u) u``, elementwise."""
        return self.intercept_term(log_u, torch.zeros_like(log_u))

    def curvature(self, log_u: Tensor) -> Tensor:
        """``f''(u) u^2``, elementwise.

        Raises:
            ConfigError: If f has a kink.
        """
        if self.curvature_term is None:
            raise ConfigError("this function has a kink, and what happens there is in no second derivative.")
        return self.curvature_term(log_u, torch.zeros_like(log_u))

    def dual(self) -> Generator:
        """The function ``u f(1/u)``: the same divergence with p and q exchanged."""
        curvature = None if self.curvature_term is None else _turned(self.curvature_term)
        value, slope, intercept = (_turned(t) for t in (self.value_term, self.intercept_term, self.slope_term))
        return Generator(value, slope, intercept, curvature, _exchanged(self.renyi_order))

    def symmetrised(self) -> Generator:
        """The mean of the function and its dual."""
        other = self.dual()
        curvature = None
        if self.curvature_term is not None and other.curvature_term is not None:
            curvature = _mean(self.curvature_term, other.curvature_term)
        return Generator(
            _mean(self.value_term, other.value_term), _mean(self.slope_term, other.slope_term),
            _mean(self.intercept_term, other.intercept_term), curvature, _hull(self.renyi_order, other.renyi_order),
        )  # fmt: skip


def _turned(term: Term) -> Term:
    return lambda x, m: term(-x, m + x)


def _mean(a: Term, b: Term) -> Term:
    return lambda x, m: 0.5 * (a(x, m) + b(x, m))


def _exchanged(order: float | tuple[float, float] | None) -> float | tuple[float, float] | None:
    """D_alpha(p || q) is minimised where D_(1 - alpha)(q || p) is."""
    return None if order is None else 1 - order if not isinstance(order, tuple) else (1 - order[1], 1 - order[0])


def _hull(a: float | tuple[float, float] | None, b: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if a is None or b is None:
        return None
    ends = [*(a if isinstance(a, tuple) else (a,)), *(b if isinstance(b, tuple) else (b,))]
    return min(ends), max(ends)


def _exp(x: Tensor, share: float = 0.7) -> Tensor:
    """Exponential function that goes on along its tangent near the end of the floating range, so that it stays finite.

    The tangent is taken at ``share`` of the log of the largest number; what is left is room for sums and products.
    """
    top = share * math.log(torch.finfo(x.dtype).max)
    return torch.exp(x.clamp(max=top)) * (1 + (x - top).clamp(min=0))


def _softplus(x: Tensor) -> Tensor:
    """Logarithm of ``1 + exp(x)``."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _difference(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(u - 1) e^(m/2)``, ``(u + 1) e^(m/2)`` and ``u e^(m/2)``, each fit to be squared."""
    one, u = _exp(m / 2, 0.35), _exp(x + m / 2, 0.35)
    return u - one, u + one, u


def _kl_reverse() -> Generator:
    return Generator(
        lambda x, m: -x * _exp(m), lambda x, m: -_exp(m), lambda x, m: (1 - x) * _exp(m), lambda x, m: _exp(m), 1.0,
    )  # fmt: skip


def _kl_forward() -> Generator:
    return Generator(
        lambda x, m: x * _exp(x + m),
        lambda x, m: (x + 1) * _exp(x + m),
        lambda x, m: -_exp(x + m),
        lambda x, m: _exp(x + m),
        0.0,
    )


def _power(t: float, factor: float) -> Generator:
    """``factor (u^t - 1 - t (u - 1))``."""

    def value(x: Tensor, m: Tensor) -> Tensor:
        return factor * (_exp(t * x + m) - t * _exp(x + m) + (t - 1) * _exp(m))

    return Generator(
        value,
        lambda x, m: factor * t * (_exp(t * x + m) - _exp(x + m)),
        lambda x, m: factor * (1 - t) * (_exp(t * x + m) - _exp(m)),
        lambda x, m: factor * t * (t - 1) * _exp(t * x + m),
        1 - t,
    )


def _jensen_shannon() -> Generator:
    # u log u - (1 + u) log((1 + u) / 2): twice the Jensen-Shannon divergence of Lin (1991)
    def slope(x: Tensor, m: Tensor) -> Tensor:
        return (_LOG_2 - _softplus(-x)) * _exp(x + m)

    def intercept(x: Tensor, m: Tensor) -> Tensor:
        return (_LOG_2 - _softplus(x)) * _exp(m)

    def curvature(x: Tensor, m: Tensor) -> Tensor:
        return _exp(m - _softplus(-x))

    return Generator(lambda x, m: slope(x, m) + intercept(x, m), slope, intercept, curvature, (0.0, 1.0))


def _arithmetic_geometric() -> Generator:
    # (1 + u) log((1 + u) / (2 sqrt u)) = (1 + u) log cosh(x / 2)
    def log_cosh(x: Tensor) -> Tensor:
        return 0.5 * x.abs() + torch.log1p(torch.exp(-x.abs())) - _LOG_2

    def slope(x: Tensor, m: Tensor) -> Tensor:
        return log_cosh(x) * _exp(x + m) + 0.5 * (_exp(x + m) - _exp(m))

    def intercept(x: Tensor, m: Tensor) -> Tensor:
        return log_cosh(x) * _exp(m) - 0.5 * (_exp(x + m) - _exp(m))

    def curvature(x: Tensor, m: Tensor) -> Tensor:
        return 0.5 * (_exp(m - _softplus(x)) + _exp(m + x - _softplus(-x)))

    return Generator(lambda x, m: log_cosh(x) * (_exp(m) + _exp(x + m)), slope, intercept, curvature, (0.0, 1.0))


def _total_variation() -> Generator:
    return Generator(
        lambda x, m: 0.5 * (_exp(x + m) - _exp(m)).abs(),
        lambda x, m: 0.5 * torch.sign(x) * _exp(x + m),
        lambda x, m: -0.5 * torch.sign(x) * _exp(m),
        None,
    )


def _pearson() -> Generator:
    def part(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Term:
        return lambda x, m: function(*_difference(x, m))

    return Generator(
        part(lambda less, more, u: less.square()),
        part(lambda less, more, u: 2 * u * less),
        part(lambda less, more, u: -less * more),
        part(lambda less, more, u: 2 * u.square()),
        -1.0,
    )


def _chi_square() -> Generator:
    return Generator(
        lambda x, m: _exp(2 * x + m) - _exp(m),
        lambda x, m: 2 * _exp(2 * x + m),
        lambda x, m: -_exp(2 * x + m) - _exp(m),
        lambda x, m: 2 * _exp(2 * x + m),
        -1.0,
    )


def _squared_hellinger() -> Generator:
    return Generator(
        lambda x, m: (_exp((x + m) / 2, 0.35) - _exp(m / 2, 0.35)).square(),
        lambda x, m: _exp(x + m) - _exp(x / 2 + m),
        lambda x, m: _exp(m) - _exp(x / 2 + m),
        lambda x, m: 0.5 * _exp(x / 2 + m),
        0.5,
    )


def _triangular() -> Generator:
    # (u - 1)^2 / (1 + u), with tanh(x / 2) = (u - 1) / (u + 1)
    def value(x: Tensor, m: Tensor) -> Tensor:
        return torch.tanh(x / 2).square() * (_exp(m) + _exp(x + m))

    def slope(x: Tensor, m: Tensor) -> Tensor:
        return torch.tanh(x / 2) * (1 + 2 * torch.sigmoid(-x)) * _exp(x + m)

    def intercept(x: Tensor, m: Tensor) -> Tensor:
        return -torch.tanh(x / 2) * (1 + 2 * torch.sigmoid(x)) * _exp(m)

    def curvature(x: Tensor, m: Tensor) -> Tensor:
        return 8 * _exp(m - 2 * _softplus(-x) - _softplus(x))

    return Generator(value, slope, intercept, curvature, (0.0, 1.0))


def _jeffreys() -> Generator:
    return Generator(
        lambda x, m: 0.5 * x * (_exp(x + m) - _exp(m)),
        lambda x, m: 0.5 * ((x + 1) * _exp(x + m) - _exp(m)),
        lambda x, m: 0.5 * ((1 - x) * _exp(m) - _exp(x + m)),
        lambda x, m: 0.5 * (_exp(m) + _exp(x + m)),
        (0.0, 1.0),
    )


def _log1p_abs() -> Generator:
    # u^sign(u - 1) - 1: named after log(1 + f) = |log u|
    def intercept(x: Tensor, m: Tensor) -> Tensor:
        inside = 2 * _exp(m - x) - _exp(m)
        return torch.where(x < 0, inside, torch.where(x > 0, -_exp(m), torch.zeros_like(inside)))

    return Generator(
        lambda x, m: _exp(x.abs() + m) - _exp(m), lambda x, m: torch.sign(x) * _exp(x.abs() + m), intercept, None
    )


def _modified_gan() -> Generator:
    # log(1 + u) - log u - log 2
    return Generator(
        lambda x, m: (_softplus(-x) - _LOG_2) * _exp(m),
        lambda x, m: -_exp(m - _softplus(x)),
        lambda x, m: (_softplus(-x) - _LOG_2) * _exp(m) + _exp(m - _softplus(x)),
        lambda x, m: (1 + torch.sigmoid(x)) * _exp(m - _softplus(x)),
        (1.0, 2.0),
    )


def arc_length() -> Generator:
    """``sqrt(1 + u^2) - (1 + u) / sqrt 2``: the length of the optimal ROC curve of p against q, less its least.

    The linear part changes no divergence between densities; with it the function and its slope vanish at u = 1. The
    value is written without the difference that would cancel there.

    Example:
        >>> x = torch.tensor([0.0, 1e-9], dtype=torch.float64)
        >>> [f"{x:.2g}" for x in arc_length().value(x).tolist()]
        ['0', '1.8e-19']
    """

    def value(x: Tensor, m: Tensor) -> Tensor:
        ratio = torch.exp(0.5 * _softplus(2 * x) - _softplus(x))
        return 0.5 * torch.tanh(x / 2).square() * (_exp(m) + _exp(x + m)) / (ratio + _ROOT_HALF)

    return Generator(
        value,
        lambda x, m: _exp(x + m - 0.5 * _softplus(-2 * x)) - _ROOT_HALF * _exp(x + m),
        lambda x, m: _exp(m - 0.5 * _softplus(2 * x)) - _ROOT_HALF * _exp(m),
        lambda x, m: _exp(2 * x + m - 1.5 * _softplus(2 * x)),
        None,
    )


_PLAIN: dict[str, Callable[[], Generator]] = {
    "arithmetic_geometric": _arithmetic_geometric,
    "chi_square": _chi_square,
    "jeffreys": _jeffreys,
    "jensen_shannon": _jensen_shannon,
    "kl_forward": _kl_forward,
    "kl_reverse": _kl_reverse,
    "log1p_abs": _log1p_abs,
    "modified_gan": _modified_gan,
    "pearson": _pearson,
    "squared_hellinger": _squared_hellinger,
    "total_variation": _total_variation,
    "triangular": _triangular,
}
KINDS = tuple(sorted([*_PLAIN, "amari_alpha", "t_power"]))
"""The named functions; ``amari_alpha`` and ``t_power`` take a number."""


def f_generator(kind: str, *, alpha: float | None = None, t: float | None = None) -> Generator:
    """Return the function of a name.

    Args:
        kind: One of :data:`KINDS`.
        alpha: The number of ``amari_alpha``; any real one, 0 and 1 being the two Kullback-Leibler divergences.
        t: The number of ``t_power``; any real one but 0 and 1, at which the function vanishes.

    Raises:
        ConfigError: If there is no such name, or a number is missing, out of range or given to another kind.

    Example:
        >>> ratios = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> [round(x, 4) for x in f_generator("pearson").value(ratios.log()).tolist()]
        [0.0, 4.0]
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no f-divergence {kind!r}; there are: {', '.join(KINDS)}.")
    for name, number, owner in (("alpha", alpha, "amari_alpha"), ("t", t, "t_power")):
        if kind != owner and number is not None:
            raise ConfigError(f"{name} belongs to {owner}, and was given with {kind}.")
        real = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        if kind == owner and not real:
            raise ConfigError(f"{owner} needs a real number {name}, as in {owner!r} with {name}=0.3; got {number!r}.")
    if kind == "amari_alpha" and alpha is not None:
        return _amari(float(alpha))
    if kind == "t_power" and t is not None:
        if t in (0, 1):
            raise ConfigError(f"t_power is zero for every pair of densities at t = 0 and t = 1; got t={t!r}.")
        return _power(float(t), -1.0 if 0 < t < 1 else 1.0)
    return _PLAIN[kind]()


def _amari(alpha: float) -> Generator:
    if abs(alpha) < _NEAR:
        return _kl_reverse()
    if abs(alpha - 1) < _NEAR:
        return _kl_forward()
    return _power(alpha, 1 / (alpha * (alpha - 1)))
