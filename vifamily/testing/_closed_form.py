"""The contracts of objectives whose steps are formulas (see :class:`vifamily.objectives.ClosedForm`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vifamily.models import Density
from vifamily.numerics.gaussian_start import value_and_gradient
from vifamily.testing import targets, tolerances
from vifamily.testing._report import Broken, Contracts
from vifamily.testing._tools import agree, seeded

__all__ = ["check_closed_form"]

_STEP = 0.5


def check_closed_form(contracts: Contracts, objective: Any) -> None:
    """Run the contracts that take the place of those about gradients.

    Args:
        contracts: Where to record them.
        objective: An objective with ``update``, ``divergence`` and ``first_step``.
    """
    for contract in (
        _fixed_point, _exact_on_gaussians, _positive_definite, _units, _update_restarts, _small_batches, _mode_weights,
    ):  # fmt: skip
        contracts.run(contract.__name__.removeprefix("_"), contract, objective)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def _factor(dim: int, seed: int, *leading: int) -> Tensor:
    root = _random(*leading, dim, 2 * dim, seed=seed)
    factor: Tensor = torch.linalg.cholesky(root @ root.mT / dim)
    return factor


def _update(objective: Any, model: Any, mean: Tensor, factor: Tensor, e: Tensor, step: float) -> tuple[Tensor, Tensor]:
    z = mean.unsqueeze(-2) + e @ factor.mT
    _, score = value_and_gradient(model.log_joint, z)
    moved: tuple[Tensor, Tensor] = objective.update(mean, factor, z, score, step)
    return moved


def _fixed_point(objective: Any) -> None:
    """At a posterior that is Gaussian no batch moves it, and the divergence is zero on every batch."""
    target = targets.linear_regression()
    mean, covariance = target.moments()
    factor = torch.linalg.cholesky(covariance)
    for draws, step in ((1, 0.1), (4, 1.0), (40, 10.0)):
        e = _random(max(draws, objective.min_draws), 2, seed=draws)
        new_mean, new_factor = _update(objective, target.model, mean, factor, e, min(step, 1.0))
        agree(new_mean, mean, tolerances.EXACT, "the exact mean, unmoved")
        agree(new_factor, factor, tolerances.EXACT, "the exact factor, unmoved")
        _, score = value_and_gradient(target.model.log_joint, mean + e @ factor.mT)
        agree(objective.divergence(e, score @ factor), torch.zeros(()).double(), tolerances.EXACT, "no divergence")


def _exact_on_gaussians(objective: Any) -> None:
    """From elsewhere its steps end at the exact posterior of a conjugate model, to rounding."""
    target = targets.linear_regression()
    exact, covariance = target.moments()
    mean, factor = exact + 3.0, 4.0 * _factor(2, 3)
    draws = objective.default_draws
    for i in range(200):
        e = _random(draws, 2, seed=i)
        mean, factor = _update(objective, target.model, mean, factor, e, objective.first_step(draws, 2))
    agree(mean, exact, 1e-8, "the exact mean")
    agree(factor @ factor.mT, covariance, 1e-8, "the exact covariance")


def _positive_definite(objective: Any) -> None:
    """Scores of any size and sign leave the covariance positive definite."""
    for size in (1e-4, 1.0, 1e4):
        e, score = _random(6, 3, seed=1), size * _random(6, 3, seed=2)
        factor = _factor(3, 4)
        for sign in (1.0, -1.0):
            mean, new = objective.update(torch.zeros(3).double(), factor, e @ factor.mT, sign * score, _STEP)
            good = bool(torch.isfinite(mean).all() and torch.isfinite(new).all() and (new.diagonal() > 0).all())
            if not good:
                raise Broken(got=f"a factor with the diagonal {new.diagonal().tolist()}", expected="a positive one")


def _units(objective: Any) -> None:
    """An affine map of the latents maps the update: no answer depends on units."""
    e, score, factor = _random(5, 3, seed=1), _random(5, 3, seed=2), _factor(3, 5)
    mean, matrix, shift = _random(3, seed=6), _random(3, 3, seed=7) + 3 * torch.eye(3), _random(3, seed=8)
    z = mean + e @ factor.mT
    new_mean, new_factor = objective.update(mean, factor, z, score, _STEP)
    mapped = torch.linalg.cholesky(matrix @ factor @ factor.mT @ matrix.mT)
    other_score = torch.linalg.solve(matrix.mT, score.mT).mT
    other_mean, other = objective.update(matrix @ mean + shift, mapped, z @ matrix.mT + shift, other_score, _STEP)
    agree(other_mean, matrix @ new_mean + shift, 1e-9, "the mapped mean")
    agree(other @ other.mT, matrix @ new_factor @ new_factor.mT @ matrix.mT, 1e-9, "the mapped covariance")


def _update_restarts(objective: Any) -> None:
    """Several Gaussians at once equal one after the other."""
    mean, factor, e, score = _random(3, 2, seed=1), _factor(2, 2, 3), _random(3, 4, 2, seed=3), _random(3, 4, 2, seed=4)
    z = mean.unsqueeze(-2) + e @ factor.mT
    together = objective.update(mean, factor, z, score, _STEP)
    for r in range(3):
        alone = objective.update(mean[r], factor[r], z[r], score[r], _STEP)
        for a, b, what in zip(together, alone, ("mean", "factor"), strict=True):
            agree(a[r], b, tolerances.LOOP[torch.float64], f"the {what} of one restart alone")


def _small_batches(objective: Any) -> None:
    """With fewer draws than dimensions it changes the covariance in a basis, and as it would without one."""
    dim, draws = 12, max(objective.min_draws, 2)
    e, h = _random(draws, dim, seed=1), _random(draws, dim, seed=2)
    shift, basis, inner = objective.move(e, h, _STEP)
    if basis is None:
        raise Broken(got=f"a dense update from {draws} draws in {dim} dimensions", expected="an update in a basis")
    agree(basis.mT @ basis, torch.eye(basis.shape[-1]).double(), tolerances.EXACT, "an orthonormal basis")
    # the same draws many times over are the same batch, too large for a basis
    dense_shift, no_basis, whole = objective.move(e.repeat(10, 1), h.repeat(10, 1), _STEP)
    if no_basis is not None:
        raise Broken(got=f"a basis from {10 * draws} draws in {dim} dimensions", expected="a dense update")
    low = torch.eye(dim).double() + basis @ (inner - torch.eye(inner.shape[-1])) @ basis.mT
    agree(shift, dense_shift, 1e-8, "the mean of the dense update")
    agree(low, whole, 1e-8, "the covariance of the dense update")


def _mode_weights(objective: Any) -> None:
    """What it declares about modes is so: other weights of far modes leave a step at one of them unchanged."""

    def mixture(weight: float) -> Density:
        logs = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()
        return Density(
            lambda z: torch.stack([logs[i] - 0.5 * (z[:, 0] - c) ** 2 for i, c in enumerate((-8.0, 8.0))]).logsumexp(0),
            dim=1,
        )

    mean, factor, e = torch.full((1,), 7.5).double(), torch.full((1, 1), 1.2).double(), _random(8, 1, seed=1)
    one, other = (_update(objective, mixture(w), mean, factor, e, _STEP) for w in (0.5, 0.9))
    same = all(bool(((a - b).abs() < 1e-8).all()) for a, b in zip(one, other, strict=True))
    if same is not bool(objective.blind_to_mode_weights):
        raise Broken(
            got="the same step" if same else "another step",
            expected=f"what blind_to_mode_weights={objective.blind_to_mode_weights} says, at other mode weights",
        )
