"""Batch and match: the Gaussian whose score matches the target's on a batch, not far from the current one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vifamily.objectives._closed_form import ClosedForm, span
from vifamily.registry import register

__all__ = ["BatchAndMatch", "solve_quadratic"]


@register("objectives", "batch_and_match")
@dataclasses.dataclass(frozen=True)
class BatchAndMatch(ClosedForm):
    r"""Score matching on batches, in closed form: each step minimises a score-based divergence near the last Gaussian.

    From draws :math:`z_b \sim q_t = N(\mu, S)` and scores :math:`g_b` the next Gaussian is the minimiser of

    .. math:: \frac1B \sum_b |\nabla\log q(z_b) - g_b|^2_{\mathrm{cov}(q)}
              + \frac2\lambda \mathrm{KL}(q_t \,\|\, q),

    whose covariance solves :math:`S' U S' + S' = V` (Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul 2024,
    "Batch and match"). With batch means :math:`\bar z, \bar g` and covariances :math:`C, \Gamma`,

    .. math:: U = \lambda\Gamma + \tfrac{\lambda}{1+\lambda}\bar g\bar g^T, \qquad
              V = S + \lambda C + \tfrac{\lambda}{1+\lambda}(\mu-\bar z)(\mu-\bar z)^T, \qquad
              \mu' = \tfrac{1}{1+\lambda}\mu + \tfrac{\lambda}{1+\lambda}(S'\bar g + \bar z).

    No step size depends on the scale of the problem and no log density is used. Where ``2 (B + 1) < dim`` the equation
    is solved in the span of the draws and scores, so that a step costs ``O(dim^2 B)``.

    A Gaussian posterior is a fixed point on every batch. Otherwise, as :math:`\lambda \to 0`, the answer is the
    Gaussian with :math:`E_q[g] = 0` and :math:`\mathrm{cov}_q(g) = S^{-1}`: what minimises the divergence when its
    draws are held fixed, which is not the q of least divergence. Since :math:`\mathrm{cov}_q(g)` exceeds the squared
    mean curvature, q is narrower than that of reverse KL where the curvature varies.

    **Bias.** At a fixed :math:`\lambda` the average of the iterates is off by an amount proportional to
    :math:`\lambda / B`, which the solver removes by halving :math:`\lambda`. Noise of minibatches would add to
    :math:`\Gamma` and make q too narrow: they are refused.

    **Blind to.** The weights of separate modes: scores do not see them.

    **Fails when.** Scores of the tails dominate the batch (funnels, heavy curvature), or the posterior has several
    modes, of which it takes one.

    Source: Cai et al. 2024, "Batch and match: black-box variational inference with a score-based divergence", the
    closed-form match step of section 3.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "full_rank", "batch_and_match", solver="closed_form", seed=0)
        >>> posterior.record.stop_reason, posterior.record.restart_losses[0] < 1e-9
        ('converged', True)
    """

    default_draws = 32

    def move(self, e: Tensor, h: Tensor, step: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """Match the batch (see :meth:`ClosedForm.move`); ``step`` is lambda."""
        at, slope = _columns(e, step), _columns(h, step)
        basis = span(at, slope)
        if basis is not None:
            at, slope = basis.mT @ at, basis.mT @ slope
        eye = torch.eye(at.shape[-2], dtype=e.dtype, device=e.device)
        inner = solve_quadratic(slope @ slope.mT, eye + at @ at.mT)
        mean_e, mean_h = e.mean(-2), h.mean(-2)
        # the mean score lies in the span, where the covariance is `inner`
        spread = _apply(inner, mean_h) if basis is None else _apply(basis, _apply(inner, _apply(basis.mT, mean_h)))
        return step / (1 + step) * (spread + mean_e), basis, inner


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _columns(x: Tensor, step: float) -> Tensor:
    """Columns ``A`` with ``A A^T = step cov(x) + step / (1 + step) mean(x) mean(x)^T``, ``(..., dim, draw + 1)``."""
    mean = x.mean(-2, keepdim=True)
    parts = [(step / x.shape[-2]) ** 0.5 * (x - mean), (step / (1 + step)) ** 0.5 * mean]
    return torch.cat(parts, dim=-2).mT


def solve_quadratic(u: Tensor, v: Tensor) -> Tensor:
    """Return the symmetric positive definite ``s`` with ``s u s + s = v``.

    Args:
        u: Symmetric positive semi-definite, ``(..., n, n)``.
        v: Symmetric positive definite, ``(..., n, n)``.

    Returns:
        ``(..., n, n)``. With ``v = L L^T`` it is ``L A L^T``, and ``A`` shares eigenvectors with ``L^T u L``, whose
        eigenvalue ``n`` becomes ``2 / (1 + sqrt(1 + 4 n))``.

    Example:
        >>> u, v = 2 * torch.eye(2), 3 * torch.eye(2)
        >>> [round(x, 4) for x in solve_quadratic(u, v).diagonal().tolist()]
        [1.0, 1.0]
    """
    factor = torch.linalg.cholesky(v)
    values, vectors = torch.linalg.eigh(factor.mT @ u @ factor)
    root = factor @ vectors * (2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt())).sqrt().unsqueeze(-2)
    solution: Tensor = root @ root.mT
    return solution
