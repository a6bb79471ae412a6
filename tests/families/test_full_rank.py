"""The Gaussian and Student-t with a full scale matrix."""

import pytest
import scipy.stats
import torch

from vifamily.families.full_rank import FullRank, strict_lower, whiten
from vifamily.types import LatentSpec

FACTOR = torch.tensor([[0.5, 0, 0], [0.3, 2.0, 0], [-0.4, 0.1, 1.0]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
POINT = torch.tensor([[0.3, 1.0, -0.2]], dtype=torch.float64)


def built(**options):
    return FullRank(**options).build(LatentSpec(3), generator=torch.Generator().manual_seed(0))


def test_density_is_multivariate_normal():
    family = built()
    family.start_at(MEAN, FACTOR)
    expected = scipy.stats.multivariate_normal(MEAN.numpy(), (FACTOR @ FACTOR.T).numpy()).logpdf(POINT[0].numpy())
    assert family.log_prob(POINT).item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(family.moments()[1], FACTOR @ FACTOR.T, rtol=1e-12, atol=1e-12)


def test_student_density_is_multivariate_t():
    family = built(student_t=5)
    family.start_at(MEAN, FACTOR)
    scale = (FACTOR @ FACTOR.T * 3 / 5).numpy()
    expected = scipy.stats.multivariate_t(MEAN.numpy(), scale, df=5)
    assert family.log_prob(POINT).item() == pytest.approx(expected.logpdf(POINT[0].numpy()), abs=1e-12)
    assert family.entropy().item() == pytest.approx(expected.entropy(), abs=1e-10)
    torch.testing.assert_close(family.moments()[1], FACTOR @ FACTOR.T, rtol=1e-12, atol=1e-12)


def test_a_factor_with_negative_diagonal_gives_the_same_covariance():
    family = built()
    family.start_at(MEAN, FACTOR * torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(family.moments()[1], FACTOR @ FACTOR.T, rtol=1e-12, atol=1e-12)


def test_units_of_a_coordinate_change_one_parameter():
    a, b = built(), built()
    a.start_at(MEAN, FACTOR)
    b.start_at(MEAN, FACTOR * torch.tensor([[1.0], [1000.0], [1.0]]))
    torch.testing.assert_close(a.lower, b.lower)
    assert (a.log_diagonal != b.log_diagonal).tolist() == [False, True, False]


def test_whitening_solves_the_triangular_system():
    position = torch.tensor([[3, 3, 3], [0, 3, 3], [1, 2, 3]])
    values = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.3]], dtype=torch.float64)
    r = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lower = strict_lower(values, position)
    x = whiten(lower, r)
    torch.testing.assert_close(x + torch.einsum("nij,dnj->dni", lower, x), r)
    x = whiten(lower[0], r)
    torch.testing.assert_close(x + x @ lower[0].T, r)
