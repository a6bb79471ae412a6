"""Maximum mean discrepancy to reference draws, against Gaussian closed forms."""

import math

import pytest
import torch
from scipy.optimize import minimize

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density
from vifamily.testing import targets
from vifamily.testing._tools import descend

DOUBLE = torch.float64
RBF = "mmd(kernel=rbf, bandwidth=1.5, standardise=false"


def model_with(draws):
    return Density(lambda z: 0.0 * z.sum(-1), dim=draws.shape[1]).with_reference_draws(draws)


def normal_draws(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def closed_form(draws, mean, sd, h):
    """MMD of a mean-field normal law to reference draws, pairs of different draws, RBF kernel."""
    wide = h**2 + sd**2
    across = (h / wide.sqrt() * torch.exp(-((draws - mean) ** 2) / (2 * wide))).prod(-1).mean()
    own = (h / (h**2 + 2 * sd**2).sqrt()).prod()
    n = len(draws)
    reference = (torch.exp(-(torch.cdist(draws, draws) ** 2) / (2 * h**2)).sum() - n) / (n * (n - 1))
    return float(own + reference - 2 * across)


def test_the_value_is_unbiased_for_the_closed_form(tools, seed):
    draws, mean, sd = normal_draws(40, 2, seed), torch.tensor([0.5, -0.2]), torch.tensor([0.8, 1.6])
    family = tools.gaussian(mean, sd)
    objective = registry.build("objectives", RBF + ", estimator=pairs)")
    _, value = tools.replicated_gradient(objective, model_with(draws), family, 3, 4000, seed)
    wanted = closed_form(draws, mean.to(DOUBLE), sd.to(DOUBLE), 1.5)
    assert abs(float(value.mean()) - wanted) < 5 * float(value.std()) / math.sqrt(4000)


def test_mean_field_lands_on_the_minimum_of_the_closed_form(tools):
    model = targets.correlated_normal(0.9).model
    draws, zero = model.reference_draws, torch.zeros(2, dtype=DOUBLE)
    best = minimize(
        lambda x: closed_form(draws, zero, torch.full((2,), math.exp(x[0]), dtype=DOUBLE), 1.5),
        [0.0],
        method="Nelder-Mead",
    )
    family = tools.gaussian([0.3, -0.2], [1.4, 1.4])
    objective = registry.build("objectives", RBF + ", estimator=pairs)")
    descend(objective, family, model, torch.zeros(200, 2, dtype=DOUBLE), steps=200, rate=0.05, fresh=True)
    sd = family.moments()[1].detach().diagonal().sqrt()
    # neither the marginal spread, 1, nor the conditional one, 0.44
    assert sd.tolist() == pytest.approx([math.exp(best.x[0])] * 2, rel=0.02)


def test_points_of_an_ensemble_are_summed_exactly(tools):
    draws, model = normal_draws(30, 2, 0), model_with(normal_draws(30, 2, 0))
    family = registry.build("families", "ensemble(size=4)").build(
        vf.types.LatentSpec(2), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        family.logits.copy_(torch.tensor([0.5, -0.5, 0.0, 1.0]))
    objective = registry.build("objectives", RBF + ")").resolve(model, family)
    loss = objective.loss(family, model, torch.zeros(2, 0, dtype=DOUBLE))

    def kernel(x, y):
        return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * 1.5**2))

    z, w = family.points.detach(), family.logits.detach().softmax(0)
    reference = (kernel(draws, draws).sum() - 30) / (30 * 29)
    wanted = w @ kernel(z, z) @ w + reference - 2 * (w @ kernel(z, draws)).mean()
    assert objective.estimator == "points" and float(loss.value) == pytest.approx(float(wanted))


def test_an_ensemble_at_the_reference_draws_has_no_gradient():
    draws = normal_draws(6, 2, 3)
    model = model_with(draws)
    family = registry.build("families", "ensemble(size=6)").build(
        vf.types.LatentSpec(2), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        family.points.copy_(draws)
    objective = registry.build("objectives", "mmd").resolve(model, family)
    surrogate = objective.loss(family, model, torch.zeros(2, 0, dtype=DOUBLE)).surrogate
    assert all(float(g.abs().max()) < 1e-12 for g in torch.autograd.grad(surrogate, [family.points, family.logits]))


@pytest.mark.parametrize(("objective", "steps"), [("mmd", 400), ("energy_distance", 400), ("sinkhorn", 120)])
def test_a_sampler_without_density_learns_the_reference_draws(objective, steps):
    draws = torch.tensor([1.0, -2.0]) + normal_draws(400, 2, 0) @ torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=DOUBLE)
    posterior = vf.fit(
        model_with(draws), "implicit(hidden=[8])", objective, seed=0, steps=steps, init=torch.zeros(2), draws=64
    )
    z = posterior.draws(4000)
    error = (z.mean(0) - draws.mean(0)).abs() / draws.std(0)
    assert bool((error < 0.15).all())
    assert bool(((z.std(0) / draws.std(0)).log().abs() < 0.2).all())
    assert float(torch.corrcoef(z.mT)[0, 1]) == pytest.approx(0.89, abs=0.08)


def test_units_do_not_matter_when_standardised(tools, seed):
    draws, scale = normal_draws(50, 2, seed), torch.tensor([1e-3, 1e4], dtype=DOUBLE)
    noise = normal_draws(8, 2, seed + 1)
    objective = registry.build("objectives", "mmd(estimator=pairs)")
    one = objective.loss(tools.gaussian([0.1, 0.2], [1.0, 2.0]), model_with(draws), noise)
    two = objective.loss(
        tools.gaussian(scale * torch.tensor([0.1, 0.2]), scale * torch.tensor([1.0, 2.0])),
        model_with(draws * scale),
        noise,
    )
    assert float(two.value) == pytest.approx(float(one.value), abs=1e-6)


def test_constants_are_computed_once_for_each_set_of_draws(monkeypatch, tools):
    from vifamily.objectives import mmd

    calls = []
    original = mmd.median_distance
    monkeypatch.setattr(mmd, "median_distance", lambda x: calls.append(len(x)) or original(x))
    objective, family = registry.build("objectives", "mmd(estimator=pairs)"), tools.gaussian([0.0, 0.0], [1.0, 1.0])
    for model in (model_with(normal_draws(20, 2, 0)), model_with(normal_draws(30, 2, 1))):
        for _ in range(3):
            objective.loss(family, model, normal_draws(4, 2, 2))
    assert calls == [20, 30]


@pytest.mark.parametrize(
    "options",
    [{"kernel": "cubic"}, {"bandwidth": 0}, {"bandwidth": "mean"}, {"standardise": 1}, {"reference_batch": 1}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        vf.objectives.Mmd(**options)


def test_strata_and_missing_draws_are_refused():
    with pytest.raises(IncompatibleError, match="unequal weights"):
        vf.plan("banana", "mixture(components=2)", "mmd")
    with pytest.raises(IncompatibleError, match="reference draws"):
        vf.plan(Density(lambda z: -(z**2).sum(-1), dim=2), "full_rank", "mmd")
