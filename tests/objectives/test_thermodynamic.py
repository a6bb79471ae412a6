"""Thermodynamic bounds: partitions, validity for every number of draws, derivatives, the covariance gradient."""

import math

import pytest
import torch

from vifamily import registry
from vifamily.errors import SpecError
from vifamily.objectives import Elbo, Iwae, Thermodynamic
from vifamily.objectives.thermodynamic import path_points, thermodynamic_sum
from vifamily.testing import targets
from vifamily.testing._tools import finite_difference, flat_gradient
from vifamily.types import LatentSpec

RATIO = torch.tensor([0.3, -1.2, 0.9, 2.1, -0.4], dtype=torch.float64)
LOGITS = torch.tensor([0.0, 0.4, -0.3, 0.1, -0.6], dtype=torch.float64)
REGRESSION = targets.linear_regression()
POINTS = [path_points(1, "log", 0.1), path_points(4, "log", 0.03), path_points(3, "linear", 0.1), (0.0, 0.02, 0.7)]


def test_partitions():
    assert path_points(1, "log", 0.1) == path_points(1, "linear", 0.1) == (0.0,)
    assert path_points(3, "log", 0.01) == pytest.approx((0, 0.01, 0.1))
    assert path_points(3, [0.2, 0.5], 0.01) == (0.0, 0.2, 0.5)
    for partitions in (2, 5, 50):
        points = path_points(partitions, "log", 0.025)
        assert (
            len(points) == partitions
            and points[1] == 0.025
            and all(a < b < 1 for a, b in zip(points, points[1:], strict=False))
        )


BAD = [
    ({"partitions": 0}, "partitions must be"),
    ({"partitions": 2.0}, "partitions must be"),
    ({"schedule": "cubic"}, "schedule must be"),
    ({"partitions": 3, "schedule": [0.5]}, "one fewer"),
    ({"partitions": 3, "schedule": [0.5, 0.2]}, "rising"),
    ({"partitions": 2, "schedule": [1.0]}, "rising"),
    ({"first": 0}, "first must lie"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_wrong_partitions_are_refused(options, words):
    with pytest.raises(SpecError, match=words):
        Thermodynamic(**options)


@pytest.mark.parametrize("points", POINTS)
def test_derivatives_of_a_step(points):
    log_weight = LOGITS.log_softmax(0)
    found = thermodynamic_sum(RATIO, log_weight, points)
    h = 1e-4
    for k in range(len(RATIO)):
        step = h * torch.eye(len(RATIO), dtype=torch.float64)[k]
        up, down = (thermodynamic_sum(RATIO + s * step, log_weight, points) for s in (1, -1))
        assert float(found.by_ratio[k]) == pytest.approx(float((up.value - down.value) / (2 * h)), abs=1e-7)
        assert float(found.bend[k]) == pytest.approx(float((up.by_ratio[k] - down.by_ratio[k]) / (2 * h)), abs=1e-7)
        up, down = (thermodynamic_sum(RATIO, (LOGITS + s * step).log_softmax(0), points) for s in (1, -1))
        through = found.by_weight[k] - LOGITS.softmax(0)[k] * found.by_weight.sum()
        assert float(through) == pytest.approx(float((up.value - down.value) / (2 * h)), abs=1e-7)


def test_it_lies_below_the_mean_ratio_of_any_draws_and_tends_to_it():
    at = 4 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    even = torch.full((8,), -math.log(8), dtype=torch.float64)
    limit = torch.logsumexp(at + even, -1)
    values = [thermodynamic_sum(at, even, path_points(n, "linear", 0.1)).value for n in (1, 2, 4, 8, 64)]
    # each partition refines the one before, so its left sum is larger
    assert all((a <= b + 1e-12).all() for a, b in zip(values, [*values[1:], limit], strict=True))
    assert torch.allclose(thermodynamic_sum(at, even, path_points(1000, "linear", 0.1)).value, limit, atol=0.02)
    assert torch.allclose(values[0], at.mean(-1))


def test_one_partition_is_the_evidence_lower_bound(tools):
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for path, same in (("dreg", "stl"), ("reparameterised", "reparameterised")):
        family = tools.gaussian([0.2, -0.3], [0.5, 0.7])
        ours = Thermodynamic(1, estimator=path).loss(family, REGRESSION.model, noise)
        theirs = Elbo(same).loss(family, REGRESSION.model, noise)
        assert torch.allclose(ours.value, theirs.value, rtol=1e-12)
        assert torch.allclose(flat_gradient(ours, family), flat_gradient(theirs, family), atol=1e-11)


def test_value_by_quadrature_of_the_path(tools):
    # q = N(0.3, 1.4^2) to p = N(1, 1): the law at beta is normal, and the mean log ratio under it a quadratic form
    family = tools.on_grid(0.3, 1.4)
    from vifamily.models import Density

    model = Density(lambda z: -0.5 * (z[:, 0] - 1) ** 2 - 0.5 * math.log(2 * math.pi) - 2.0, dim=1)
    points = path_points(4, "log", 0.1)
    total = 0.0
    for beta, end in zip(points, [*points[1:], 1.0], strict=True):
        precision = (1 - beta) / 1.96 + beta
        mean, variance = ((1 - beta) * 0.3 / 1.96 + beta) / precision, 1 / precision
        log_p = -0.5 * (variance + (mean - 1) ** 2) - 0.5 * math.log(2 * math.pi) - 2.0
        log_q = -0.5 * (variance + (mean - 0.3) ** 2) / 1.96 - math.log(1.4) - 0.5 * math.log(2 * math.pi)
        total += (end - beta) * (log_p - log_q)
    objective = Thermodynamic(4, first=0.1, estimator="enumerated")
    assert -float(objective.loss(family, model, torch.zeros(1, 0)).value) == pytest.approx(total, abs=1e-8)
    assert total < -2.0


@pytest.mark.parametrize("partitions", [2, 5])
def test_estimators_agree_in_the_mean(partitions, tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    found = [
        tools.replicated_gradient(Thermodynamic(partitions, estimator=name), REGRESSION.model, family, 4, 40_000, seed)[
            0
        ]
        for seed, name in enumerate(("reparameterised", "dreg", "score"))
    ]
    assert tools.same_mean(found[0], found[1]) and tools.same_mean(found[0], found[2])
    assert float((found[1].mean(0).abs() / (found[1].std(0) / 200)).max()) > 10


def categorical(max_states):
    latent = LatentSpec(2, targets.discrete().model.space, (2, 3))
    family = registry.build("families", f"categorical(max_states={max_states})").build(
        latent, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        family.logits.add_(0.5 * torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return family


def test_covariance_gradient_is_that_of_the_exact_sum_with_many_draws(tools):
    target, family = targets.discrete(), categorical(10)
    exact = Thermodynamic(4, estimator="enumerated")
    noise = torch.zeros(2, 0, dtype=torch.float64)
    wanted = finite_difference(lambda: exact.loss(family, target.model, noise).value, family, step=1e-5, stacked=False)
    objective = Thermodynamic(4, estimator="covariance")
    off = []
    for draws, copies in ((8, 20_000), (256, 4000)):
        found, _ = tools.replicated_gradient(objective, target.model, categorical(0), draws, copies)
        off.append(float((found.mean(0) - wanted.reshape(-1)).abs().max()))
    assert off[0] > 5 * off[1] and off[1] < 0.01 * float(wanted.abs().max()) + 5 * float(found.std(0).max()) / 63


def test_covariance_gradient_with_one_partition_is_unbiased(tools):
    # two draws: without the correction for the sample's own mean it would be half of what it should be
    target = targets.discrete()
    one, score = (
        tools.replicated_gradient(o, target.model, categorical(0), 2, 40_000, seed)[0]
        for seed, o in enumerate((Thermodynamic(1, estimator="covariance"), Elbo("score")))
    )
    assert tools.same_mean(one, score)


def test_expected_value_rises_with_partitions_up_to_the_importance_weighted_bound(tools):
    family = tools.gaussian(REGRESSION.mean + 0.2, 1.3 * REGRESSION.covariance.diagonal().sqrt())
    objectives = [Thermodynamic(n, schedule="linear", estimator="reparameterised") for n in (1, 2, 8, 200)]
    values = [
        -tools.replicated_gradient(o, REGRESSION.model, family, 64, 1000)[1].detach()
        for o in (*objectives, Iwae("reparameterised"))
    ]
    assert all((a <= b + 1e-12).all() for a, b in zip(values, values[1:], strict=False))
    assert float(values[-2].mean()) == pytest.approx(REGRESSION.log_evidence, abs=0.02)
    assert float(values[0].mean()) < REGRESSION.log_evidence - 0.1


def test_optimum_on_two_normals_widens_with_partitions(tools):
    model, noise, sds = targets.two_normals().model, torch.zeros(1, 0), []
    for partitions in (1, 3, 8):
        objective = Thermodynamic(partitions, schedule="linear", estimator="enumerated")
        sds.append(tools.minimum(objective, model, tools.on_grid(0.0, 2.7, points=4001), noise, 3)[1])
    assert sds[0] == pytest.approx(2.74, abs=0.02)
    assert sds[0] + 0.005 < sds[1] and sds[1] + 0.005 < sds[2] < 3.3
