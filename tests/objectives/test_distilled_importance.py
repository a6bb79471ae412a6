"""Distilled importance sampling: the tempering meets its goal, and where it stays the fit is a Rényi optimum."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.testing import targets
from vifamily.testing._tools import descend

DOUBLE = torch.float64


def build(spec="distilled_importance"):
    return registry.build("objectives", spec)


def normal_noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("goal", [0.2, 0.5, 0.9])
def test_the_effective_size_is_held_as_asked(goal, tools, seed):
    model, family = targets.correlated_normal().model, tools.gaussian([1.0, -1.0], [1.0, 1.0])
    terms = build(f"distilled_importance(ess={goal})").loss(family, model, normal_noise(200, 2, seed=seed)).terms
    assert 0 < float(terms["epsilon"]) < 1
    assert float(terms["ess"]) == pytest.approx(goal, abs=1e-6) and float(terms["ess_untempered"]) < goal


def test_near_the_posterior_nothing_is_tempered(tools, seed):
    target = targets.linear_regression()
    family = tools.gaussian(target.mean, target.covariance.diagonal().sqrt(), "full_rank")
    family.start_at(target.mean, torch.linalg.cholesky(target.covariance))
    loss = build().loss(family, target.model, normal_noise(50, 2, seed=seed))
    assert float(loss.terms["epsilon"]) == 0 and float(loss.value) == pytest.approx(0, abs=1e-12)


def test_where_tempering_stays_the_fit_is_the_optimum_of_that_renyi_order(tools):
    model, family = targets.correlated_normal(0.9).model, tools.gaussian([0.2, -0.2], [0.7, 0.7])
    objective = build("distilled_importance(ess=0.5)")
    descend(objective, family, model, torch.zeros(2000, 2, dtype=DOUBLE), steps=300, rate=0.05, fresh=True)
    epsilon = float(objective.loss(family, model, normal_noise(200_000, 2, seed=1)).terms["epsilon"])
    sd = family.moments()[1].detach().diagonal().sqrt()
    assert 0.1 < epsilon < 0.9
    assert sd.tolist() == pytest.approx([targets.mean_field_sd(epsilon, 0.9)] * 2, rel=0.02)


def test_a_gaussian_on_two_normals_covers_both(tools):
    model, family = targets.two_normals().model, tools.gaussian(0.5, 2.5)
    descend(build(), family, model, torch.zeros(400, 1, dtype=DOUBLE), steps=400, rate=0.05, fresh=True)
    mean, covariance = (part.detach() for part in family.moments())
    assert abs(float(mean)) < 0.1
    assert math.sqrt(float(covariance)) == pytest.approx(3.162, abs=0.1)


def test_tempering_towards_the_prior_mixes_prior_and_posterior(tools, seed):
    target = targets.linear_regression()
    mean, sd = target.model.gaussian_prior()
    family, noise = tools.gaussian(mean, sd), normal_noise(300, 2, seed=seed)
    # q is the prior: weights are the likelihood to a power, whichever way the tempering is written
    one = build("distilled_importance(ess=0.4)").loss(family, target.model, noise)
    two = build("distilled_importance(ess=0.4, towards=prior)").loss(family, target.model, noise)
    assert float(one.terms["epsilon"]) == pytest.approx(float(two.terms["epsilon"]))
    assert float(one.surrogate.detach()) == pytest.approx(float(two.surrogate.detach()))
    shifted = tools.gaussian(mean + 1.0, sd)
    other = [build(f"distilled_importance(ess=0.4, towards={t})") for t in ("family", "prior")]
    assert len({round(float(o.loss(shifted, target.model, noise).surrogate.detach()), 6) for o in other}) == 2


def test_weights_are_cut_and_still_sum_to_one(tools, seed):
    class Watched:
        """A normal law whose log density at the draws is a leaf, so that its gradient shows the weights."""

        def __init__(self, family):
            self.family, self.capabilities = family, family.capabilities

        def __call__(self, noise):
            return self.family(noise)

        def log_prob(self, z, context=None, *, frozen=False):
            self.leaf = self.family.log_prob(z).detach().requires_grad_()
            return self.leaf

    model, family = targets.correlated_normal().model, Watched(tools.gaussian([1.0, -1.0], [1.0, 1.0]))
    weights = []
    for spec in ("distilled_importance(ess=0.2)", "distilled_importance(ess=0.2, clip=3)"):
        loss = build(spec).loss(family, model, normal_noise(40, 2, seed=seed))
        weights.append(-torch.autograd.grad(loss.surrogate, [family.leaf])[0])
    whole, cut = weights
    over = float((whole - 3 / 40).clamp_min(0).sum())
    assert float(whole.max()) > 3 / 40
    assert float(cut.max()) == pytest.approx(3 / 40 + over / 40)
    assert float(whole.sum()) == pytest.approx(1) and float(cut.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "options", [{"ess": 0}, {"ess": 1.5}, {"ess": True}, {"clip": 1}, {"clip": "x"}, {"towards": "q"}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        vf.objectives.DistilledImportance(**options)


def test_tempering_towards_a_prior_needs_one():
    assert vf.plan("banana", "full_rank", "distilled_importance").estimator == "weights"
    with pytest.raises(IncompatibleError, match="log prior"):
        vf.plan("banana", "full_rank", "distilled_importance(towards=prior)")
