"""Maximum likelihood of q on reference draws: sample moments, exactly."""

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, NotAvailableError
from vifamily.models import Density
from vifamily.objectives._reference import first_state, reference_part
from vifamily.testing import targets
from vifamily.testing._tools import flat_gradient

DOUBLE = torch.float64


def model_with(draws):
    return Density(lambda z: 0.0 * z.sum(-1), dim=draws.shape[1]).with_reference_draws(draws)


def correlated_draws(dim, num, seed, rho=0.9):
    factor = torch.linalg.cholesky(torch.full((dim, dim), rho, dtype=DOUBLE).fill_diagonal_(1.0))
    source = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=source, dtype=DOUBLE) @ factor.mT + torch.arange(dim, dtype=DOUBLE)


@pytest.mark.parametrize("dim", [2, 3, 5])
@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_a_gaussian_ends_at_the_sample_moments(dim, family, seed):
    draws = correlated_draws(dim, 300, seed)
    posterior = vf.fit(model_with(draws), family, "inclusive_kl_draws", init=torch.zeros(dim), seed=0)
    mean, covariance = posterior.family.moments()
    wanted = draws.mT.cov(correction=0)
    wanted = wanted if family == "full_rank" else torch.diag(wanted.diagonal())
    assert posterior.record.solver == "lbfgs" and posterior.record.converged
    assert torch.allclose(mean, draws.mean(0), atol=2e-3)
    assert torch.allclose(covariance, wanted, atol=4e-3)


def test_a_gaussian_on_two_normals_covers_both(tools):
    objective = registry.build("objectives", "inclusive_kl_draws")
    model = targets.two_normals().model
    mean, sd, value = tools.minimum(objective, model, tools.gaussian(2.0, 1.0), torch.zeros(1, 1, dtype=DOUBLE))
    assert (mean, sd) == pytest.approx((0, 3.162), abs=0.02)
    # the value lacks the entropy of p, here from a fine grid
    z = torch.linspace(-15, 15, 6001, dtype=DOUBLE)
    log_p = model.log_joint(z[:, None])
    entropy = -float((log_p.exp() * log_p).sum() * (z[1] - z[0]))
    assert value - entropy == pytest.approx(0.4620, abs=0.005)


def test_categories_end_at_the_marginal_frequencies():
    target = targets.discrete()
    posterior = vf.fit(target.model, "categorical(max_states=0)", "inclusive_kl_draws", seed=0)
    draws = target.model.reference_draws
    for column, states in enumerate(target.model.num_categories):
        points = torch.zeros(states, 2, dtype=DOUBLE)
        points[:, column] = torch.arange(states)
        wanted = torch.bincount(draws[:, column].long(), minlength=states) / len(draws)
        found = posterior.family.log_prob(points).softmax(0)  # independent coordinates: the other one cancels
        assert torch.allclose(found, wanted.to(DOUBLE), atol=0.01)


def test_parts_take_turns_and_average_to_the_whole(tools):
    draws = correlated_draws(2, 60, 1)
    model, family = model_with(draws), tools.gaussian([0.3, -0.2], [1.5, 0.7])
    whole = registry.build("objectives", "inclusive_kl_draws")
    parts = registry.build("objectives", "inclusive_kl_draws(reference_batch=24)")
    state = parts.init_state(model, family, generator=None)
    noise, gradients = torch.zeros(1, 2, dtype=DOUBLE), []
    for step in range(5):  # two and a half parts a round: five parts are two rounds
        assert int(state) == step
        loss = parts.loss(family, model, noise, None, state)
        gradients.append(flat_gradient(loss, family))
        state = loss.state
    wanted = flat_gradient(whole.loss(family, model, noise), family)
    assert torch.allclose(torch.stack(gradients).mean(0), wanted)
    assert not torch.allclose(gradients[0], wanted)


def test_a_part_is_spread_over_the_order_of_the_draws():
    model = model_with(torch.arange(100, dtype=DOUBLE)[:, None])
    seen = []
    state = first_state(model, registry, 10)
    for _ in range(10):
        part, state = reference_part(model, 10, state)
        assert part.sort(0).values.diff(dim=0).min() == 10
        seen.append(part)
    assert torch.equal(torch.cat(seen).sort(0).values, model.reference_draws)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(IncompatibleError, match="reference draws"):
        vf.plan(Density(lambda z: -(z**2).sum(-1), dim=2), "full_rank", "inclusive_kl_draws")
    with pytest.raises(IncompatibleError, match="log density"):
        vf.plan("banana", "implicit", "inclusive_kl_draws")
    with pytest.raises(IncompatibleError, match="bound"):
        vf.plan("banana", "semi_implicit", "inclusive_kl_draws")
    for wrong in (1, True, "all"):
        with pytest.raises(ConfigError, match="reference_batch"):
            vf.objectives.InclusiveKlDraws(reference_batch=wrong)


def test_parts_are_not_minimised_as_one_fixed_function():
    assert vf.plan("banana", "full_rank", "inclusive_kl_draws(reference_batch=100)").solver == vf.solvers.Adam()
    with pytest.raises(IncompatibleError, match="solver='adam'"):
        vf.plan("banana", "full_rank", "inclusive_kl_draws(reference_batch=100)", solver="lbfgs")


def test_linear_responses_are_of_the_reverse_divergence_alone():
    posterior = vf.fit("correlated_normal", "mean_field", "inclusive_kl_draws", seed=0)
    with pytest.raises(NotAvailableError, match="reverse KL"):
        posterior.covariance(linear_response=True)
