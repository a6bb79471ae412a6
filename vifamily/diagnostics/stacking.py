"""Combine the restarts of a fit into one mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, DataError, NotAvailableError, ShapeError
from vifamily.families._base import Family
from vifamily.types import Capability, Draw, Space

__all__ = ["RestartMixture", "importance_mixture_weights", "maximise_mixture", "stacking_weights"]


def maximise_mixture(
    log_density: Tensor,
    log_weight: Tensor | None = None,
    *,
    max_steps: int = 10_000,
    tolerance: float = 1e-10,
    within_noise: bool = False,
) -> Tensor:
    r"""Mixture weights that maximise :math:`\sum_s w_s \log \sum_r \pi_r p_{sr}`, by expectation maximisation.

    The problem is concave; every step raises the criterion and keeps the weights on the simplex.

    Args:
        log_density: ``log p_sr``, ``(point, component)``.
        log_weight: ``log w_s``, ``(point,)``; equal by default.
        max_steps: Steps at most.
        tolerance: Stop when no component's log gradient is above this (it bounds what is left to gain, in nats).
        within_noise: Stop also when no gradient is above its Monte-Carlo error: components that the points cannot tell
            apart keep equal weights.

    Returns:
        ``(component,)``, non-negative, summing to one.

    Raises:
        ShapeError: If the shapes disagree.
        DataError: If no point with weight has a finite density.

    Example:
        >>> maximise_mixture(torch.tensor([[0.0, -9.0], [0.0, -9.0], [-9.0, 0.0], [-9.0, 0.0]])).tolist()
        [0.5, 0.5]
    """
    if log_density.dim() != 2 or (log_weight is not None and log_weight.shape != log_density.shape[:1]):
        raise ShapeError(f"mixture weights need densities (point, component), got {tuple(log_density.shape)}.")
    density = log_density.detach().to("cpu", torch.float64)
    size, count = density.shape
    weight = torch.zeros(size, dtype=torch.float64)
    if log_weight is not None:
        weight = log_weight.detach().to("cpu", torch.float64).log_softmax(0)
    kept = (weight > -math.inf) & (density.max(1).values > -math.inf)
    if not bool(kept.any()) or bool(density[kept].isnan().any()):
        raise DataError("no point has a finite density under a component: nothing to weigh the components by.")
    density, weight = density[kept], weight[kept]
    log_pi = torch.full((count,), -math.log(count), dtype=torch.float64)
    total = torch.logsumexp(weight, 0)
    for _ in range(max_steps):
        mixed = torch.logsumexp(density + log_pi, 1, keepdim=True)
        # log of the criterion's gradient, which multiplies the weights in the next step
        gradient = torch.logsumexp(weight[:, None] + density - mixed, 0) - total
        if float(gradient.max()) < tolerance:
            break
        if within_noise:
            share = (weight - total).exp()[:, None]
            error = (share**2 * ((density - mixed).exp() - gradient.exp()) ** 2).sum(0).sqrt()
            if bool((gradient.exp() - 1 <= error).all()):
                break
        log_pi = (log_pi + gradient).log_softmax(0)
    return log_pi.exp()


def stacking_weights(pointwise: Tensor) -> Tensor:
    """Stacking weights: the mixture with the best leave-one-out log score.

    Yao et al. 2022, Stacking for non-mixing Bayesian computations, equation 4, with each restart as one inference.

    Args:
        pointwise: ``log p(y_i | y_-i)`` under each restart, ``(datum, restart)``.

    Returns:
        ``(restart,)``, non-negative, summing to one.

    Example:
        >>> stacking_weights(torch.tensor([[0.0, -1.0], [0.0, -2.0]])).round(decimals=6).tolist()
        [1.0, 0.0]
    """
    return maximise_mixture(pointwise)


def importance_mixture_weights(log_joint: Tensor, log_q: Tensor) -> Tensor:
    r"""Weights of the mixture of restarts nearest to the posterior in inclusive divergence.

    Draws from every restart alike are draws of the equal mixture; with multiple-importance weights
    :math:`w_s \propto p(z_s, y) / \tfrac1R \sum_r q_r(z_s)` (balance heuristic, Veach and Guibas 1995) the mixture that
    maximises :math:`\sum_s w_s \log \sum_r \pi_r q_r(z_s)` minimises :math:`KL(p \| q_\pi)` (Cappé et al. 2008).
    Restarts that cover separate modes get the masses of the modes; restarts that the draws cannot tell apart keep equal
    weights.

    Args:
        log_joint: ``log p(z_s, y)``, ``(draw,)``, as many draws from each restart.
        log_q: ``log q_r(z_s)``, ``(draw, restart)``.

    Returns:
        ``(restart,)``, non-negative, summing to one.
    """
    if log_q.dim() != 2 or log_joint.shape != log_q.shape[:1]:
        raise ShapeError(
            f"importance weights need log joint (draw,) and log q (draw, restart), got {tuple(log_q.shape)}."
        )
    ratio = log_joint - torch.logsumexp(log_q, 1)
    ratio = torch.where(ratio.isnan() | (ratio == math.inf), torch.full_like(ratio, -math.inf), ratio)
    return maximise_mixture(log_q, ratio, within_noise=True)


class RestartMixture(Family):
    r"""The mixture :math:`\sum_r \pi_r q_r(z)` of fitted families, fixed.

    As a map of noise its draws are stratified: every component takes all the noise, and its draws carry its weight.
    :meth:`sample` gives equally weighted draws.

    Args:
        components: Families with one noise specification.
        weights: ``(component,)``, non-negative, summing to one.

    Raises:
        ConfigError: If there are no components, they differ in kind, or the weights do not fit.
    """

    vectorised = False

    def __init__(self, components: Sequence[Family], weights: Tensor) -> None:
        if not components:
            raise ConfigError("a mixture of restarts needs at least one component.")
        first = components[0]
        if any(c.noise_spec != first.noise_spec or c.dim != first.dim for c in components):
            raise ConfigError("the components of a mixture of restarts must be families of one kind and dimension.")
        if first.latent.context_dim is not None:
            raise ConfigError("families with a context cannot be mixed over restarts.")
        super().__init__(first.latent)
        if weights.shape != (len(components),) or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-6:
            raise ConfigError(f"mixture weights must be {len(components)} non-negative numbers that sum to one.")
        self.components = nn.ModuleList([c.copy() for c in components])
        self.mixture_weights: Tensor
        self.register_buffer("mixture_weights", weights.detach().to(first.latent.device, first.latent.dtype).clone())
        self.noise_spec = first.noise_spec
        common = frozenset.intersection(*(frozenset(c.capabilities) for c in components))
        self.capabilities = frozenset({Capability.DRAWS, Capability.WEIGHTED}) | (common & {Capability.LOG_Q})
        for parameter in self.parameters():
            parameter.requires_grad = False

    def members(self) -> list[Family]:
        """Return the component families."""
        return [part for part in self.components if isinstance(part, Family)]

    def transform(self, noise: Tensor, context: Tensor | None) -> Draw:
        """Map noise ``(draw, ...)`` to weighted draws, those of all components one after the other."""
        parts = [component(noise) for component in self.members()]
        z = torch.cat([part.z for part in parts])
        log_pi = self.mixture_weights.log()
        log_weight = torch.cat([part.log_weight + log_pi[r] for r, part in enumerate(parts)])
        log_q = self.log_density(z, None) if Capability.LOG_Q in self.capabilities else None
        return Draw(z, log_q, log_weight)

    def log_density(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Log density of the mixture, ``(..., dim) -> (...)``."""
        if Capability.LOG_Q not in self.capabilities:
            raise NotAvailableError("the mixed families have no density: they are samplers only.")
        parts = torch.stack([component.log_prob(u) for component in self.members()], -1)
        return torch.logsumexp(parts + self.mixture_weights.log(), -1)

    @torch.no_grad()
    def sample(self, num_draws: int, *, generator: torch.Generator, context: Tensor | None = None) -> Tensor:
        """Draw ``num_draws`` equally weighted points, ``(num_draws, dim)``, in random order."""
        weights = self.mixture_weights.double().to(generator.device)
        chosen = torch.multinomial(weights, num_draws, replacement=True, generator=generator)
        out = self.shift.new_empty(num_draws, self.dim)
        for r, component in enumerate(self.members()):
            where = (chosen == r).nonzero().squeeze(-1).to(out.device)
            if where.numel():
                out[where] = component.sample(where.numel(), generator=generator)
        return out

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance, from those of the components."""
        if self.latent.space is not Space.REAL:
            raise NotAvailableError("closed-form moments are there for real spaces only.")
        pairs = [component.moments() for component in self.members()]
        means, covariances = (torch.stack(p) for p in zip(*pairs, strict=True))
        mean = self.mixture_weights @ means
        second = covariances + means.unsqueeze(-1) * means.unsqueeze(-2)
        return mean, torch.einsum("r,rij->ij", self.mixture_weights, second) - mean[:, None] * mean
