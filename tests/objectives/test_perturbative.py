"""Perturbative bounds: the reference level, validity at odd orders, derivatives, limits, optima."""

import math

import pytest
import torch

from vifamily import registry
from vifamily.errors import SpecError
from vifamily.models import Density
from vifamily.objectives import Elbo, Iwae, Perturbative
from vifamily.objectives.perturbative import perturbative_bound, reference_level
from vifamily.testing import targets
from vifamily.testing._tools import flat_gradient
from vifamily.types import LatentSpec

RATIO = torch.tensor([0.3, -1.2, 0.9, 2.1, -0.4], dtype=torch.float64)
LOGITS = torch.tensor([0.0, 0.4, -0.3, 0.1, -0.6], dtype=torch.float64)
ORDERS = [1, 3, 5, 9]
REGRESSION = targets.linear_regression()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_the_reference_level_makes_the_odd_moment_zero(order, scale):
    weight = LOGITS.softmax(0)
    level = reference_level(scale * RATIO, LOGITS.log_softmax(0), order)
    moment = (weight * (RATIO - level / scale) ** order).sum()
    assert float(moment) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_it_is_the_best_level_of_the_polynomial(order):
    weight = LOGITS.softmax(0)
    found = perturbative_bound(RATIO, LOGITS.log_softmax(0), order)

    def bound(c):
        x = RATIO - c
        return c + torch.log((weight * sum(x**n / math.factorial(n) for n in range(order + 1))).sum())

    best = float(reference_level(RATIO, LOGITS.log_softmax(0), order))
    assert float(found.value) == pytest.approx(float(bound(best)), abs=1e-12)
    for c in (best - 0.3, best - 1e-3, best + 1e-3, best + 0.3):
        assert float(bound(c)) < float(found.value)


@pytest.mark.parametrize("order", ORDERS)
def test_derivatives_of_a_step(order):
    log_weight = LOGITS.log_softmax(0)
    found = perturbative_bound(RATIO, log_weight, order)
    h = 1e-4
    for k in range(len(RATIO)):
        step = h * torch.eye(len(RATIO), dtype=torch.float64)[k]
        up, down = (perturbative_bound(RATIO + s * step, log_weight, order) for s in (1, -1))
        assert float(found.by_ratio[k]) == pytest.approx(float((up.value - down.value) / (2 * h)), abs=1e-7)
        assert float(found.bend[k]) == pytest.approx(float((up.by_ratio[k] - down.by_ratio[k]) / (2 * h)), abs=1e-7)
        up, down = (perturbative_bound(RATIO, (LOGITS + s * step).log_softmax(0), order) for s in (1, -1))
        through = found.by_weight[k] - LOGITS.softmax(0)[k] * found.by_weight.sum()
        assert float(through) == pytest.approx(float((up.value - down.value) / (2 * h)), abs=1e-7)
    assert float(found.by_ratio.sum()) == pytest.approx(1, abs=1e-12) and (found.by_ratio > 0).all()


def test_it_bounds_the_mean_ratio_of_any_draws():
    at = 4 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    even = torch.full((8,), -math.log(8), dtype=torch.float64)
    values = torch.stack([perturbative_bound(at, even, order).value for order in (1, 3, 5, 9, 15)])
    assert (values <= torch.logsumexp(at + even, -1) + 1e-12).all()
    skewed = torch.zeros(50, dtype=torch.float64)
    skewed[0] = 8.0
    level = torch.full((50,), -math.log(50), dtype=torch.float64)
    left, right = ([float(perturbative_bound(s * skewed, level, order).value) for order in (1, 3)] for s in (-1, 1))
    # it need not rise with the order: small ratios are held against q by their size
    assert left[1] < left[0] and right[1] > right[0]


@pytest.mark.parametrize("order", ORDERS)
def test_extreme_and_equal_ratios_are_finite(order):
    even = torch.full((4,), -math.log(4), dtype=torch.float64)
    for at in ([1e4, -1e4, 0.0, 1e4], [0.0, 0.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0 + 1e-15]):
        found = perturbative_bound(torch.tensor(at, dtype=torch.float64), even, order)
        assert all(torch.isfinite(part).all() for part in (found.value, found.by_ratio, found.by_weight, found.bend))
    same = perturbative_bound(torch.full((4,), 7.0, dtype=torch.float64), even, order)
    assert float(same.value) == pytest.approx(7, abs=1e-12) and same.by_ratio == pytest.approx([0.25] * 4)


def test_order_one_is_the_evidence_lower_bound(tools):
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for path, same in (("dreg", "stl"), ("reparameterised", "reparameterised")):
        family = tools.gaussian([0.2, -0.3], [0.5, 0.7])
        ours = Perturbative(1, path).loss(family, REGRESSION.model, noise)
        theirs = Elbo(same).loss(family, REGRESSION.model, noise)
        assert torch.allclose(ours.value, theirs.value, rtol=1e-12)
        assert torch.allclose(flat_gradient(ours, family), flat_gradient(theirs, family), atol=1e-11)


@pytest.mark.parametrize("order", [3, 5])
def test_estimators_agree_in_the_mean(order, tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    found = [
        tools.replicated_gradient(Perturbative(order, name), REGRESSION.model, family, 4, 15_000, seed)[0]
        for seed, name in enumerate(("reparameterised", "dreg", "score"))
    ]
    assert tools.same_mean(found[0], found[1]) and tools.same_mean(found[0], found[2])
    assert float((found[1].mean(0).abs() / (found[1].std(0) / 122)).max()) > 10


@pytest.mark.parametrize("width", [0.7, 1.3])
def test_expected_value_is_below_the_evidence(width, tools):
    family = tools.gaussian(REGRESSION.mean + 0.2, width * REGRESSION.covariance.diagonal().sqrt())
    names = (Elbo("reparameterised"), Perturbative(3, "reparameterised"), Iwae("reparameterised"))
    values = [-tools.replicated_gradient(o, REGRESSION.model, family, 16, 4000)[1].detach() for o in names]
    # the same noise, so that the order holds row by row
    assert (values[1] <= values[2] + 1e-12).all()
    assert float(values[1].mean()) < REGRESSION.log_evidence
    if width < 1:
        assert float(values[1].mean()) > float(values[0].mean()) + 0.1


def test_enumerated_bound_on_discrete_latents():
    target = targets.discrete()
    family = registry.build("families", "categorical(max_states=10)").build(
        LatentSpec(2, target.model.space, (2, 3)), generator=torch.Generator().manual_seed(1)
    )
    objective = Perturbative(5).resolve(target.model, family)
    assert objective.estimator == "enumerated"
    value = -float(objective.loss(family, target.model, torch.zeros(2, 0, dtype=torch.float64)).value)
    elbo = -float(Elbo("enumerated").loss(family, target.model, torch.zeros(2, 0, dtype=torch.float64)).value)
    assert elbo < value < target.log_evidence


def test_optima_on_two_normals(tools):
    # order 1 is best on one mode; order 3 on both, though more narrowly than order 1 would cover them
    model, noise, found = targets.two_normals().model, torch.zeros(1, 0), {}
    for order in (1, 3):
        for start in ((0.0, 2.7), (2.9, 1.1)):
            objective = Perturbative(order, "enumerated")
            found[order, start[0]] = tools.minimum(objective, model, tools.on_grid(*start, points=4001), noise, 3)
    assert found[1, 0.0][1:] == pytest.approx((2.74, 0.8406), abs=0.01)
    assert found[1, 2.9][1:] == pytest.approx((1.02, 0.6888), abs=0.01)
    assert found[3, 0.0][1:] == pytest.approx((2.30, 0.208), abs=0.02)
    assert found[1, 2.9][2] < found[1, 0.0][2] and found[3, 0.0][2] < found[3, 2.9][2] + 1e-9


def test_optimum_on_heavy_tails_is_wider(tools):
    law = torch.distributions.StudentT(torch.tensor(3.0, dtype=torch.float64))
    model = Density(lambda z: law.log_prob(z[:, 0]), dim=1)
    for order, sd in ((1, 1.260), (3, 1.74)):
        found = tools.minimum(Perturbative(order, "enumerated"), model, tools.on_grid(0.0, 1.3), torch.zeros(1, 0), 3)
        assert found[1] == pytest.approx(sd, abs=0.02)


@pytest.mark.parametrize("order", [2, 0, -1, 23, 3.0, True])
def test_even_and_other_orders_are_refused(order):
    with pytest.raises(SpecError, match="odd number"):
        Perturbative(order)
