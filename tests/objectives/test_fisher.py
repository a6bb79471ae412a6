"""The Fisher divergence: known optima, also where the family does not contain the posterior."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density
from vifamily.objectives import Fisher
from vifamily.rng import draw_noise
from vifamily.testing import targets
from vifamily.testing._settings import moved
from vifamily.testing._tools import flat_gradient, seeded
from vifamily.types import Capability, LatentSpec

PRECISION = torch.tensor([[2.0, 0.9, -0.3], [0.9, 1.5, 0.4], [-0.3, 0.4, 0.8]], dtype=torch.float64)


def normal_model():
    return Density(lambda z: -0.5 * ((z @ PRECISION) * z).sum(-1), dim=3)


def test_optima_on_two_normals(tools):
    """By quadrature, from either side; the reference is a table made with other code."""
    model, noise = targets.two_normals().model, tools.quadrature_noise(2000)
    for start, wanted in (((2.0, 1.2), (3.04, 0.98, 0.0329)), ((0.0, 3.0), (0.0, 2.63, 2.457))):
        family = tools.gaussian(*start)
        mean, sd, value = tools.minimum(Fisher(), model, family, noise)
        assert abs(abs(mean) - wanted[0]) < 0.02 and abs(sd - wanted[1]) < 0.02
        assert value == pytest.approx(wanted[2], abs=0.02)


@pytest.mark.parametrize("weight", ["identity", "covariance"])
def test_mean_field_on_a_correlated_normal_lands_on_its_closed_form(weight):
    posterior = vf.fit(normal_model(), "mean_field", Fisher(weight), seed=0)
    if weight == "identity":
        variance = (PRECISION @ PRECISION).diagonal().rsqrt()
        least = float(2 * (PRECISION @ PRECISION).diagonal().sqrt().sum() - 2 * PRECISION.diagonal().sum())
    else:
        variance = torch.linalg.solve(PRECISION.square(), PRECISION.diagonal())
        least = 3 - float(variance @ PRECISION.diagonal())
    assert bool((variance < 1 / PRECISION.diagonal()).all())  # narrower than reverse KL
    mean, covariance = posterior.family.moments()
    torch.testing.assert_close(covariance.diagonal(), variance, rtol=1e-4, atol=0)
    assert mean.abs().max() < 1e-4
    noise = draw_noise(posterior.family.noise_spec, (4000,), seeded(1))
    loss = Fisher(weight).loss(posterior.family, normal_model(), noise)
    assert float(loss.value) == pytest.approx(least, rel=0.15)


@pytest.mark.parametrize("weight", ["identity", "covariance"])
def test_no_gradient_noise_at_the_posterior(weight):
    target = targets.linear_regression()
    mean, covariance = target.moments()
    family = registry.build("families", "full_rank").build(LatentSpec(2), generator=seeded(0))
    family.start_at(mean, torch.linalg.cholesky(covariance))
    for seed in range(3):
        loss = Fisher(weight).loss(family, target.model, draw_noise(family.noise_spec, (1,), seeded(seed)))
        assert float(loss.value) < 1e-20
        assert flat_gradient(loss, family).abs().max() < 1e-10


def test_the_weighted_divergence_does_not_depend_on_units():
    matrix = torch.tensor([[3.0, 0.0], [1.0, 0.02]], dtype=torch.float64)
    inverse = torch.linalg.inv(matrix)

    def log_prob(z):
        return -0.25 * z[:, 0] ** 4 - 0.5 * (z[:, 1] - z[:, 0] ** 2) ** 2

    plain, mapped = Density(log_prob, dim=2), Density(lambda z: log_prob(z @ inverse.mT), dim=2)
    family = registry.build("families", "full_rank").build(LatentSpec(2), generator=seeded(0))
    family = moved(family, 0.3, seed=1)
    noise = draw_noise(family.noise_spec, (5,), seeded(2))
    mean, covariance = (part.detach() for part in family.moments())
    other = registry.build("families", "full_rank").build(LatentSpec(2), generator=seeded(0))
    root = torch.linalg.cholesky(covariance)
    other.start_at(matrix @ mean, torch.linalg.cholesky(matrix @ covariance @ matrix.mT))
    family.start_at(mean, root)
    # the same draws: noise of the mapped family such that its draws are the mapped ones
    z = family(noise).z @ matrix.mT
    factor = torch.linalg.cholesky(matrix @ covariance @ matrix.mT)
    turned = torch.linalg.solve_triangular(factor, (z - matrix @ mean).mT, upper=False).mT
    values = [float(Fisher("covariance").loss(f, m, e).value) for f, m, e in
              ((family, plain, noise), (other, mapped, turned.detach()))]  # fmt: skip
    assert values[0] == pytest.approx(values[1], rel=1e-8)
    values = [float(Fisher().loss(f, m, e).value) for f, m, e in
              ((family, plain, noise), (other, mapped, turned.detach()))]  # fmt: skip
    assert values[0] != pytest.approx(values[1], rel=0.1)


def test_normalisers_do_not_matter(tools):
    model = Density(lambda z: -0.5 * z.square().sum(-1) + 1e3, dim=1)
    family, noise = tools.gaussian(0.3, 0.5), tools.quadrature_noise(50)
    plain = Density(lambda z: -0.5 * z.square().sum(-1), dim=1)
    assert float(Fisher().loss(family, model, noise).value) == float(Fisher().loss(family, plain, noise).value)


def test_stratified_draws_count_by_their_weights(tools):
    """On a mixture with unequal weights the value is the integral under the mixture."""
    family = registry.build("families", "mixture(components=2)").build(LatentSpec(1), generator=seeded(0))
    family = moved(family, 0.8, seed=1)
    model = targets.two_normals().model
    _, values = tools.replicated_gradient(Fisher(), model, family, draws=4, copies=4000)
    grid = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None].requires_grad_()
    log_q, log_p = family.log_prob(grid), model.log_joint(grid)
    gap = torch.autograd.grad(log_q.sum() - log_p.sum(), grid)[0].square().squeeze(-1)
    wanted = float((log_q.exp() * gap).detach().sum() * (grid[1] - grid[0]).detach())
    assert abs(float(values.mean()) - wanted) < 5 * float(values.std()) / 4000**0.5


def cauchy(weight, sd, tools):
    model = Density(lambda z: -torch.log1p(z.square()).sum(-1), dim=1)
    return float(Fisher(weight).loss(tools.gaussian(0.0, sd), model, tools.quadrature_noise(2000)).value)


def test_heavy_tails_have_no_best_width(tools):
    """What the docstring says of a Cauchy law: the plain divergence falls to zero at infinite width."""
    near, hill, far = (cauchy("identity", sd, tools) for sd in (1.2, 3.0, 100.0))
    assert far < 0.2 * near < hill
    assert cauchy("covariance", 100.0, tools) > 100 * cauchy("covariance", 1.0, tools)


@pytest.mark.parametrize(
    ("apart", "weight", "published"), [(3.0, 0.8, 8.1e-3), (3.0, 0.95, 2.26e-2), (4.0, 0.8, 3.3e-4)]
)
def test_mode_weights_hardly_count(apart, weight, published):
    """The numbers of the docstring, against reverse KL of 0.19 and 0.49."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).requires_grad_()

    def log(w):
        both = torch.stack([math.log(w) - 0.5 * (x + apart) ** 2, math.log(1 - w) - 0.5 * (x - apart) ** 2])
        return both.logsumexp(0) - 0.5 * math.log(2 * math.pi)

    gap = torch.autograd.grad((log(weight) - log(0.5)).sum(), x)[0]
    value = float((log(weight).exp() * gap.square()).detach().sum() * (x[1] - x[0]).detach())
    assert value == pytest.approx(published, rel=0.02)


def test_refusals():
    with pytest.raises(ConfigError, match="identity"):
        Fisher("sd")
    model = normal_model()
    for family, objective, what in (
        ("implicit", "fisher", "log density"),
        ("ensemble", "fisher", "log density"),
        ("semi_implicit", "fisher", "bound"),
        ("flow", "fisher(weight=covariance)", "Gaussian moments"),
    ):
        with pytest.raises(IncompatibleError, match=what):
            vf.plan(model, family, objective)
    kinked = Density(lambda z: -z.abs().sum(-1), dim=2)
    kinked.capabilities = kinked.capabilities - {Capability.SECOND_ORDER}
    with pytest.raises(IncompatibleError, match="twice differentiable"):
        vf.plan(kinked, "mean_field", "fisher")
    everything = frozenset(Capability) - {Capability.LOG_Q_BOUND}
    assert Fisher().missing(everything, everything) == ("model: no local latents",)
    with pytest.raises(IncompatibleError, match="not a sum over data"):
        vf.plan(targets.linear_regression().model, "full_rank", "fisher", batch_size=4)


def test_fit_by_either_solver_agrees():
    target = targets.linear_regression()
    exact, covariance = target.moments()
    for solver in ("lbfgs", "adam"):
        posterior = vf.fit(target.model, "full_rank", "fisher", solver, seed=0)
        mean, found = posterior.family.moments()
        assert ((mean - exact) / covariance.diagonal().sqrt()).abs().max() < 0.05
        torch.testing.assert_close(found, covariance, rtol=0.1, atol=0.005)
