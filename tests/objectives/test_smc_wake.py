"""SMC-wake: evidence and gradients in the mean, moments of targets outside the family, kept runs, resumed fits."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.testing import targets
from vifamily.testing._tools import descend, flat_gradient, replicate

DOUBLE = torch.float64


def resolved(spec, model, family):
    return registry.build("objectives", spec).resolve(model, family)


def evaluated(spec, model, stack, copies, draws, seed, steps=1):
    """The losses of independent steps at a fixed q, each with its own state."""
    objective, source = resolved(spec, model, stack), torch.Generator().manual_seed(seed % 10**6)
    state, out = objective.init_state(model, stack, generator=source), []
    for _ in range(steps):
        noise = torch.randn(copies, draws, stack.noise_spec.shape[0], generator=source, dtype=DOUBLE)
        loss = objective.loss(stack, model, noise, None, state)
        state = loss.state
        out.append(loss)
    return out


def standard_errors(values, exact):
    return (values.mean(0) - exact).abs() / (values.std(0) / math.sqrt(len(values)))


@pytest.mark.parametrize("estimator", ["from_family", "from_prior"])
def test_the_evidence_of_a_conjugate_model_is_found(estimator, tools, seed):
    target = targets.linear_regression()
    mean, covariance = target.moments()
    sd = covariance.diagonal().sqrt()
    stack = replicate(tools.gaussian((mean + 2 * sd).tolist(), (2 * sd).tolist()), 400)
    (loss,) = evaluated(f"smc_wake(estimator={estimator})", target.model, stack, 400, 200, seed)
    evidence = (loss.terms["log_evidence"] - target.log_evidence).exp()
    assert float(standard_errors(evidence, 1.0)) < 5
    assert float(evidence.std()) < 0.6
    assert float(loss.terms["stages"].mean()) > 1


@pytest.mark.parametrize("estimator", ["from_family", "from_prior"])
def test_the_gradient_is_that_of_the_divergence_to_the_posterior(estimator, tools, seed):
    # two sds off and twice as wide: importance weights of q alone have an effective size of a few in a hundred
    target = targets.linear_regression()
    mean, covariance = target.moments()
    sd = covariance.diagonal().sqrt()
    family = tools.gaussian((mean + 2 * sd).tolist(), (1.5 * sd).tolist())
    stack = replicate(family, 200)
    (loss,) = evaluated(f"smc_wake(estimator={estimator})", target.model, stack, 200, 400, seed)
    got = flat_gradient(loss, stack, 200)
    # of minus E_p log q, by draws of the exact posterior in closed form: the gradient at its moments
    factor = torch.linalg.cholesky(covariance)
    corners = torch.cat([torch.eye(len(mean)), -torch.eye(len(mean))]).double() * math.sqrt(len(mean))
    points = mean + corners @ factor.T  # same mean and covariance, and log q is quadratic
    value = -family.log_prob(points).mean()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(family.parameters()))])
    # consistent, with a bias of order one in 400
    off = (got.mean(0) - wanted).abs()
    assert bool((off < 5 * got.std(0) / math.sqrt(200) + 0.01 * wanted.abs().max()).all())
    exact = float(_kl(mean, covariance, mean + 2 * sd, 1.5 * sd))
    assert abs(float(loss.value.mean()) - exact) < 5 * float(loss.value.std()) / math.sqrt(200) + 0.02 * exact


def _kl(mean, covariance, other, sd):
    p = torch.distributions.MultivariateNormal(mean, covariance)
    q = torch.distributions.MultivariateNormal(other, torch.diag(sd**2))
    return torch.distributions.kl_divergence(p, q)


@pytest.mark.parametrize("spec", ["smc_wake", "smc_wake(refresh=5, keep=4)", "smc_wake(kernel=mala)"])
def test_mean_field_lands_on_the_marginal_spreads(spec, seed):
    # with as many draws the weights of q alone end at 0.94
    model = targets.correlated_normal(0.9).model
    family = registry.build("families", "mean_field").build(
        vf.types.LatentSpec(2), generator=torch.Generator().manual_seed(0)
    )
    stack = replicate(family, 16)
    objective, parameters = resolved(spec, model, stack), list(stack.parameters())
    source, steps = torch.Generator().manual_seed(seed % 10**6), 240
    state = objective.init_state(model, stack, generator=source)
    optimiser, total = torch.optim.Adam(parameters, lr=0.05), torch.zeros(16, 2, dtype=DOUBLE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.05 * 0.05 ** (step / steps)
        loss = objective.loss(stack, model, torch.randn(16, 64, 2, generator=source, dtype=DOUBLE), None, state)
        state = loss.state
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss.surrogate.sum(), parameters), strict=True):
            parameter.grad = gradient
        optimiser.step()
        if step >= steps // 2:
            total += stack.moments()[1].diagonal(dim1=-2, dim2=-1).sqrt().detach() / (steps - steps // 2)
    assert float(total.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("seed", [1])
def test_a_gaussian_on_two_normals_has_their_moments(seed, tools):
    # the family does not contain the target, whose mean is 0 and whose variance is 10
    model, family = targets.two_normals().model, tools.gaussian(0.5, 2.5)
    objective = resolved("smc_wake", model, family)
    descend(objective, family, model, torch.zeros(200, 1, dtype=DOUBLE), steps=300, rate=0.05)
    mean, covariance = (part.detach() for part in family.moments())
    assert abs(float(mean)) < 0.15
    assert math.sqrt(float(covariance)) == pytest.approx(3.162, abs=0.1)


def test_from_the_prior_a_q_that_is_lost_does_not_mislead(tools, seed):
    # q sits forty sds away and is narrow: draws of it say nothing
    target = targets.linear_regression()
    mean, covariance = target.moments()
    sd = covariance.diagonal().sqrt()
    stack = replicate(tools.gaussian((mean + 40 * sd).tolist(), (0.1 * sd).tolist()), 50)
    (loss,) = evaluated("smc_wake(estimator=from_prior)", target.model, stack, 50, 100, seed)
    assert float((loss.terms["log_evidence"] - target.log_evidence).abs().max()) < 2.5


def test_it_finds_both_modes_with_a_mixture():
    # draws of mixtures carry weights, so its particles come from the prior
    simulator = vf.models.Simulator(
        torch.distributions.Normal(torch.zeros(1, dtype=DOUBLE), 3.0),
        lambda theta: theta.abs() + 0.3 * torch.randn_like(theta),
        log_likelihood=lambda theta, x: -0.5 * ((theta.abs() - x) / 0.3).square().sum(-1),
        dtype=DOUBLE,
    )
    model = simulator.at(torch.full((1,), 2.0, dtype=DOUBLE))
    posterior = vf.fit(model, "mixture(components=2)", "smc_wake", init="prior", seed=0, steps=200)
    assert posterior.record.estimator == "from_prior"
    draws = posterior.draws(20_000, seed=1)[:, 0]
    assert float((draws > 0).double().mean()) == pytest.approx(0.5, abs=0.1)
    assert float(draws.abs().mean()) == pytest.approx(2.0, abs=0.1)
    assert float(draws.abs().std()) == pytest.approx(0.3, abs=0.06)


# -- kept runs ---------------------------------------------------------------------------------------------------------
def test_particles_are_kept_between_refreshments_and_runs_are_weighed_by_their_evidence(tools, seed):
    target = targets.linear_regression()
    mean, covariance = target.moments()
    sd = covariance.diagonal().sqrt()
    stack = replicate(tools.gaussian((mean + sd).tolist(), (1.3 * sd).tolist()), 3)
    losses = evaluated("smc_wake(refresh=3, keep=2)", target.model, stack, 3, 20, seed, steps=8)
    seen = [loss.terms["log_evidence"] for loss in losses]
    for step in range(1, 8):
        assert torch.equal(seen[step], seen[step - 1]) == (step % 3 != 0), step
        # q stands still, so the same particles give the same loss
        assert torch.equal(losses[step].value, losses[step - 1].value) == (step % 3 != 0), step
    single = evaluated("smc_wake(refresh=3)", target.model, stack, 3, 20, seed, steps=7)
    own = torch.stack([single[i].terms["log_evidence"] for i in (0, 3, 6)])
    torch.testing.assert_close(seen[0], own[0])
    torch.testing.assert_close(seen[3], own[:2].exp().mean(0).log())
    torch.testing.assert_close(seen[6], own[1:].exp().mean(0).log())
    gradients = torch.stack([flat_gradient(single[i], stack, 3) for i in (0, 3)])
    share = own[:2].softmax(0).unsqueeze(-1)
    torch.testing.assert_close(flat_gradient(losses[3], stack, 3), (share * gradients).sum(0))


def test_more_kept_runs_are_less_biased_and_less_noisy(tools, seed):
    target = targets.linear_regression()
    mean, covariance = target.moments()
    sd = covariance.diagonal().sqrt()
    stack = replicate(tools.gaussian((mean + 2 * sd).tolist(), (1.5 * sd).tolist()), 300)
    found = {}
    for keep in (1, 8):
        spec = f"smc_wake(stages=2, moves=1, keep={keep})"
        last = evaluated(spec, target.model, stack, 300, 10, seed, steps=keep)[-1]
        error = (last.terms["log_evidence"] - target.log_evidence).exp() - 1
        found[keep] = (float(flat_gradient(last, stack, 300)[:, 0].std()), float(error.std()))
    assert found[8][0] < 0.7 * found[1][0]
    assert found[8][1] < 0.6 * found[1][1]


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("spec", ["smc_wake", "smc_wake(refresh=4, keep=2)"])
def test_a_fit_taken_up_again_is_the_uninterrupted_one(spec, restarts, tmp_path):
    options = {"family": "mean_field", "objective": spec, "seed": 3, "restarts": restarts, "draws": 12}
    whole = vf.fit("banana", steps=50, **options)
    vf.fit("banana", steps=21, checkpoint=tmp_path, **options)
    resumed = vf.fit("banana", steps=50, checkpoint=tmp_path, **options)
    for a, b in zip(whole.restarts or (whole.family,), resumed.restarts or (resumed.family,), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert whole.record.restart_losses == resumed.record.restart_losses


# -- what it takes -----------------------------------------------------------------------------------------------------
def test_what_it_cannot_use_is_refused(tools):
    assert vf.plan("banana", "full_rank", "smc_wake").estimator == "from_family"
    with pytest.raises(IncompatibleError, match="space"):
        vf.plan(targets.discrete().model, "categorical(max_states=0)", "smc_wake")
    with pytest.raises(IncompatibleError, match="unequal weights|draws from the prior"):
        vf.plan("banana", "mixture(components=2)", "smc_wake")
    for spec, match in (
        ("smc_wake(ess=1.0)", "ess"),
        ("smc_wake(moves=0)", "moves"),
        ("smc_wake(stages=0)", "stages"),
        ("smc_wake(refresh=true)", "refresh"),
        ("smc_wake(keep=0)", "keep"),
        ("smc_wake(kernel=hmc)", "kernel"),
    ):
        with pytest.raises(ConfigError, match=match):
            registry.build("objectives", spec)
    assert vf.types.Capability.SCORE in registry.build("objectives", "smc_wake(kernel=mala)").needs_model


def test_kept_particles_ask_for_as_many_draws(tools):
    target = targets.linear_regression()
    family = tools.gaussian([0.0] * target.model.dim, [1.0] * target.model.dim)
    objective = resolved("smc_wake(keep=2)", target.model, family)
    state = objective.init_state(target.model, family, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(10, target.model.dim, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    state = objective.loss(family, target.model, noise, None, state).state
    with pytest.raises(ConfigError, match="as many draws"):
        objective.loss(family, target.model, noise[:9], None, state)
