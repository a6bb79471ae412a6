"""The wake phase of reweighted wake-sleep: both estimators, the bias, discrete latents, the model's own parameters."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density
from vifamily.objectives._snis import defensive_draws, effective_share, weights_apart
from vifamily.testing import targets
from vifamily.testing._tools import descend, flat_gradient

DOUBLE = torch.float64
WAKE = registry.build("objectives", "reweighted_wake(estimator=wake)")
DREG = registry.build("objectives", "reweighted_wake(estimator=dreg)")


def test_the_step_is_the_weighted_score_written_out(tools, seed):
    model, family = targets.correlated_normal().model, tools.gaussian([0.4, -0.3], [0.8, 1.3])
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    z = family(noise).z.detach()
    weight = (model.log_joint(z) - family.log_prob(z)).detach().softmax(0)
    scores = [torch.autograd.grad(family.log_prob(row), list(family.parameters())) for row in z]
    wanted = -sum(w * torch.cat([p.reshape(-1) for p in score]) for w, score in zip(weight, scores, strict=True))
    loss = WAKE.loss(family, model, noise)
    assert torch.allclose(flat_gradient(loss, family), wanted)
    assert float(loss.value) == pytest.approx(float((weight * (5 * weight).log()).sum()))
    assert float(loss.terms["ess"]) == pytest.approx(1 / float(5 * weight.square().sum()))


@pytest.mark.parametrize("draws", [2, 6])
def test_both_estimators_have_one_mean_bias_included(draws, tools, seed):
    # the target is not in the family, and q is away from its optimum
    model, family = targets.two_normals().model, tools.gaussian(0.7, 2.0)
    wake, _ = tools.replicated_gradient(WAKE, model, family, draws, 4000, seed)
    dreg, _ = tools.replicated_gradient(DREG, model, family, draws, 4000, seed + 1)
    assert tools.same_mean(wake, dreg)


def test_the_bias_is_of_order_one_over_the_draws(tools, seed):
    model, family = targets.two_normals().model, tools.gaussian(0.7, 2.0)
    z = torch.linspace(-40, 40, 8001, dtype=DOUBLE)[:, None]
    mass = model.log_joint(z).exp() * 0.01
    exact = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(-(mass * family.log_prob(z)).sum(), list(family.parameters()))]
    )
    bias = []
    for draws in (8, 32):
        gradient, _ = tools.replicated_gradient(DREG, model, family, draws, 20_000, seed)
        bias.append(float((gradient.mean(0) - exact).norm()))
    assert bias[1] < 0.4 * bias[0], "four times the draws, about a quarter of the bias"


@pytest.mark.parametrize("objective", [WAKE, DREG], ids=["wake", "dreg"])
def test_a_gaussian_on_two_normals_covers_both(objective, tools):
    model, family = targets.two_normals().model, tools.gaussian(0.5, 2.5)
    descend(objective, family, model, torch.zeros(400, 1, dtype=DOUBLE), steps=400, rate=0.05, fresh=True)
    mean, covariance = (part.detach() for part in family.moments())
    assert abs(float(mean)) < 0.1
    assert math.sqrt(float(covariance)) == pytest.approx(3.162, abs=0.1)


def test_categories_end_at_the_marginal_probabilities():
    target = targets.discrete()
    posterior = vf.fit(target.model, "categorical(max_states=0)", "reweighted_wake", draws=64, seed=0)
    states = torch.cartesian_prod(torch.arange(2), torch.arange(3)).to(DOUBLE)
    joint = target.model.log_joint(states).softmax(0).reshape(2, 3)
    found = posterior.family.log_prob(states).exp().reshape(2, 3).detach()
    assert posterior.record.estimator == "wake"
    assert torch.allclose(found.sum(1), joint.sum(1), atol=0.03)
    assert torch.allclose(found.sum(0), joint.sum(0), atol=0.03)


def test_parameters_of_the_model_climb_the_weighted_log_joint(tools):
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.at = torch.nn.Parameter(torch.tensor(0.3, dtype=DOUBLE))

        def forward(self, z):
            return -0.5 * (z - self.at).square().sum(-1)

    inner = Shifted()
    model, family = Density(inner, dim=1), tools.gaussian(0.0, 1.0)
    resolved = registry.build("objectives", "reweighted_wake").resolve(model, family)
    noise = torch.linspace(-1.5, 1.5, 7, dtype=DOUBLE)[:, None]
    (got,) = torch.autograd.grad(resolved.loss(family, model, noise).surrogate, [inner.at])
    z = family(noise).z.detach()
    weight = (model.log_joint(z) - family.log_prob(z)).detach().softmax(0)
    assert resolved.estimator == "wake"
    assert float(got) == pytest.approx(-float((weight * (z[:, 0] - inner.at.detach())).sum()))


def test_families_with_a_bound_for_their_density_are_refused():
    with pytest.raises(IncompatibleError, match="bound"):
        vf.plan("banana", "semi_implicit", "reweighted_wake")


def test_effective_size_and_distance_of_weights():
    even = torch.full((4,), -math.log(4), dtype=DOUBLE)
    one = torch.tensor([0.0, -math.inf, -math.inf, -math.inf], dtype=DOUBLE)
    assert float(effective_share(even, even)) == pytest.approx(1) and float(weights_apart(even, even)) == 0
    assert float(effective_share(one, even)) == pytest.approx(0.25)
    assert float(weights_apart(one, even)) == pytest.approx(math.log(4))


def test_defensive_weights_are_those_of_the_mixture(tools, seed):
    model = vf.models.Density(lambda z: -0.5 * z.square().sum(-1), dim=1)
    family = tools.gaussian([0.3], [0.5])
    noise = torch.randn(40, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draw = family(noise)
    ratio, log_q, _ = defensive_draws(family, model, draw, None, share=0.25, widen=4.0)
    z = draw.z.detach()
    centre = z[:30].mean()
    moved = torch.cat([z[:30], centre + 4 * (z[30:] - centre)]).squeeze(-1)
    q = torch.distributions.Normal(0.3, 0.5)
    # q widened about the centre: mean m + c (mu - m), standard deviation c times that of q
    wide = torch.distributions.Normal(centre + 4 * (0.3 - centre), 2.0)
    mixture = torch.logaddexp(q.log_prob(moved) + math.log(0.75), wide.log_prob(moved) + math.log(0.25))
    torch.testing.assert_close(ratio, -0.5 * moved.square() - mixture)
    torch.testing.assert_close(log_q.detach(), q.log_prob(moved))


def test_defensive_weights_are_bounded_and_their_mean_is_that_of_the_target(tools, seed):
    # q is so narrow that its own weights have no variance; under the mixture they are bounded by p / (s r)
    model = vf.models.Density(lambda z: -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi), dim=1)
    family = tools.gaussian([0.0], [0.5])
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draw = family(noise)
    ratio, _, _ = defensive_draws(family, model, draw, None, share=0.2, widen=3.0)
    weight = ratio.exp()
    assert float(weight.max()) < 1.5 / 0.2 + 1e-2  # r has sd 1.5 at its mean
    error = float(weight.std()) / math.sqrt(len(weight))
    assert abs(float(weight.mean()) - 1) < 5 * error
    z = draw.z.detach()[:160_000]
    plain = (model.log_joint(z) - family.log_prob(z)).detach().exp()
    assert float(plain.max()) > 2 * float(weight.max())


def test_a_defensive_fit_from_a_narrow_start_finds_both_normals(tools):
    model, family = targets.two_normals().model, tools.gaussian(0.5, 1.0)
    objective = registry.build("objectives", "reweighted_wake(defensive=0.3, widen=4)").resolve(model, family)
    descend(objective, family, model, torch.zeros(400, 1, dtype=torch.float64), steps=400, rate=0.05, fresh=True)
    mean, covariance = (part.detach() for part in family.moments())
    assert abs(float(mean)) < 0.15
    assert math.sqrt(float(covariance)) == pytest.approx(3.162, abs=0.15)


def test_defensive_options_are_checked():
    with pytest.raises(ConfigError, match="defensive"):
        vf.objectives.ReweightedWake(defensive=1.0)
    with pytest.raises(ConfigError, match="widen"):
        vf.objectives.ReweightedWake(defensive=0.1, widen=1.0)
    with pytest.raises(ConfigError, match="dreg"):
        vf.objectives.ReweightedWake(defensive=0.1, estimator="dreg")
    with pytest.raises(IncompatibleError, match="unequal weights"):
        vf.plan("correlated_normal", "mixture(components=2)", "reweighted_wake(defensive=0.1)")
