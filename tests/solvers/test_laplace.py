"""The Laplace approximation: exact on Gaussians, honest where there is no mode."""

import pytest
import torch

from vifamily.errors import IncompatibleError, NonFiniteLossError, NotAvailableError
from vifamily.fit import fit, plan
from vifamily.models import Density
from vifamily.testing import targets

DOUBLE = torch.float64


def normal(dim, *, dtype=DOUBLE):
    source = torch.Generator().manual_seed(dim)
    root = torch.randn(dim, dim, generator=source, dtype=DOUBLE)
    covariance = root @ root.mT / dim + 0.1 * torch.eye(dim, dtype=DOUBLE)
    mean = torch.randn(dim, generator=source, dtype=DOUBLE)
    precision = torch.linalg.inv(covariance).to(dtype)
    centre = mean.to(dtype)
    return (
        Density(lambda z: -0.5 * (((z - centre) @ precision) * (z - centre)).sum(-1), dim=dim, dtype=dtype),
        mean,
        covariance,
    )


@pytest.mark.parametrize("dim", [1, 5, 100])
def test_a_gaussian_is_recovered(dim):
    model, mean, covariance = normal(dim)
    posterior = fit(model, "full_rank", solver="laplace", seed=0)
    found, spread = posterior.family.moments()
    sd = covariance.diagonal().sqrt()
    assert posterior.record.stop_reason == "converged"
    assert float(((found - mean) / sd).abs().max()) < 1e-6
    assert float(((spread - covariance) / (sd[:, None] * sd)).abs().max()) < 1e-6


def test_a_conjugate_regression_is_exact_and_its_elbo_the_evidence():
    target = targets.linear_regression()
    posterior = fit(target.model, "full_rank", solver="laplace", seed=1)
    mean, covariance = posterior.family.moments()
    assert torch.allclose(mean, target.mean, atol=1e-6)
    assert torch.allclose(covariance, target.covariance, atol=1e-6)
    diagnosis = posterior.diagnose()
    assert posterior.record.restart_losses[0] == pytest.approx(-diagnosis.elbo.value, abs=1e-6)


def test_mean_field_gets_the_conditional_sds():
    model, mean, covariance = normal(4)
    found, spread = fit(model, "mean_field", solver="laplace", seed=0).family.moments()
    assert torch.allclose(found, mean, atol=1e-6)
    assert torch.allclose(spread.diagonal(), 1 / torch.linalg.inv(covariance).diagonal(), rtol=1e-5)


def test_single_precision_and_restarts():
    model, mean, covariance = normal(3, dtype=torch.float32)
    posterior = fit(model, "full_rank", solver="laplace", seed=0, restarts=3)
    found, spread = posterior.family.moments()
    assert found.dtype == torch.float32
    assert len(posterior.restarts) == 3
    assert torch.allclose(found.double(), mean, atol=2e-2)
    assert torch.allclose(spread.double(), covariance, atol=5e-2)


def test_no_mode_is_said():
    with pytest.raises(NotAvailableError, match="does not exist here"):
        fit(Density(lambda z: z.sum(-1), dim=2), "full_rank", solver="laplace", seed=0)
    with pytest.raises(NonFiniteLossError, match="not finite"):
        fit(Density(lambda z: z.sum(-1) * torch.nan, dim=2), "full_rank", solver="laplace", seed=0)


@pytest.mark.parametrize("family, objective", [("flow", "elbo"), ("full_rank", "renyi(alpha=0.5)")])
def test_what_it_cannot_do_is_refused(family, objective):
    with pytest.raises(IncompatibleError, match="'laplace'"):
        plan("banana", family, objective, "laplace")
