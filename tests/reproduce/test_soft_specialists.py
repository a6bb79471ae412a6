"""The reproduction of Soft Specialists: its parts, and the structure of a quick run."""

import math

import pytest
import torch

from vifamily import reproduce
from vifamily.diagnostics import stability
from vifamily.reproduce import Options
from vifamily.reproduce._soft_specialists_behaviour import Branch, route_information
from vifamily.reproduce._soft_specialists_cases import (
    closed_form_cases,
    contradictory_groups,
    normal_quantiles,
    outliers,
    skewed,
    two_features,
)
from vifamily.reproduce._soft_specialists_fit import EnsembleLoss, about, by_unit, flow, mixture_loss, settle

F64 = torch.float64
QUIET = Options(quick=True, say=lambda line: None)
CASES = {case.name: case for case in closed_form_cases(seed=0, quick=True)}


@pytest.mark.parametrize("name", list(CASES))
def test_members_collapse_below_and_spread_above(name):
    case = CASES[name]
    found = stability(case.model, case.centre, units=case.unit, sweep=())
    if case.alpha_star is not None:
        assert found.alpha_star == pytest.approx(case.alpha_star, rel=1e-10)
    length = found.curvature_along**-0.5
    start = about(case, seed=0, distance=1e-3 * length)
    below, above = (settle(case, f * found.alpha_star, start) for f in (0.9, 1.1))
    assert below.variance**0.5 < 1e-5 * length
    assert above.variance**0.5 > 0.05 * length
    # they move apart along the predicted direction
    _, vectors = torch.linalg.eigh(above.covariance)
    assert abs(float(vectors[:, -1] @ found.direction)) > 0.999


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.45, 1e-6), (0.55, 0.01), (0.8, 0.01), (1.0, 0.01)])
def test_members_of_a_location_have_the_variance_of_the_formula(alpha, tolerance):
    case = CASES["location, variance 2"]
    variance = settle(case, alpha, about(case, seed=0)).variance
    assert variance == pytest.approx(max(0.0, 2 - 1 / alpha), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("alpha", [0.22, 0.28, 0.6, 0.72])
def test_directions_open_one_at_a_time(alpha):
    case = CASES["location in the plane"]
    values = torch.linalg.eigvalsh(settle(case, alpha, about(case, seed=0)).covariance).flip(0)
    expected = torch.tensor([max(0.0, v - 1 / alpha) for v in (4.0, 1.5)], dtype=F64)
    torch.testing.assert_close(values, expected, rtol=0, atol=0.1)  # 24 quantiles a side are normal only so far
    assert float(values[1]) < 1e-2 or alpha > 1 / 1.5


def test_two_groups_halve_the_loss_of_the_mixture():
    case = contradictory_groups(2.0, 32, inputs=normal_quantiles(32))
    apart = settle(case, 0.8, about(case, seed=0))
    assert mixture_loss(by_unit(case, apart.points)) == pytest.approx(1.84, abs=0.01)
    assert mixture_loss(by_unit(case, case.centre[None])) == pytest.approx(3.419, abs=0.01)
    assert apart.points.abs().mean() == pytest.approx(2.0, abs=0.05)


def test_outliers_are_left_to_one_member():
    case = outliers()
    together, apart = (settle(case, alpha, about(case, seed=0)).points.ravel().sort().values for alpha in (0.05, 0.3))
    torch.testing.assert_close(together, torch.ones(8, dtype=F64), rtol=0, atol=1e-4)
    torch.testing.assert_close(apart, torch.tensor([0.0] * 7 + [10.0], dtype=F64), rtol=0, atol=0.05)


def test_conflict_spreads_members_in_the_conflicting_feature_alone():
    case = two_features(2.0, 1.5)
    sds = settle(case, 0.8, about(case, seed=0)).covariance.diagonal().sqrt()
    assert float(sds[0]) == pytest.approx(2.0, abs=0.05) and float(sds[1]) < 0.01


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_identical_members_stay_bit_identical(alpha):
    case = contradictory_groups(2.0)
    path = flow(case, alpha, torch.full((4, 1), 0.3, dtype=F64), step=0.1, steps=30)
    assert bool((path == path[:, :1]).all()) and float(path[0, 0]) != float(path[-1, 0])


@pytest.mark.parametrize(("alpha", "rate"), [(0.3, -0.4), (0.45, -0.1), (0.55, 0.1), (0.8, 0.6)])
def test_contrasts_grow_at_the_rate_of_the_criterion(alpha, rate):
    case = CASES["location, variance 2"]
    path = flow(case, alpha, about(case, seed=0, distance=1e-5), step=1e-3, steps=100)
    apart = (path - path.mean(1, keepdim=True)).flatten(1).norm(dim=1)
    assert float((apart[-1] / apart[0]).log()) / 0.1 == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize(("num_members", "alpha"), [(4, 0.48), (16, 0.4)])
def test_a_spread_state_is_lower_though_the_collapsed_one_is_stable(num_members, alpha):
    case = skewed(400)
    assert stability(case.model, case.centre, sweep=()).alpha_star == pytest.approx(0.5, rel=1e-10)
    together = settle(case, alpha, about(case, seed=0, num_members=num_members))
    apart = settle(case, 0.55, about(case, seed=0, num_members=num_members))
    apart = settle(case, alpha, apart.points)
    assert together.variance < 1e-8 and apart.variance > 0.1
    assert apart.loss < together.loss - 1e-3


def test_the_loss_at_alpha_one_and_zero():
    case = contradictory_groups(1.0)
    points = about(case, seed=0, distance=1.0)
    log_p = by_unit(case, points)
    assert EnsembleLoss(case, 1.0, 8)(points)[0] == pytest.approx(mixture_loss(log_p), rel=1e-12)
    assert EnsembleLoss(case, 0.0, 8)(points)[0] == pytest.approx(float(-log_p.mean()), rel=1e-12)


def test_route_information_runs_from_nothing_to_everything():
    label = torch.tensor([0, 1, 0, 1])
    assert route_information(torch.full((2, 4), 0.5, dtype=F64), label) == pytest.approx(0, abs=1e-12)
    sure = torch.stack([label == 0, label == 1]).to(F64)
    assert route_information(sure, label) == pytest.approx(1, abs=1e-12)


def test_first_order_needs_a_gain_where_the_collapsed_state_holds():
    assert Branch(4, 0.48, 0.0, 0.2, 0.01).first_order
    assert not Branch(4, 0.48, 0.3, 0.2, 0.01).first_order and not Branch(4, 0.48, 0.0, 0.2, 0.0).first_order


def test_a_quick_run_holds_and_says_what_it_did_not_try():
    found = reproduce.paper_named("soft-specialists").run(QUIET)
    assert not found.failed
    untried = [claim for claim in found.claims if claim.holds is None]
    assert len(untried) == 2 and all("language models" in claim.reason for claim in untried)
    assert all(("(paper" in c.claim) or ("derived here" in c.claim) for c in found.claims)
    assert set(found.figures) == {"spread", "responsibilities", "hysteresis", "transient"}
    assert all(row["as_predicted"] for row in found.tables["sides"])
    sampled = [claim for claim in found.claims if claim.error is not None]
    assert sampled and all(math.isfinite(claim.error) and claim.error > 0 for claim in sampled)
