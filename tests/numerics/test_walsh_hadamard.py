"""Products, moments and divergences of Walsh-Hadamard matrices, against worked numbers and dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vifamily.errors import ShapeError
from vifamily.numerics.hadamard import hadamard
from vifamily.numerics.walsh_hadamard import (
    isotropic_cross_entropy,
    isotropic_log_prior,
    isotropic_spectrum,
    normal_kl,
    walsh_covariance,
    walsh_matrix,
    walsh_output_covariance,
    walsh_output_moments,
    walsh_product,
)
from vifamily.rng import scoped


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


LEFT, RIGHT = _t(1, 2, -1, 0.5), _t(0.5, -1, 2, 1)
MEAN, SD, X = _t(1, 0, -1, 2), _t(0.5, 0.2, 0.1, 1), _t(1, -1, 2, 0.5)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _entropy(variance: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, variance.sqrt()).entropy().sum(-1)


def _close(got: Tensor, want: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_worked_matrix_and_product() -> None:
    want = torch.stack([_t(0.25, 0.5, 0, 1), _t(-0.5, -1, 4, 0), _t(0, 1, -1, 0.5), _t(0.25, 0, -0.5, 0.25)])
    _close(walsh_matrix(LEFT, MEAN, RIGHT), want)
    _close(walsh_product(X, LEFT, MEAN, RIGHT), _t(0.25, 8.5, -2.75, -0.625))


def test_worked_moments() -> None:
    mean, variance = walsh_output_moments(X, LEFT, MEAN, SD**2, RIGHT)
    _close(mean, _t(0.25, 8.5, -2.75, -0.625))
    _close(variance, _t(1.590625, 6.3625, 1.590625, 0.39765625))
    covariance = walsh_output_covariance(X, LEFT, SD**2, RIGHT)
    _close(covariance[0], _t(1.590625, -0.90875, 0.420625, 0.7671875))
    entries = walsh_covariance(LEFT, SD**2, RIGHT)
    _close(entries[0, [0, 1, 2, 3], 0, [0, 1, 2, 3]], _t(0.0203125, 0.08125, 0.325, 0.08125))
    _close(entries[0, 1, 2, 3], torch.tensor(0.08125, dtype=torch.float64))


def test_worked_divergences() -> None:
    _close(normal_kl(MEAN, 0.7, variance=SD**2), torch.tensor(7.10610601, dtype=torch.float64), 5e-9)
    _close(isotropic_spectrum(LEFT, RIGHT) * 4, _t(8.5, 4, 8.5, 18.0625))
    kl = isotropic_cross_entropy(MEAN, LEFT, RIGHT, 0.9, variance=SD**2) - _entropy(SD**2)
    _close(kl, torch.tensor(15.71404139, dtype=torch.float64), 5e-9)


def test_covariance_and_spectrum_are_those_of_the_linear_map(generator: torch.Generator) -> None:
    left, right, variance = _normal(generator, 8), _normal(generator, 8), _normal(generator, 8).exp()
    linear = torch.stack([walsh_matrix(left, e, right).flatten() for e in torch.eye(8, dtype=torch.float64)], -1)
    _close(walsh_covariance(left, variance, right).reshape(64, 64), linear * variance @ linear.mT)
    gram = linear.mT @ linear
    _close(gram, hadamard(hadamard(torch.diag(isotropic_spectrum(left, right))).mT))
    precision = gram / 0.9**2
    prior = torch.distributions.MultivariateNormal(torch.zeros(8, dtype=torch.float64), precision_matrix=precision)
    core = _normal(generator, 3, 8)
    _close(isotropic_log_prior(core, left, right, 0.9), prior.log_prob(core), 1e-9)


def test_divergences_of_dependent_coordinates_against_dense_ones(generator: torch.Generator) -> None:
    mean, variance, factor = _normal(generator, 8), _normal(generator, 8).exp(), _normal(generator, 8, 2)
    left, right = _normal(generator, 8), _normal(generator, 8)
    covariance = torch.diag(variance) + factor @ factor.mT
    q = torch.distributions.MultivariateNormal(mean, covariance)
    eye = torch.eye(8, dtype=torch.float64)
    p = torch.distributions.MultivariateNormal(torch.zeros(8, dtype=torch.float64), 0.7 * eye)
    want = torch.distributions.kl_divergence(q, p)
    _close(normal_kl(mean, 0.7, variance=variance, factor=factor), want)
    _close(normal_kl(mean, 0.7, scale_tril=torch.linalg.cholesky(covariance)), want)
    gram = walsh_matrix(torch.ones(8, dtype=torch.float64), isotropic_spectrum(left, right), torch.ones(8).double())
    r = torch.distributions.MultivariateNormal(torch.zeros(8, dtype=torch.float64), precision_matrix=gram / 0.81)
    got = isotropic_cross_entropy(mean, left, right, 0.9, covariance=covariance) - q.entropy()
    _close(got, torch.distributions.kl_divergence(q, r), 1e-8)
    diagonal = isotropic_cross_entropy(mean, left, right, 0.9, covariance=torch.diag(variance))
    _close(diagonal, isotropic_cross_entropy(mean, left, right, 0.9, variance=variance))


def test_isotropic_divergence_is_blind_to_a_moved_scale_and_the_latent_one_is_not() -> None:
    def kl(c: float) -> Tensor:
        cross = isotropic_cross_entropy(MEAN / c, LEFT * c, RIGHT, 0.9, variance=(SD / c) ** 2)
        return cross - _entropy((SD / c) ** 2)

    _close(kl(3.3), kl(1.0))
    assert abs(normal_kl(MEAN / 3.3, 1.0, variance=(SD / 3.3) ** 2) - normal_kl(MEAN, 1.0, variance=SD**2)) > 0.1


def test_cross_entropy_agrees_with_draws(generator: torch.Generator) -> None:
    draws = MEAN + SD * _normal(generator, 50_000, 4)
    terms = -isotropic_log_prior(draws, LEFT, RIGHT, 0.9)
    want = isotropic_cross_entropy(MEAN, LEFT, RIGHT, 0.9, variance=SD**2)
    assert abs(terms.mean() - want) < 5 * terms.std() / 50_000**0.5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch, on its first forward derivative
def test_derivatives(generator: torch.Generator) -> None:
    inputs = [_normal(generator, 2, 4).requires_grad_() for _ in range(3)]
    with scoped(0):  # these checks draw from the global generator
        assert torch.autograd.gradcheck(walsh_matrix, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(walsh_matrix, inputs)
        assert torch.autograd.gradcheck(walsh_product, [_normal(generator, 2, 4).requires_grad_(), *inputs])
        assert torch.autograd.gradcheck(lambda *a: isotropic_log_prior(*a, 0.9), inputs)
    mapped = torch.vmap(walsh_matrix)(*inputs)
    _close(mapped, walsh_matrix(*inputs))


def test_unclear_laws_are_refused() -> None:
    with pytest.raises(ShapeError, match="triangular"):
        normal_kl(MEAN, 1.0)
    with pytest.raises(ShapeError, match="either"):
        isotropic_cross_entropy(MEAN, LEFT, RIGHT, 1.0)
