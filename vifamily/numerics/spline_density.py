"""Densities on a fixed basis of B-splines: exponential families with a normaliser by quadrature."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch
from torch import Tensor

from vifamily.errors import ConfigError
from vifamily.numerics.exponential_family import ExponentialFamily

__all__ = ["SplineDensity", "spline_basis"]

_NODES = 10
"""Gauss-Legendre nodes between two knots."""
_CELLS, _NEWTON = 8, 4
"""Cells between two knots on which distribution functions are tabulated, and Newton steps from there."""
_ROWS = 1000
_SLOPE = math.pi / math.sqrt(3)
"""The logistic law of variance one has this slope."""


def spline_basis(t: Tensor, count: int, degree: int) -> Tensor:
    """B-splines on the unit interval with evenly spaced knots, the outer ones repeated, by the Cox-de Boor recursion.

    Args:
        t: Points from 0 to below 1, any shape.
        count: Number of splines.
        degree: Their degree.

    Returns:
        ``(..., count)``; they are non-negative and add up to one.

    Example:
        >>> spline_basis(torch.tensor([0.0, 0.5]), 3, 2).tolist()
        [[1.0, 0.0, 0.0], [0.25, 0.5, 0.25]]
    """
    knots = [0.0] * degree + np.linspace(0, 1, count - degree + 1).tolist() + [1.0] * degree
    at = torch.tensor(knots, dtype=t.dtype, device=t.device)
    x = t.unsqueeze(-1)
    basis = ((x >= at[:-1]) & (x < at[1:])).to(t)
    for d in range(1, degree + 1):
        left, right = at[d:-1] - at[: -d - 1], at[d + 1 :] - at[1:-d]
        # a spline between knots that coincide is zero
        rise = torch.where(left > 0, (x - at[: -d - 1]) / left.clamp_min(1e-30), 0.0)
        fall = torch.where(right > 0, (at[d + 1 :] - x) / right.clamp_min(1e-30), 0.0)
        basis = rise * basis[..., :-1] + fall * basis[..., 1:]
    return basis


@functools.lru_cache(maxsize=32)
def _rule(count: int, degree: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Quadrature on the unit interval, in ``parts`` between knots: splines ``(node, count)``, log weights."""
    place, weight = np.polynomial.legendre.leggauss(_NODES)
    cells = (count - degree) * parts
    t = ((np.arange(cells)[:, None] + (place + 1) / 2) / cells).ravel()
    weights = torch.as_tensor(np.tile(weight / 2, cells) / cells)
    return spline_basis(torch.as_tensor(t), count, degree), weights.log()


@dataclasses.dataclass(frozen=True)
class SplineDensity(ExponentialFamily):
    r"""Independent coordinates whose log density is a spline above a logistic law.

    .. math:: \log q(u) = \log h(u) + \sum_k \eta_k B_k(t) - \log \int_0^1 e^{\sum_k \eta_k B_k(t)} dt, \qquad
              t = \sigma\big(u \pi / \sqrt 3\big),

    with h the logistic density of mean 0 and variance 1, so that t is uniform where all coefficients vanish. A number
    that is uniform on an interval and moved to the real line by the logit is logistic there: t is then its place in the
    interval. The integral is one-dimensional, and taken by Gauss-Legendre quadrature between the knots. Statistics are
    the splines but the first, which the others determine. The family is convex in its coefficients and can have as many
    modes as there are splines for.

    Attributes:
        basis: Number of splines of each coordinate.
        degree: Their degree.

    Source: C. J. Stone (1990), "Large-sample inference for log-spline models".
    """

    basis: int = 16
    degree: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, least in (("degree", self.degree, 1), ("basis", self.basis, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if self.basis <= self.degree:
            raise ConfigError(
                f"splines of degree {self.degree} are {self.degree + 1} at least, got basis={self.basis}."
            )

    @property
    def num_outputs(self) -> int:
        """One less than there are splines, for each coordinate."""
        return self.dim * (self.basis - 1)

    def natural(self, output: Tensor) -> Tensor:
        """The identity."""
        return output

    def place(self, u: Tensor) -> Tensor:
        """Positions in the unit interval."""
        return torch.sigmoid(_SLOPE * u).clamp(max=1 - torch.finfo(u.dtype).eps)

    def statistics(self, theta: Tensor) -> Tensor:
        """The splines but the first, coordinate by coordinate."""
        out: Tensor = spline_basis(self.place(theta), self.basis, self.degree)[..., 1:].flatten(-2)
        return out

    def log_base(self, theta: Tensor) -> Tensor:
        """The logistic law."""
        u = _SLOPE * theta
        logistic = torch.nn.functional.logsigmoid
        return (logistic(u) + logistic(-u) + math.log(_SLOPE)).sum(-1)

    def _at_nodes(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Splines at the nodes ``(node, basis - 1)``, log density there plus log weight ``(..., dim, node)``."""
        splines, log_weight = _rule(self.basis, self.degree)
        inner = splines[:, 1:].to(eta)
        rows = eta.unflatten(-1, (self.dim, self.basis - 1))
        return inner, rows @ inner.mT + log_weight.to(eta)

    def log_partition(self, eta: Tensor) -> Tensor:
        """By quadrature, summed over coordinates."""
        return self._at_nodes(eta)[1].logsumexp(-1).sum(-1)

    def mean(self, eta: Tensor) -> Tensor:
        """Means of the splines, by the same quadrature: exactly the gradient of the log partition."""
        inner, each = self._at_nodes(eta)
        out: Tensor = (each.softmax(-1) @ inner).flatten(-2)
        return out

    def from_mean(self, mean: Tensor) -> Tensor:
        """Newton's method with steps halved until the convex loss falls."""
        eta = torch.zeros_like(mean)
        for _ in range(60):
            step = self.natural_gradient(eta, mean)
            size, here = torch.ones_like(mean[..., :1]), self.loss(eta, mean)
            for _ in range(30):
                worse = self.loss(eta - size * step, mean) > here
                if not bool(worse.any()):
                    break
                size = torch.where(worse.unsqueeze(-1), 0.5 * size, size)
            eta = eta - size * step
        return eta

    def cdf(self, t: Tensor, eta: Tensor) -> Tensor:
        """Distribution function of positions in the unit interval, by quadrature between the knots.

        Args:
            t: ``(draw, [datum,] dim)``.
            eta: ``([datum,] num_natural)``.
        """
        count = self.basis - self.degree
        _, each = self._at_nodes(eta)
        masses = (each - each.logsumexp(-1, keepdim=True)).exp().unflatten(-1, (count, _NODES)).sum(-1)
        before = torch.nn.functional.pad(masses.cumsum(-1), (1, 0))
        span = (t.detach() * count).floor().clamp(0, count - 1)
        left = span / count
        place, weight = (torch.as_tensor(v).to(t) for v in np.polynomial.legendre.leggauss(_NODES))
        width = (t - left).unsqueeze(-1)
        nodes = (left.unsqueeze(-1) + width * (place + 1) / 2).clamp(max=1 - torch.finfo(t.dtype).eps)
        part = (self._height(nodes, eta) - self._log_total(eta).unsqueeze(-1)).exp() @ weight * width.squeeze(-1) / 2
        passed = before.expand(*t.shape, count + 1).gather(-1, span.long().unsqueeze(-1)).squeeze(-1)
        out: Tensor = passed + part
        return out

    def _height(self, t: Tensor, eta: Tensor) -> Tensor:
        """The spline at positions ``(..., dim, node)``."""
        rows = eta.unflatten(-1, (self.dim, self.basis - 1))
        basis = spline_basis(t, self.basis, self.degree)[..., 1:]
        out: Tensor = (basis @ rows.unsqueeze(-1)).squeeze(-1)
        return out

    def _log_total(self, eta: Tensor) -> Tensor:
        return self._at_nodes(eta)[1].logsumexp(-1)

    def quantile(self, uniform: Tensor, eta: Tensor) -> Tensor:
        """Points whose distribution function is ``uniform``; their gradient is that of the implicit function.

        Args:
            uniform: ``(draw, [datum,] dim)``.
            eta: ``([datum,] num_natural)``.
        """
        with torch.no_grad():
            t = self._inverted(uniform.double(), eta.detach().double())
        wide = eta.double()
        with torch.no_grad():
            slope = (self._height(t.unsqueeze(-1), wide).squeeze(-1) - self._log_total(wide)).exp()
        if torch.is_grad_enabled() and eta.requires_grad:
            reached = self.cdf(t, wide)
            t = t - (reached - reached.detach()) / slope.clamp_min(1e-300)
        return (torch.logit(t) / _SLOPE).to(uniform)

    def _inverted(self, uniform: Tensor, eta: Tensor) -> Tensor:
        """Positions from a table of the distribution function, then by Newton steps inside their cell to rounding."""
        cells = _CELLS * (self.basis - self.degree)
        splines, log_weight = _rule(self.basis, self.degree, _CELLS)
        height = eta.unflatten(-1, (self.dim, self.basis - 1)) @ splines[:, 1:].to(eta).mT + log_weight.to(eta)
        masses = (height - height.logsumexp(-1, keepdim=True)).exp().unflatten(-1, (cells, _NODES)).sum(-1)
        table = torch.nn.functional.pad(masses.cumsum(-1), (1, 0))
        wanted = uniform.movedim(0, -1).contiguous()
        upper = torch.searchsorted(table, wanted).clamp(1, cells)
        low, high = table.gather(-1, upper - 1), table.gather(-1, upper)
        share = ((wanted - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        least, most = ((v / cells).movedim(-1, 0) for v in (upper - 1, upper))
        t = ((upper - 1 + share) / cells).movedim(-1, 0)
        tiny = 1e-15
        for _ in range(_NEWTON):
            slope = (self._height(t.unsqueeze(-1), eta).squeeze(-1) - self._log_total(eta)).exp()
            t = t - (self.cdf(t, eta) - uniform) / slope.clamp_min(1e-300)
            t = torch.minimum(torch.maximum(t, least), most).clamp(tiny, 1 - tiny)
        return t

    def sample(self, eta: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw by the inverse of the distribution function."""
        shape = (*eta.shape[:-1], self.dim)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        rows, laws = uniform.reshape(-1, self.dim).to(eta.device), eta.reshape(-1, eta.shape[-1])
        # every row has a table of its own
        parts = zip(rows.split(_ROWS), laws.split(_ROWS), strict=True)
        drawn = torch.cat([self.quantile(u.unsqueeze(0), law).squeeze(0) for u, law in parts])
        return drawn.reshape(shape).to(eta)

    def near_normal(self, mean: Tensor, sd: Tensor) -> Tensor:
        """Coefficients under which the law is near a normal one, by least squares of the log density.

        Args:
            mean: ``(dim,)``.
            sd: ``(dim,)``.
        """
        splines, _ = _rule(self.basis, self.degree)
        count = self.basis - self.degree
        place, _ = np.polynomial.legendre.leggauss(_NODES)
        t = torch.as_tensor(((np.arange(count)[:, None] + (place + 1) / 2) / count).ravel())
        u = torch.logit(t) / _SLOPE
        m, s = mean.double().cpu().unsqueeze(-1), sd.double().cpu().unsqueeze(-1)
        wanted = -0.5 * ((u - m) / s).square() - self.log_base(u.unsqueeze(-1))
        # where the normal law has its mass; far from there the spline need not follow it
        weight = torch.exp(-0.25 * ((u - m) / s).square()).clamp_min(1e-3)
        rows = splines.unsqueeze(0) * weight.unsqueeze(-1)
        found = torch.linalg.lstsq(rows.expand(len(wanted), -1, -1), (weight * wanted).unsqueeze(-1)).solution
        found = found.squeeze(-1)
        out: Tensor = (found[:, 1:] - found[:, :1]).flatten().to(mean)
        return out
