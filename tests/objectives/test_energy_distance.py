"""Energy distance to reference draws, against its one-dimensional form by distribution functions."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError
from vifamily.models import Density
from vifamily.testing._tools import descend, flat_gradient

DOUBLE = torch.float64


def normal_draws(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def model_with(draws):
    return Density(lambda z: 0.0 * z.sum(-1), dim=draws.shape[1]).with_reference_draws(draws)


def test_in_one_dimension_it_is_twice_the_squared_distance_of_distribution_functions():
    draws = normal_draws(25, 1, 0)
    family = registry.build("families", "ensemble(size=5)").build(
        vf.types.LatentSpec(1), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        family.logits.copy_(torch.tensor([0.3, -0.6, 0.0, 1.0, 0.2]))
    model = model_with(draws)
    objective = registry.build("objectives", "energy_distance(standardise=false)").resolve(model, family)
    value = float(objective.loss(family, model, torch.zeros(2, 0, dtype=DOUBLE)).value)
    z, w = family.points.detach()[:, 0], family.logits.detach().softmax(0)
    grid = torch.linspace(-8, 8, 400_001, dtype=DOUBLE)
    below = (grid[:, None] >= z).to(DOUBLE) @ w - (grid[:, None] >= draws[:, 0]).to(DOUBLE).mean(1)
    cramer = 2 * float(below.square().sum() * (grid[1] - grid[0]))
    # reference draws are paired with others only, which is unbiased for the law that they are draws of
    every = float((draws - draws.mT).abs().mean())
    assert value == pytest.approx(cramer + every - every * 25 / 24, abs=1e-4)


@pytest.mark.parametrize("power", [0.5, 1.5])
def test_a_gaussian_recovers_a_gaussian(power, tools):
    draws = 0.7 + 2.0 * tools.quadrature_noise(200)
    family = tools.gaussian(0.0, 1.0)
    objective = registry.build("objectives", f"energy_distance(power={power}, estimator=pairs)")
    descend(objective, family, model_with(draws), torch.zeros(200, 1, dtype=DOUBLE), steps=250, rate=0.05, fresh=True)
    mean, covariance = (part.detach() for part in family.moments())
    assert float(mean) == pytest.approx(0.7, abs=0.1)
    assert math.sqrt(float(covariance)) == pytest.approx(2.0, rel=0.04)


def test_coinciding_draws_have_a_finite_gradient(tools):
    objective = registry.build("objectives", "energy_distance(power=0.3, estimator=pairs)")
    family, model = tools.gaussian([0.0, 0.0], [1.0, 1.0]), model_with(torch.zeros(4, 2, dtype=DOUBLE))
    gradient = flat_gradient(objective.loss(family, model, torch.zeros(3, 2, dtype=DOUBLE)), family)
    assert bool(torch.isfinite(gradient).all())


def test_the_gradient_does_not_fade_far_out(tools):
    model, noise = model_with(normal_draws(50, 2, 0)), normal_draws(16, 2, 1)
    sizes = []
    for name in ("energy_distance", "mmd(kernel=rbf)"):
        objective = registry.build("objectives", name)
        family = tools.gaussian([1e3, 1e3], [1.0, 1.0])
        objective = objective.resolve(model, family)
        sizes.append(float(flat_gradient(objective.loss(family, model, noise), family)[:2].norm()))
    assert sizes[0] > 1 and sizes[1] < 1e-10


def test_parts_of_the_reference_draws_take_turns():
    draws = normal_draws(300, 2, 0)
    options = {"seed": 0, "steps": 150, "init": torch.zeros(2)}
    whole = vf.fit(model_with(draws), "mean_field", "energy_distance", **options)
    parts = vf.fit(model_with(draws), "mean_field", "energy_distance(reference_batch=50)", **options)
    a, b = (posterior.family.moments()[0] for posterior in (whole, parts))
    assert float((a - b).abs().max()) < 0.15 and not torch.equal(a, b)


@pytest.mark.parametrize("power", [0, 2, 3.0, True, "one"])
def test_powers_out_of_range_are_refused(power):
    with pytest.raises(ConfigError, match="between 0 and 2"):
        vf.objectives.EnergyDistance(power=power)
