"""Diagonal plus low rank."""

import time

import pytest
import scipy.stats
import torch

from vifamily.errors import ConfigError
from vifamily.families.low_rank import LowRank
from vifamily.types import LatentSpec


def built(dim=4, **options):
    return LowRank(**options).build(LatentSpec(dim), generator=torch.Generator().manual_seed(0))


def spread(family):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in family.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return family


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_density_and_entropy_are_those_of_the_dense_covariance(rank):
    family = spread(built(rank=rank))
    mean, covariance = (t.detach().numpy() for t in family.moments())
    z = torch.tensor([[0.3, 1.0, -0.2, 2.0]], dtype=torch.float64)
    dense = scipy.stats.multivariate_normal(mean, covariance)
    assert family.log_prob(z).item() == pytest.approx(dense.logpdf(z[0].numpy()), abs=1e-10)
    assert family.entropy().item() == pytest.approx(dense.entropy(), abs=1e-10)


def test_student_density_is_multivariate_t():
    family = spread(built(rank=2, student_t=6))
    mean, covariance = (t.detach().numpy() for t in family.moments())
    dense = scipy.stats.multivariate_t(mean, covariance * 4 / 6, df=6)
    z = torch.tensor([[0.3, 1.0, -0.2, 2.0]], dtype=torch.float64)
    assert family.log_prob(z).item() == pytest.approx(dense.logpdf(z[0].numpy()), abs=1e-10)
    assert family.entropy().item() == pytest.approx(dense.entropy(), abs=1e-10)


def test_start_at_recovers_a_covariance_of_its_rank():
    loading = torch.tensor([[1.0], [-0.5], [2.0], [0.7]], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([0.5, 1.0, 0.3, 2.0], dtype=torch.float64)) + loading @ loading.T
    family = built(rank=1)
    with torch.no_grad():
        family.factor.mul_(1e-3)
    family.start_at(torch.zeros(4), torch.linalg.cholesky(covariance))
    found = family.moments()[1].detach()
    torch.testing.assert_close(found.diagonal(), covariance.diagonal(), rtol=1e-10, atol=0)
    sd = covariance.diagonal().sqrt()
    # the small random part that keeps gradients alive is what is left
    assert ((found - covariance) / sd / sd[:, None]).abs().max().item() < 0.2


def test_thousands_of_coordinates_are_cheap():
    family = built(5000, rank=5)
    noise = torch.randn(8, *family.noise_spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    draw = family(noise)
    (draw.log_q + family.log_prob(draw.z, frozen=True) + family.entropy()).sum().backward()
    assert time.perf_counter() - began < 2
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in family.parameters())


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_bad_ranks_are_refused(rank):
    with pytest.raises(ConfigError, match="rank"):
        LowRank(rank=rank)


def test_a_rank_above_the_dimension_is_refused():
    with pytest.raises(ConfigError, match="rank=5 exceeds the 4"):
        built(rank=5)
