"""Markovian score climbing: the chain keeps the posterior, the bias vanishes, and its state is carried and resumed."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.objectives.msc import _choice
from vifamily.testing import targets
from vifamily.testing._tools import descend, flat_gradient, replicate

DOUBLE = torch.float64
MSC = registry.build("objectives", "msc")


def climbed(spec, chains, draws, steps, seed, rho=0.9):
    """Mean-field sds on a correlated normal law, one chain each, averaged over the second half of the steps."""
    objective, model = registry.build("objectives", spec), targets.correlated_normal(rho).model
    family = registry.build("families", "mean_field").build(
        vf.types.LatentSpec(2), generator=torch.Generator().manual_seed(0)
    )
    stack = replicate(family, chains)
    parameters, source = list(stack.parameters()), torch.Generator().manual_seed(seed)
    state = objective.init_state(model, stack, generator=source)
    optimiser, total = torch.optim.Adam(parameters, lr=0.02), torch.zeros(chains, 2, dtype=DOUBLE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.02 * 0.05 ** (step / steps)
        noise = torch.randn(chains, draws, 2, generator=source, dtype=DOUBLE)
        loss = objective.loss(stack, model, noise, None, state)
        state = loss.state
        gradients = torch.autograd.grad(loss.surrogate.sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        if step >= steps // 2:
            total += stack.moments()[1].diagonal(dim1=-2, dim2=-1).sqrt().detach() / (steps - steps // 2)
    return total


@pytest.mark.parametrize("spec", ["msc", "msc(average=False)"])
def test_mean_field_lands_on_the_marginal_spreads(spec, seed):
    # with as many draws the biased weights of the wake phase alone end at 0.89
    sd = climbed(spec, chains=48, draws=32, steps=1000, seed=seed)
    assert float(sd.mean()) == pytest.approx(1.0, abs=0.03)


def test_without_the_chain_the_bias_stays(seed):
    assert float(climbed("reweighted_wake(estimator=wake)", 24, 32, 500, seed).mean()) < 0.93


def test_a_gaussian_on_two_normals_covers_both(tools):
    model, family = targets.two_normals().model, tools.gaussian(0.5, 2.5)
    descend(MSC, family, model, torch.zeros(200, 1, dtype=DOUBLE), steps=400, rate=0.05)
    mean, covariance = (part.detach() for part in family.moments())
    assert abs(float(mean)) < 0.1
    assert math.sqrt(float(covariance)) == pytest.approx(3.162, abs=0.1)


@pytest.mark.parametrize("draws", [3, 8])
def test_the_chain_has_the_posterior_as_its_law_whatever_q(draws, tools, seed):
    model, chains = targets.two_normals().model, 4000
    stack = replicate(tools.gaussian(1.0, 3.0), chains)
    source = torch.Generator().manual_seed(seed)
    # in the law already: one kept draw after the other must stay in it
    state = torch.randn(chains, 1, generator=source, dtype=DOUBLE)
    state += torch.where(torch.rand(chains, 1, generator=source, dtype=DOUBLE) < 0.5, -3.0, 3.0)
    moved = torch.zeros(chains, dtype=DOUBLE)
    for _ in range(15):
        noise = torch.randn(chains, draws, 1, generator=source, dtype=DOUBLE)
        loss = MSC.loss(stack, model, noise, None, state)
        state = loss.state
        moved += loss.terms["moved"]
    z = state[:, 0]
    for found, mean, sd in ((z, 0.0, math.sqrt(10)), (z**2, 10.0, math.sqrt(138 - 100)), ((z > 3) * 1.0, 0.25, 0.433)):
        assert abs(float(found.mean()) - mean) < 5 * sd / math.sqrt(chains)
    assert float((moved > 0).double().mean()) > 0.9


def test_one_chain_for_each_restart_decided_by_its_own_noise(tools):
    model, stack = targets.correlated_normal().model, replicate(tools.gaussian([0.0, 0.0], [1.0, 1.0]), 3)
    state = MSC.init_state(model, stack, generator=torch.Generator().manual_seed(0))
    assert state.shape == (3, 2) and len(state.unique(dim=0)) == 3
    noise = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    first = MSC.loss(stack, model, noise, None, state)
    noise[1, -1, 0] = 8.0  # the uniform number of the second chain alone: it takes the last draw
    second = MSC.loss(stack, model, noise, None, state)
    same = [torch.equal(a, b) for a, b in zip(first.state, second.state, strict=True)]
    assert same == [True, False, True]
    assert torch.equal(second.state[1], stack(noise).z[1, 4])
    assert torch.equal(flat_gradient(first, stack), flat_gradient(second, stack)), "the weighted step needs no choice"


def test_the_choice_follows_the_weights():
    share = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=DOUBLE)
    uniform = (torch.arange(1000, dtype=DOUBLE) + 0.5) / 1000
    chosen = _choice(share.expand(1000, 4), uniform)
    assert torch.bincount(chosen, minlength=4).tolist() == [200, 0, 500, 300]
    assert int(_choice(share, torch.tensor(1.0, dtype=DOUBLE))) == 3


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_fit_taken_up_again_is_the_uninterrupted_one(restarts, tmp_path):
    options = {"family": "mean_field", "objective": "msc", "seed": 3, "restarts": restarts, "draws": 8}
    whole = vf.fit("banana", steps=90, **options)
    vf.fit("banana", steps=37, checkpoint=tmp_path, **options)
    resumed = vf.fit("banana", steps=90, checkpoint=tmp_path, **options)
    for a, b in zip(whole.restarts or (whole.family,), resumed.restarts or (resumed.family,), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert whole.record.restart_losses == resumed.record.restart_losses


def test_what_it_cannot_use_is_refused():
    with pytest.raises(IncompatibleError, match="unequal weights"):
        vf.plan("banana", "mixture(components=2)", "msc")
    with pytest.raises(IncompatibleError, match="weights that carry the gradient"):
        vf.plan(targets.discrete().model, "categorical", "msc")
    assert vf.plan(targets.discrete().model, "categorical(max_states=0)", "msc").estimator == "chain"
    with pytest.raises(ConfigError, match="average"):
        vf.objectives.MarkovianScoreClimbing(average=1)
