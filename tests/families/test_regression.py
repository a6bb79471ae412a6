"""Flows on what a linear regression on the context leaves."""

import pytest
import torch

from vifamily.errors import ConfigError
from vifamily.families._regression import RegressionFrame
from vifamily.families.flow import Flow
from vifamily.types import LatentSpec

BOUNDED = torch.tensor([True, False])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(num=4000, seed=0):
    """Coordinate 0 is a logit of ``t = 0.5 + 0.1 c0 + 0.02 e``, coordinate 1 is ``3 + 2 c1 + 0.5 e``."""
    context, noise = normal(num, 2, seed=seed), normal(num, 2, seed=seed + 1)
    t = (0.5 + 0.1 * context[:, 0] + 0.02 * noise[:, 0]).clamp(1e-4, 1 - 1e-4)
    return torch.stack([torch.logit(t), 3 + 2 * context[:, 1] + 0.5 * noise[:, 1]], -1), context


def flow(**options):
    entry = Flow(transforms=2, hidden=(16,), standardise="regression", **options)
    return entry.build(LatentSpec(2, context_dim=2), generator=torch.Generator().manual_seed(0))


def test_before_the_fit_it_is_the_identity():
    frame = RegressionFrame(LatentSpec(2, context_dim=3))
    z, context = normal(5, 2), normal(5, 3)
    v, log_jacobian = frame(z, context)
    assert torch.equal(v, z) and not bool(log_jacobian.any())


def test_the_fit_finds_slopes_and_the_spread_of_the_rest():
    frame = RegressionFrame(LatentSpec(2, context_dim=2))
    z, context = pairs()
    frame.fit(z, context, BOUNDED)
    # five standard errors of a slope from 2,000 pairs, and the few pairs that the bounds cut off
    assert abs(float(frame.start_slope[0, 0]) - 0.1) < 0.004
    assert abs(float(frame.start_slope[1, 1]) - 2) < 5 * 0.5 / 2000**0.5
    assert float(frame.unit[1]) == pytest.approx(0.5, rel=5 / (2 * 2000) ** 0.5)
    v, _ = frame(z, context)
    assert float(v[:, 1].detach().std()) == pytest.approx(1.0, abs=0.08)
    assert 0.8 < float(v[:, 0].detach().std()) < 1.3
    assert float(torch.corrcoef(torch.cat([v.detach(), context], 1).T)[:2, 2:].abs().max()) < 0.1


def test_more_context_numbers_than_pairs_do_not_make_the_rest_too_narrow():
    frame = RegressionFrame(LatentSpec(1, context_dim=80))
    frame.fit(normal(60, 1), normal(60, 80, seed=1), torch.tensor([False]))
    assert float(frame.unit) > 0.6


def test_the_map_and_its_inverse_agree_and_the_jacobian_is_the_determinant():
    frame = RegressionFrame(LatentSpec(2, context_dim=2))
    z, context = pairs(200)
    frame.fit(z, context, BOUNDED)
    v, log_jacobian = frame(z, context)
    back, again = frame.inverse(v, context)
    torch.testing.assert_close(back, z, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(again, log_jacobian, rtol=1e-7, atol=1e-7)
    matrix = torch.autograd.functional.jacobian(lambda one: frame(one[None], context[:1])[0][0], z[0])
    assert float(matrix.det().abs().log()) == pytest.approx(float(log_jacobian.detach()[0]), abs=1e-8)


@pytest.mark.parametrize("direction", ["draws", "density"])
def test_a_flow_on_residuals_has_the_density_that_its_map_gives(direction):
    family = flow(direction=direction)
    z, context = pairs(500)
    assert family.start_from(z, context, BOUNDED)
    with torch.no_grad():
        for p in family.layers.parameters():
            p.add_(0.1 * normal(*p.shape, seed=2))
    noise = normal(3, 5, 2)
    draw = family(noise, context[:5])
    torch.testing.assert_close(draw.log_q, family.log_prob(draw.z, context[:5]), rtol=1e-6, atol=1e-6)
    matrix = torch.autograd.functional.jacobian(lambda e: family(e[None, None], context[:1]).z[0, 0], noise[0, 0])
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(noise[0, 0]).sum()
    assert float(draw.log_q.detach()[0, 0]) == pytest.approx(float(standard - matrix.det().abs().log()), abs=1e-6)


def test_its_start_is_already_the_posterior_of_a_linear_model():
    family = flow()
    z, context = pairs()
    family.start_from(z, context, BOUNDED)
    new, given = pairs(seed=7)
    exact = torch.distributions.Normal(3 + 2 * given[:, 1], 0.5).log_prob(new[:, 1])
    inside = (new[:, 0].abs() < 6) & (given[:, 0].abs() < 3)
    t = new[:, 0].sigmoid()
    rest = torch.distributions.Normal(0.5 + 0.1 * given[:, 0], 0.02).log_prob(t) + (t * (1 - t)).log()
    gap = (exact + rest - family.log_prob(new, given))[inside]
    # a normal law beside the logistic one: 0.014 nats
    assert abs(float(gap.detach().mean())) < 0.05


def test_without_a_context_or_in_the_marginal_form_there_is_no_regression():
    plain = Flow(standardise="regression").build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
    assert plain.frame is None
    for entry in (Flow(), Flow(standardise="marginal")):
        family = entry.build(LatentSpec(2, context_dim=2), generator=torch.Generator().manual_seed(0))
        assert not family.start_from(*pairs(10), BOUNDED)
    assert Flow().for_pairs().standardise == "regression"
    assert Flow(standardise="marginal").for_pairs().standardise == "marginal"
    with pytest.raises(ConfigError, match="unknown standardise"):
        Flow(standardise="whiten")
