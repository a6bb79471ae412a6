"""Discrete parameters of a simulator: marginals by enumeration, both directions of divergence, the named sites."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

import vifamily as vf
from vifamily.errors import IncompatibleError
from vifamily.posterior.amortised import fit_amortised

SD = 0.8


def level(theta):
    return theta["on"][..., 0] + 2 * theta["on"][..., 1] + 1.5 * theta["kind"]


PRIOR = {"on": Bernoulli(torch.tensor([0.3, 0.6])), "kind": Categorical(torch.tensor([0.5, 0.2, 0.3]))}


def simulate(theta):
    return (level(theta) + SD * torch.randn(len(theta["kind"]))).unsqueeze(-1)


def log_likelihood(theta, x):
    return Normal(level(theta), SD).log_prob(x[..., 0])


def simulator():
    return vf.models.Simulator(PRIOR, simulate, log_likelihood=log_likelihood)


def exact(x):
    """States and their posterior probabilities, by enumeration."""
    states = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0), torch.arange(3.0))
    theta = {"on": states[:, :2], "kind": states[:, 2]}
    log_p = PRIOR["on"].log_prob(theta["on"]).sum(-1) + PRIOR["kind"].log_prob(theta["kind"])
    return states, (log_p + Normal(level(theta), SD).log_prob(torch.tensor(x))).softmax(0)


def test_the_marginals_are_those_of_the_posterior(tmp_path):
    posterior = vf.fit(simulator(), objective="inclusive_kl(simulations=6000)", seed=0, steps=700)
    assert "categorical" in posterior.record.family
    for x in (0.5, 2.6):
        states, probability = exact(x)
        wanted = posterior.family.family.law.statistics(states.double()).T @ probability.double()
        found = posterior.family.family.law.statistics(posterior(torch.tensor([x])).draws(20_000)).double().mean(0)
        assert float((found - wanted).abs().max()) < 0.06
    posterior.save(tmp_path)
    again = vf.load(tmp_path)
    assert torch.equal(again(torch.tensor([0.5])).draws(5), posterior(torch.tensor([0.5])).draws(5))
    draws = posterior(torch.tensor([0.5])).sample(10)
    assert draws["on"].shape == (10, 2) and set(draws["kind"].unique().tolist()) <= {0.0, 1.0, 2.0}


def test_elbo_and_the_wake_phase_on_discrete_parameters():
    x = 2.6
    states, probability = exact(x)
    independent = exclusive_optimum(states, probability)
    simulated = simulator().with_observations(torch.tensor([[x]]))
    options = {"encoder": "vector", "seed": 0, "steps": 500, "step_size": 0.03}
    posterior = fit_amortised(simulated, objective="elbo", draws=32, **options)
    assert posterior.record.estimator == "score"
    law = posterior.family.family.law
    found = law.statistics(posterior(torch.tensor([x])).draws(20_000)).double().mean(0)
    assert float((found - independent).abs().max()) < 0.05
    wake = fit_amortised(simulated, objective="reweighted_wake", **options)
    marginal = law.statistics(states.double()).T @ probability.double()
    found = law.statistics(wake(torch.tensor([x])).draws(20_000)).double().mean(0)
    assert float((found - marginal).abs().max()) < 0.05
    assert float((independent - marginal).abs().max()) > 0.1  # the two directions differ here


def exclusive_optimum(states, probability):
    """Mean statistics of the independent law of least reverse divergence, by coordinate ascent from many starts."""
    log_p, best = probability.double().log(), None
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        q = [torch.rand(n, generator=source, dtype=torch.float64) for n in (2, 2, 3)]
        q = [part / part.sum() for part in q]
        table = log_p.reshape(2, 2, 3)
        for _ in range(200):
            q[0] = torch.einsum("abc,b,c->a", table, q[1], q[2]).softmax(0)
            q[1] = torch.einsum("abc,a,c->b", table, q[0], q[2]).softmax(0)
            q[2] = torch.einsum("abc,a,b->c", table, q[0], q[1]).softmax(0)
        joint = torch.einsum("a,b,c->abc", *q)
        value = float((joint * (joint.log() - table)).sum())
        if best is None or value < best[0]:
            best = (value, torch.cat([part[1:] for part in q]))
    return best[1]


def test_a_family_of_real_numbers_is_refused():
    with pytest.raises(IncompatibleError, match="discrete"):
        vf.fit(simulator(), "full_rank", "inclusive_kl", steps=2)
    assert vf.plan(simulator(), objective="elbo").estimator == "score"
