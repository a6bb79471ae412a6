"""Objectives whose steps are formulas: a batch of draws and scores gives the next Gaussian at once.

Both are unchanged by affine maps of the latents, so they are written where the current Gaussian is standard normal:
with ``S = F F^T`` a draw ``z = mean + F e`` is its noise ``e``, and its score ``g`` is ``h = F^T g``.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vifamily.numerics.gaussian_start import value_and_gradient
from vifamily.objectives._base import Objective, ValueKind
from vifamily.types import Batch, Capability, FamilyLike, Loss, ModelLike

__all__ = ["ClosedForm"]


class ClosedForm(Objective):
    r"""An objective that is driven by closed-form updates of a Gaussian with any covariance.

    Its value is the Fisher divergence weighted by the covariance S of q,

    .. math:: D(q) = E_q[(\nabla\log q - \nabla\log p)^T S (\nabla\log q - \nabla\log p)] = E |e + h|^2,

    which is zero at the posterior only, and does not depend on the units of the latents. It says how well q matches
    the scores; it is not minimised over q as a whole (see the entries). Scores say nothing about the weights of
    separate modes. The model's own parameters stay as they are: moving the target could fake a match.
    """

    needs_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOG_JOINT, Capability.SCORE})
    needs_family: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.DRAWS, Capability.GAUSSIAN, Capability.FULL_GAUSSIAN}
    )
    never_model: ClassVar[frozenset[Capability]] = frozenset({Capability.LOCAL})
    value_kind: ClassVar[ValueKind] = "divergence"
    subsampling: ClassVar[Literal["unbiased", "biased", "per_datum", "no"]] = "no"
    blind_to_mode_weights: ClassVar[bool] = True
    freezes_model: ClassVar[bool] = True
    own_solver: ClassVar[str | None] = "closed_form"

    @property
    def linear_in_draws(self) -> bool:
        """The divergence is a mean over draws, and so are small updates."""
        return True

    @abc.abstractmethod
    def move(self, e: Tensor, h: Tensor, step: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the next Gaussian, in coordinates where the current one is standard normal.

        Args:
            e: Draws, ``(..., draw, dim)``.
            h: Scores of the target there, ``(..., draw, dim)``.
            step: How far to trust the batch against the current Gaussian, positive.

        Returns:
            Its mean ``(..., dim)``; an orthonormal basis ``W`` ``(..., dim, rank)`` of the directions in which its
            covariance differs from the identity, or None for all; its covariance within them, ``M``
            ``(..., rank, rank)``, so that the covariance is ``I + W (M - I) W^T``.
        """

    def first_step(self, draws: int, dim: int) -> float:
        """Return the step to begin with."""
        return min(1.0, draws / dim)

    def update(self, mean: Tensor, factor: Tensor, z: Tensor, score: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Return the next mean and factor of the covariance.

        Args:
            mean: ``(..., dim)``.
            factor: Lower-triangular factor of the covariance, ``(..., dim, dim)``.
            z: Draws of the current Gaussian, ``(..., draw, dim)``.
            score: Gradient of the log joint at them, ``(..., draw, dim)``.
            step: See :meth:`move`.

        Returns:
            Mean ``(..., dim)`` and lower-triangular factor ``(..., dim, dim)``.
        """
        e = torch.linalg.solve_triangular(factor, (z - mean.unsqueeze(-2)).mT, upper=False).mT
        shift, basis, inner = self.move(e, score @ factor, step)
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        whole = inner if basis is None else eye + basis @ (inner - torch.eye(inner.shape[-1]).to(eye)) @ basis.mT
        return mean + (factor @ shift.unsqueeze(-1)).squeeze(-1), factor @ torch.linalg.cholesky(whole)

    def divergence(self, e: Tensor, h: Tensor) -> Tensor:
        """Weighted Fisher divergence estimated on draws of the current Gaussian, ``(..., draw, dim) -> (...)``."""
        return (e + h).square().sum(-1).mean(-1)

    def loss(
        self, family: FamilyLike, model: ModelLike, noise: Tensor, batch: Batch | None = None, state: Any = None
    ) -> Loss:
        """Evaluate the weighted Fisher divergence (see :class:`Objective`); it is reported, not differentiated."""
        with torch.no_grad():
            z = family(noise).z
            mean, covariance = family.moments()  # type: ignore[attr-defined]
            factor = torch.linalg.cholesky(covariance)
            e = torch.linalg.solve_triangular(factor, (z - mean.unsqueeze(-2)).mT, upper=False).mT
        _, score = value_and_gradient(lambda at: model.log_joint(at, batch), z)
        value = self.divergence(e, score @ factor)
        return Loss(value, value)


def span(*columns: Tensor) -> Tensor | None:
    """Orthonormal basis of the span of columns ``(..., dim, k)``, or None where they fill the space."""
    together = torch.cat(columns, dim=-1)
    if together.shape[-1] >= together.shape[-2]:
        return None
    basis: Tensor = torch.linalg.qr(together).Q
    return basis
