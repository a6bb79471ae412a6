"""Gaussian score matching: after each draw, the closest Gaussian that has the target's score there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from vifamily.objectives._closed_form import ClosedForm, span
from vifamily.registry import register

__all__ = ["Gsm"]


@register("objectives", "gsm")
@dataclasses.dataclass(frozen=True)
class Gsm(ClosedForm):
    r"""Gaussian score matching: the smallest change of q, in KL, that gives it the target's score at a draw.

    For one draw z with score g the Gaussian of least :math:`\mathrm{KL}(q_t \,\|\, q)` among those with
    :math:`\nabla\log q(z) = g` is known in closed form (Modi, Gower, Margossian, Yao, Blei and Saul 2023, "Variational
    inference with Gaussian score matching"). With :math:`e, h` the draw and its score in coordinates where q is
    standard normal,

    .. math:: \rho = \tfrac12\sqrt{1 + 4(|h|^2 + (e^T h)^2)} - \tfrac12, \quad
              \delta = \frac{1}{1+\rho}\Bigl(I + \frac{e h^T}{1 + \rho - e^T h}\Bigr)(e + h), \quad
              \Delta = e e^T - (e - \delta)(e - \delta)^T.

    Mean and covariance change by ``step`` times the averages of :math:`\delta` and :math:`\Delta` over the batch, which
    leaves the covariance positive definite; ``step = 1`` with one draw is the method as published.

    A Gaussian posterior is a fixed point at every draw. Otherwise the iterates never settle; the solver averages them
    and halves the step until that changes nothing, so that the answer is the Gaussian under which :math:`\delta` and
    :math:`\Delta` have mean zero. That is another point than that of ``batch_and_match``, and of no divergence.

    **Bias.** That of a finite step, which the solver removes by halving it. Minibatches would add to it: they are
    refused.

    **Blind to.** The weights of separate modes: scores do not see them.

    **Fails when.** The posterior is far from Gaussian: each draw asks for another Gaussian, and the average of them is
    near none. Of several modes it takes one.

    Source: Modi et al. 2023, "Variational inference with Gaussian score matching", the closed form for Gaussians.

    Example:
        >>> import vifamily as vf
        >>> posterior = vf.fit("correlated_normal", "full_rank", "gsm", solver="closed_form", seed=0)
        >>> posterior.record.stop_reason, posterior.record.restart_losses[0] < 1e-9
        ('converged', True)
    """

    default_draws = 16

    def first_step(self, draws: int, dim: int) -> float:
        """Begin undamped."""
        return 1.0

    def move(self, e: Tensor, h: Tensor, step: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """Average the changes of single draws (see :meth:`ClosedForm.move`)."""
        inner = (e * h).sum(-1, keepdim=True)
        square = h.square().sum(-1, keepdim=True)
        rho = 0.5 * (1 + 4 * (square + inner**2)).sqrt() - 0.5
        gap = e + h
        # rho is at least |e h| - 1/2, so the denominator is at least 1/2
        delta = (gap + e * (h * gap).sum(-1, keepdim=True) / (1 + rho - inner)) / (1 + rho)
        weight = (step / e.shape[-2]) ** 0.5
        grown, shrunk = weight * e.mT, weight * (e - delta).mT
        basis = span(grown, shrunk)
        if basis is not None:
            grown, shrunk = basis.mT @ grown, basis.mT @ shrunk
        eye = torch.eye(grown.shape[-2], dtype=e.dtype, device=e.device)
        return step * delta.mean(-2), basis, eye + grown @ grown.mT - shrunk @ shrunk.mT
