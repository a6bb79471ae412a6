"""Batch and match: its formula against the divergence it minimises, its limits, its answer off Gaussians."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch

import vifamily as vf
from vifamily.errors import IncompatibleError
from vifamily.models import Density
from vifamily.numerics.gaussian_start import value_and_gradient
from vifamily.objectives import BatchAndMatch
from vifamily.objectives.batch_and_match import solve_quadratic
from vifamily.testing import targets

DOUBLE = torch.float64


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def factor_of_size(dim, seed):
    root = random(dim, 2 * dim, seed=seed)
    return torch.linalg.cholesky(root @ root.T / dim)


def test_the_quadratic_equation_is_solved():
    u, v = random(5, 3, seed=0), factor_of_size(5, 1)
    u, v = u @ u.T, v @ v.T
    s = solve_quadratic(u, v)
    assert torch.allclose(s @ u @ s + s, v, atol=1e-12)
    assert bool((torch.linalg.eigvalsh(s) > 0).all())


def as_published(mean, factor, z, g, lam):
    """Section 3 of the paper, literally, with the matrix square root by SciPy."""
    s, count = factor @ factor.T, z.shape[0]
    z_bar, g_bar = z.mean(0), g.mean(0)
    c, gamma = (z - z_bar).T @ (z - z_bar) / count, (g - g_bar).T @ (g - g_bar) / count
    u = lam * gamma + lam / (1 + lam) * torch.outer(g_bar, g_bar)
    v = s + lam * c + lam / (1 + lam) * torch.outer(mean - z_bar, mean - z_bar)
    eye = torch.eye(len(mean), dtype=DOUBLE)
    root = torch.as_tensor(np.real(scipy.linalg.sqrtm((eye + 4 * u @ v).numpy())))
    new = 2 * v @ torch.linalg.inv(eye + root)
    return mean / (1 + lam) + lam / (1 + lam) * (new @ g_bar + z_bar), new


@pytest.mark.parametrize(("dim", "draws", "lam"), [(3, 8, 0.7), (3, 1, 5.0), (20, 3, 0.4), (20, 3, 30.0), (20, 9, 1.0)])
def test_the_update_is_the_published_one_whatever_the_batch(dim, draws, lam):
    mean, factor = random(dim, seed=1), factor_of_size(dim, 2)
    z, g = mean + random(draws, dim, seed=3) @ factor.T, random(draws, dim, seed=4)
    new_mean, new_factor = BatchAndMatch().update(mean, factor, z, g, lam)
    wanted_mean, wanted = as_published(mean, factor, z, g, lam)
    assert torch.allclose(new_mean, wanted_mean, atol=1e-8)
    assert torch.allclose(new_factor @ new_factor.T, wanted, atol=1e-8)


def test_the_update_minimises_the_regularised_divergence():
    """Brute force over mean and factor, by a general minimiser, finds nothing lower and no other point."""
    lam, mean, factor = 0.8, random(2, seed=1), factor_of_size(2, 2)
    z, g = mean + random(5, 2, seed=3) @ factor.T, random(5, 2, seed=4)
    current = torch.distributions.MultivariateNormal(mean, scale_tril=factor)

    def objective(x):
        at = torch.as_tensor(x, dtype=DOUBLE).requires_grad_()
        lower = torch.stack([torch.stack([at[2].exp(), 0 * at[3]]), torch.stack([at[4], at[3].exp()])])
        covariance = lower @ lower.T
        gap = -torch.linalg.solve(covariance, (z - at[:2]).T).T - g
        match = ((gap @ covariance) * gap).sum(-1).mean()
        other = torch.distributions.MultivariateNormal(at[:2], scale_tril=lower)
        value = match + 2 / lam * torch.distributions.kl_divergence(current, other)
        value.backward()
        return float(value.detach()), at.grad.numpy()

    found = scipy.optimize.minimize(objective, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-10})
    new_mean, new = BatchAndMatch().update(mean, factor, z, g, lam)
    lower = np.array([[math.exp(found.x[2]), 0.0], [found.x[4], math.exp(found.x[3])]])
    assert np.allclose(new_mean.numpy(), found.x[:2], atol=1e-6)
    assert np.allclose(new.numpy(), lower, atol=1e-6)


def test_one_step_without_regularisation_is_exact_on_a_gaussian():
    target = targets.linear_regression()
    mean, factor = torch.tensor([4.0, -3.0], dtype=DOUBLE), factor_of_size(2, 3)
    z = mean + random(6, 2, seed=4) @ factor.T
    _, g = value_and_gradient(target.model.log_joint, z)
    new_mean, new = BatchAndMatch().update(mean, factor, z, g, 1e9)
    assert torch.allclose(new_mean, target.mean, atol=1e-6)
    assert torch.allclose(new @ new.T, target.covariance, atol=1e-6)


def test_the_value_has_the_known_minima_on_two_modes(tools):
    """E (s_p - s_q)^2 by quadrature: 0.0329 at (3.04, 0.98), 2.457 at (0, 2.63); ours is weighted by the variance."""
    model = targets.two_normals().model
    for mean, sd, known in ((3.04, 0.98, 0.0329), (0.0, 2.63, 2.457)):
        family = tools.gaussian([mean], [sd], "full_rank")
        value = float(BatchAndMatch().loss(family, model, tools.quadrature_noise(4000)).value)
        assert value / sd**2 == pytest.approx(known, abs=2e-3)


def skewed(z):
    """A Gumbel law: its score is -1 + exp(-z)."""
    return (-z - torch.exp(-z)).sum(-1)


def fixed_point(start):
    """Mean and sd with E_q s = 0 and sd^2 Var_q s = 1, by quadrature; for q normal both are known functions."""

    def conditions(x):
        mean, variance = x[0], math.exp(2 * x[1])
        first = math.exp(-mean + 0.5 * variance)
        second = math.exp(-2 * mean + 2 * variance)
        return [first - 1, variance * (second - first**2) - 1]

    solution = scipy.optimize.fsolve(conditions, start, xtol=1e-13)
    return solution[0], math.exp(solution[1])


def test_off_gaussians_it_ends_where_the_scores_have_the_covariance_of_q():
    mean, sd = fixed_point([0.5, 0.0])
    fitted = vf.fit(Density(skewed, dim=1), "full_rank", "batch_and_match", solver="auto", seed=0)
    assert fitted.record.stop_reason == "converged"
    # E_q s = 0 and var_q s = sd^-2: mean = sd^2 / 2, exp(sd^2) - 1 = sd^-2
    assert math.exp(sd**2) - 1 == pytest.approx(sd**-2) and mean == pytest.approx(sd**2 / 2)
    found_mean, covariance = fitted.family.moments()
    assert float(found_mean) == pytest.approx(mean, abs=0.05 * sd)
    assert 0.5 * math.log(float(covariance)) == pytest.approx(math.log(sd), abs=0.05)
    # reverse KL has E_q[-s'] = sd^-2, which is 1 here: batch and match is narrower
    assert sd < 0.9


def test_its_answer_minimises_the_divergence_on_draws_held_fixed():
    """At the fixed point, no other Gaussian matches the scores better on the draws of that fixed point."""
    mean, sd = fixed_point([0.5, 0.0])
    points = torch.special.ndtri((torch.arange(20000, dtype=DOUBLE) + 0.5) / 20000)
    z = mean + sd * points
    score = -1 + torch.exp(-z)

    def divergence(x):
        other = math.exp(2 * x[1])
        return float((other * (-(z - x[0]) / other - score).square()).mean())

    found = scipy.optimize.minimize(
        divergence, [0.2, 0.1], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}
    )
    assert found.x[0] == pytest.approx(mean, abs=2e-3)
    assert math.exp(found.x[1]) == pytest.approx(sd, abs=2e-3)


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(IncompatibleError, match="any mean and covariance"):
        vf.plan("banana", "mean_field", "batch_and_match", "auto")
    with pytest.raises(IncompatibleError, match="any mean and covariance"):
        vf.plan("banana", "full_rank(student_t=5)", "batch_and_match", "auto")
    with pytest.raises(IncompatibleError, match="closed_form"):
        vf.plan("banana", "full_rank", "batch_and_match", "adam")
    with pytest.raises(IncompatibleError, match="not a sum over data"):
        vf.plan(targets.linear_regression().model, "full_rank", "batch_and_match", "auto", batch_size=4)
