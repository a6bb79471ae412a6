"""Linear-response covariances: exact for Gaussian posteriors, the derivative of a refit elsewhere."""

import pytest
import torch

import vifamily as vf
from vifamily.errors import NotAvailableError
from vifamily.posterior import _linear_response

DOUBLE = torch.float64
COVARIANCE = torch.tensor([[4.0, 1.9, 0.3], [1.9, 1.0, 0.2], [0.3, 0.2, 9.0]], dtype=DOUBLE)
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(z):
    return -0.5 * ((z @ PRECISION) * z).sum(-1)


def banana(tilt=(0.0, 0.0)):
    push = torch.tensor(tilt, dtype=DOUBLE)
    return vf.models.Density(
        lambda z: -0.5 * z[:, 0] ** 2 - 2 * (z[:, 1] - 0.3 * z[:, 0] ** 2) ** 2 - 0.3 * z[:, 0] * z[:, 1] + z @ push,
        dim=2,
    )


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
@pytest.mark.parametrize("dense", [400, 0])
def test_it_is_the_covariance_of_a_gaussian_posterior(family, dense, monkeypatch):
    monkeypatch.setattr(_linear_response, "_DENSE", dense)
    posterior = vf.fit(vf.models.Density(gaussian, dim=3), family, seed=0)
    found = posterior.covariance(linear_response=True, num_draws=64)
    assert torch.allclose(found, COVARIANCE, rtol=1e-3, atol=1e-3)
    if family == "mean_field":  # whose own covariance is that of the conditionals
        assert torch.allclose(posterior.covariance(), torch.diag(1 / PRECISION.diagonal()), rtol=0.05)


def test_it_is_how_the_means_of_a_refit_move():
    # fits of one seed share their fixed draws
    options = {
        "family": "mean_field",
        "solver": "lbfgs(tolerance=0.001, most_draws=4096)",
        "seed": 1,
        "draws": 1024,
        "steps": 500,
    }
    size = 0.02
    columns = []
    for i in range(2):
        tilts = [tuple(sign * size * (i == j) for j in range(2)) for sign in (1, -1)]
        up, down = (vf.fit(banana(tilt), **options).mean() for tilt in tilts)
        columns.append((up - down) / (2 * size))
    posterior = vf.fit(banana(), **options)
    found = posterior.covariance(linear_response=True, num_draws=20_000)
    # different draws: their Monte-Carlo error is well below three per cent here
    assert torch.allclose(found, torch.stack(columns), rtol=0.05, atol=0.02)
    assert float(found[0, 0]) > float(posterior.covariance()[0, 0])


def test_of_constrained_parameters():
    # log x ~ normal(0, 0.1): x is nearly normal with sd 0.1
    model = vf.models.Density(
        lambda theta: -0.5 * (theta["x"].log() / 0.1) ** 2 - theta["x"].log(), parameters={"x": "positive"}
    )
    posterior = vf.fit(model, "mean_field", seed=0)
    assert float(posterior.covariance(linear_response=True)[0, 0]) == pytest.approx(0.01, rel=0.03)


def test_what_it_cannot_do_is_said():
    away = vf.fit(banana(), "mean_field", solver="adam", seed=0, steps=1, init=torch.tensor([4.0, -8.0]))
    with pytest.raises(NotAvailableError, match="not at a minimum"):
        away.covariance(linear_response=True)
    with pytest.raises(NotAvailableError, match="mean over draws"):
        vf.fit(banana(), "mean_field", "iwae", seed=0, steps=2).covariance(linear_response=True)


def test_the_family_is_left_as_it_was():
    posterior = vf.fit(banana(), "mean_field", seed=0)
    posterior.covariance(linear_response=True)
    assert not any(p.requires_grad for p in posterior.family.parameters())
    assert all(p.grad is None for p in posterior.family.parameters())
