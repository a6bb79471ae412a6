"""Spline densities in amortised fits: a posterior of four modes, against quadrature; bounded intervals; convexity."""

import math

import pytest
import torch
from torch.distributions import Normal, Uniform

import vifamily as vf
from vifamily.posterior.amortised import fit_amortised

TURN = 2 * math.pi


def simulator():
    """``z ~ U(0, 2 pi)``, ``x ~ N(sin 2z, 0.5^2)``: two or four modes."""
    return vf.models.Simulator(
        Uniform(torch.zeros(1), torch.full((1,), TURN)),
        lambda z: torch.sin(2 * z) + 0.5 * torch.randn_like(z),
        log_likelihood=lambda z, x: Normal(torch.sin(2 * z[:, 0]), 0.5).log_prob(x[..., 0]),
    )  # fmt: skip


def divergences(posterior, x):
    """Inclusive and exclusive divergence from and to the exact posterior of an angle, by quadrature."""
    grid = torch.linspace(1e-4, TURN - 1e-4, 4001)
    z = torch.logit(grid / TURN).unsqueeze(-1)
    here = posterior(torch.tensor([x]))
    log_q = (here.log_prob(z).double() - torch.log(grid.double() * (TURN - grid.double()) / TURN)).detach()
    log_p = Normal(torch.sin(2 * grid.double()), 0.5).log_prob(torch.tensor(x, dtype=torch.float64))
    log_p = log_p - torch.trapezoid(log_p.exp(), grid.double()).log()
    inclusive = float(torch.trapezoid(log_p.exp() * (log_p - log_q), grid.double()))
    return inclusive, float(torch.trapezoid(log_q.exp() * (log_q - log_p), grid.double()))


@pytest.mark.parametrize("objective", ["inclusive_kl(simulations=8000)", pytest.param("elbo", marks=pytest.mark.slow)])
def test_four_modes_are_found_in_both_directions(objective):
    posterior = fit_amortised(simulator(), "natural(kind=spline, basis=20)", objective, encoder="vector(hidden=[64])",
                              steps=250, step_size=0.02, seed=0)  # fmt: skip
    assert posterior.family.family.convex_in_output
    for x in (0.9, -0.6, 0.0):
        inclusive, exclusive = divergences(posterior, x)
        assert -1e-3 < inclusive < 0.12, (objective, x)
        assert -1e-3 < exclusive < 0.12, (objective, x)


def test_the_place_in_a_bounded_interval_is_that_of_the_basis():
    posterior = vf.fit(simulator(), "natural(kind=spline)", "inclusive_kl(simulations=4000)", encoder="vector", steps=1)
    family = posterior.family.family
    theta = torch.tensor([[1.0], [3.0], [6.0]])
    z = torch.logit(theta / TURN)
    # scaled by the spread of the simulated parameters, which is that of the logistic law
    torch.testing.assert_close(family.law.place(family.to_standard(z)), theta / TURN, atol=0.02, rtol=0)
