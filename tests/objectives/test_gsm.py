"""Gaussian score matching: one draw is matched exactly, by the least change; its averaged answer off Gaussians."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch

import vifamily as vf
from vifamily.models import Density
from vifamily.objectives import Gsm

DOUBLE = torch.float64


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def setting(dim=2):
    root = random(dim, 2 * dim, seed=2)
    mean, factor = random(dim, seed=1), torch.linalg.cholesky(root @ root.T / dim)
    return mean, factor, mean + random(1, dim, seed=3) @ factor.T, random(1, dim, seed=4)


@pytest.mark.parametrize("dim", [2, 9])
def test_one_draw_is_matched_exactly(dim):
    mean, factor, z, g = setting(dim)
    new_mean, new = Gsm().update(mean, factor, z, g, 1.0)
    assert torch.allclose(torch.linalg.solve(new @ new.T, new_mean - z[0]), g[0], atol=1e-9)


def test_the_update_is_the_published_one():
    mean, factor, z, v = setting(3)
    s, v, z = factor @ factor.T, v[0], z[0]
    rho = 0.5 * math.sqrt(1 + 4 * float(v @ s @ v + ((mean - z) @ v) ** 2)) - 0.5
    epsilon = s @ v - mean + z
    delta = (torch.eye(3) - torch.outer(mean - z, v) / (1 + rho + (mean - z) @ v)) @ epsilon / (1 + rho)
    wanted = s + torch.outer(mean - z, mean - z) - torch.outer(mean + delta - z, mean + delta - z)
    new_mean, new = Gsm().update(mean, factor, z[None], v[None], 1.0)
    assert torch.allclose(new_mean, mean + delta, atol=1e-12)
    assert torch.allclose(new @ new.T, wanted, atol=1e-12)


def test_no_other_matching_gaussian_is_closer():
    """Brute force: among covariances whose mean is then fixed by the match, the least KL(q_t || q)."""
    mean, factor, z, g = setting()
    current = torch.distributions.MultivariateNormal(mean, scale_tril=factor)

    def distance(x):
        lower = torch.tensor([[math.exp(x[0]), 0.0], [x[2], math.exp(x[1])]], dtype=DOUBLE)
        at = z[0] + lower @ lower.T @ g[0]
        return float(
            torch.distributions.kl_divergence(current, torch.distributions.MultivariateNormal(at, scale_tril=lower))
        )

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    found = scipy.optimize.minimize(distance, np.zeros(3), method="Nelder-Mead", options=options)
    new_mean, new = Gsm().update(mean, factor, z, g, 1.0)
    x = found.x
    assert np.allclose(new.numpy(), [[math.exp(x[0]), 0.0], [x[2], math.exp(x[1])]], atol=1e-5)


def changes(mean, sd, points):
    """Mean change of mean and variance over q, for a Gumbel law, from the one-dimensional formula."""
    z = mean + sd * points
    score = -1 + np.exp(-z)
    rho = 0.5 * np.sqrt(1 + 4 * (sd**2 * score**2 + ((mean - z) * score) ** 2)) - 0.5
    epsilon = sd**2 * score - mean + z
    delta = (1 - (mean - z) * score / (1 + rho + (mean - z) * score)) * epsilon / (1 + rho)
    return [delta.mean(), ((mean - z) ** 2 - (mean + delta - z) ** 2).mean()]


def test_off_gaussians_the_averaged_iterates_end_where_the_mean_change_is_zero():
    points = torch.special.ndtri((torch.arange(20000, dtype=DOUBLE) + 0.5) / 20000).numpy()
    mean, log_sd = scipy.optimize.fsolve(lambda x: changes(x[0], math.exp(x[1]), points), [0.3, 0.0])
    model = Density(lambda z: (-z - torch.exp(-z)).sum(-1), dim=1)
    fitted = vf.fit(model, "full_rank", "gsm", solver="closed_form", seed=0)
    assert fitted.record.stop_reason == "converged"
    found_mean, covariance = fitted.family.moments()
    assert float(found_mean) == pytest.approx(mean, abs=0.05 * math.exp(log_sd))
    assert 0.5 * math.log(float(covariance)) == pytest.approx(log_sd, abs=0.05)
