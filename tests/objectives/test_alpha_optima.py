"""Known optima of objectives with an alpha: mean field in several dimensions, alpha energies, chi bounds, VR-max."""

import math

import pytest
import torch
from scipy.optimize import brentq, minimize

from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density, LikelihoodModel
from vifamily.objectives import BbAlpha, Cubo, Elbo, Renyi, RenyiPredictive, VrMax
from vifamily.testing import targets
from vifamily.testing._narrow import NarrowFamily
from vifamily.testing._tools import flat_gradient, grid_noise, replicate
from vifamily.types import Capability, Draw, LatentSpec

REGRESSION = targets.linear_regression()


class Weighted(NarrowFamily):
    """A Gaussian family on given noise, whose draws carry weights, so that tails count as they should."""

    def __init__(self, family, points, log_density):
        super().__init__(family, family.capabilities)
        self.points = points
        self.log_weight = (-0.5 * self.points.square().sum(-1) - log_density).log_softmax(0)

    @classmethod
    def grid(cls, family, reach=9.0, per_axis=121):
        axis = torch.linspace(-reach, reach, per_axis, dtype=torch.float64)
        points = torch.cartesian_prod(*[axis] * family.dim).reshape(-1, family.dim)
        return cls(family, points, torch.zeros(len(points), dtype=torch.float64))

    @classmethod
    def drawn(cls, family, precision, draws, seed):
        """Noise from another normal law, as symmetric as the target: chance would decide along flat directions."""
        sobol = torch.quasirandom.SobolEngine(family.dim, scramble=True, seed=seed % 10_000)
        points = torch.special.ndtri(sobol.draw(draws, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
        points = points @ torch.linalg.cholesky(torch.linalg.inv(precision)).T
        points = torch.cat([points.roll(shift, 1) for shift in range(family.dim)])
        points = torch.cat([points, -points])
        return cls(family, points, -0.5 * ((points @ precision) * points).sum(-1))

    def __call__(self, noise, context=None):
        draw = self._family(self.points)
        return Draw(draw.z, draw.log_q, self.log_weight)

    def parameters(self):
        return [p for p in self._family.parameters() if p.numel()]

    def moments(self):
        return self._family.moments()


# --- mean field on an equicorrelated normal law, by the other Rényi objective ---
def equicorrelated(dim, rho=0.9):
    covariance = torch.full((dim, dim), rho, dtype=torch.float64) + (1 - rho) * torch.eye(dim, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.zeros(dim, dtype=torch.float64), covariance)
    return Density(normal.log_prob, dim=dim), covariance


def closed_form_sd(alpha, eigenvalues):
    """The root of mean_i 1 / (1 - alpha + alpha lambda_i / s^2) = 1 other than where it holds for every s."""
    if alpha in (0, 1):
        values = eigenvalues if alpha == 0 else 1 / eigenvalues
        return math.sqrt(float(values.mean())) ** (1 if alpha == 0 else -1)

    def excess(log_variance):
        return float((1 / (1 - alpha + alpha * eigenvalues / math.exp(log_variance))).mean()) - 1

    return math.exp(0.5 * brentq(excess, -6, 3))


@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_the_closed_form_is_that_of_two_dimensions_and_ordered(dim):
    eigenvalues = torch.linalg.eigvalsh(equicorrelated(dim)[1])
    sds = [closed_form_sd(alpha, eigenvalues) for alpha in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
    assert all(a > b for a, b in zip(sds, sds[1:], strict=False))
    assert sds[0] == pytest.approx(1.0) and sds[-1] == pytest.approx(float((1 / eigenvalues).mean()) ** -0.5)
    if dim == 2:
        wanted = [targets.mean_field_sd(alpha, 0.9) for alpha in (0.25, 0.5, 0.75)]
        assert sds[2:5] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_mean_field_in_several_dimensions_lands_between_conditional_and_marginal(dim, tools, seed):
    model, covariance = equicorrelated(dim)
    eigenvalues, flat = torch.linalg.eigvalsh(covariance), torch.eye(dim, dtype=torch.float64)
    fitted = []
    for alpha in (0.25, 0.5, 0.75, 1.0):
        objective = registry.build("objectives", f"renyi(alpha={alpha}, estimator=reparameterised)")
        # where the integrand has its mass, half as wide again in variance
        precision = (alpha * flat + (1 - alpha) * 0.4 * torch.linalg.inv(covariance)) / 1.5
        family = Weighted.drawn(tools.gaussian([0.05] * dim, [0.7] * dim), precision, 2048, seed)
        tools.minimum(objective, model, family, torch.zeros(1), rounds=2)
        sd = family.moments()[1].detach().diagonal().sqrt()
        assert torch.allclose(sd, torch.full_like(sd, closed_form_sd(alpha, eigenvalues)), rtol=0.03)
        fitted.append(float(sd.mean()))
    assert all(a > b for a, b in zip(fitted, fitted[1:], strict=False))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 0.5, 0.9, 2.0])
def test_doubly_reparameterised_gradient_is_the_plain_one_with_less_noise(alpha, tools):
    family = tools.gaussian(REGRESSION.mean + 0.05, REGRESSION.covariance.diagonal().sqrt() * 0.95)
    plain, path = (
        tools.replicated_gradient(Renyi(alpha, name), REGRESSION.model, family, 16, 4000, seed)[0]
        for seed, name in enumerate(("reparameterised", "dreg"))
    )
    assert tools.same_mean(plain, path)
    assert (path.std(0) < plain.std(0)).all()


# --- chi upper bounds ---
def test_chi_square_bound_on_two_normals(tools):
    objective = registry.build("objectives", "cubo(n=2, estimator=reparameterised)")
    mean, sd, value = tools.minimum(
        objective, targets.two_normals().model, tools.gaussian(0.5, 3.0), tools.quadrature_noise(20_000)
    )
    assert abs(mean) == pytest.approx(0, abs=0.02) and sd == pytest.approx(3.23, abs=0.02)
    assert value == pytest.approx(0.6104 / 2, abs=0.0025)


@pytest.mark.parametrize("n", [1.2, 1.5, 2.0, 3.0])
def test_mean_field_by_chi_bounds_is_wider_than_the_marginal(n, tools):
    rho = 0.9
    family = Weighted.grid(tools.gaussian([0.1, -0.1], [1.3, 1.2]))
    objective = Cubo(n, "reparameterised")
    _, sd, value = tools.minimum(objective, targets.correlated_normal(rho).model, family, torch.zeros(1), rounds=3)
    assert sd == pytest.approx(targets.mean_field_sd(1 - n, rho), rel=1e-3)
    assert sd > 1 and value > 0


def test_chi_bound_is_the_other_sign_of_a_renyi_bound(tools):
    family, noise = (
        tools.gaussian([0.2, -0.3], [0.9, 0.8]),
        torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    for name in ("reparameterised", "dreg"):
        ours, other = (o.loss(family, REGRESSION.model, noise) for o in (Cubo(3, name), Renyi(-2.0, name)))
        assert ours.value.item() == other.value.item()
        assert torch.equal(flat_gradient(ours, family), flat_gradient(other, family))


@pytest.mark.parametrize("n", [1, 0.5, math.inf, math.nan, True, "two"])
def test_orders_without_an_upper_bound_are_refused(n):
    with pytest.raises(ConfigError, match=r"cubo\(n="):
        Cubo(n)


@pytest.mark.parametrize(("n", "draws", "least"), [(2.0, 8, 3), (1.25, 4, 6), (1.25, 16, 6)])
def test_with_fewer_draws_than_declared_the_posterior_is_no_minimum(n, draws, least, tools):
    # over K draws the loss near the posterior is (n - 1 - n / K) / 2 times the variance of the log ratio
    assert Cubo(n).min_draws == least and Cubo(n).default_draws >= least
    normal = Density(lambda z: -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi), dim=1)
    shift = 0.2  # q = N(shift, 1): the log ratio is normal with variance shift^2
    stack = replicate(tools.gaussian(shift, 1.0), 200_000)
    noise = torch.randn(200_000, draws, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = Cubo(n, "reparameterised").loss(stack, normal, noise).value
    wanted = 0.5 * (n - 1 - n / draws) * shift**2
    assert float(value.mean()) == pytest.approx(wanted, abs=5 * float(value.std()) / 200_000**0.5 + 0.1 * abs(wanted))
    assert (wanted > 0) == (draws >= least)


# --- VR-max ---
NORMAL = Density(lambda z: -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi), dim=1)
MAX_OF_TWO, MIN_OF_TWO = 1 + 2 / math.pi, 1 - 2 / math.pi
"""Means of the larger and the smaller of two squares of standard normal draws."""


@pytest.mark.parametrize(
    ("sd", "slope", "gain"),
    [
        (MIN_OF_TWO**-0.5, 0.0, 0.5 * (MIN_OF_TWO - 1 - math.log(MIN_OF_TWO))),  # the best q: wider than the posterior
        (MAX_OF_TWO**-0.5, 0.0, 0.5 * (MAX_OF_TWO - 1 - math.log(MAX_OF_TWO))),  # a local one: narrower
        (0.97, 1 - 0.97**2 * MAX_OF_TWO, None),
        (1.03, 1 - 1.03**2 * MIN_OF_TWO, None),  # on both sides of the posterior it leads away
    ],
)
def test_largest_of_two_ratios_is_best_away_from_the_posterior(sd, slope, gain, tools):
    gradient, value = tools.replicated_gradient(VrMax(), NORMAL, tools.gaussian(0.0, sd), 2, 200_000)
    (place,) = [
        i for i, (name, _) in enumerate(tools.gaussian(0.0, sd).named_parameters()) if "log" in name or "scale" in name
    ]
    error = gradient[:, place].std() / 200_000**0.5
    # the gradient is that of minus the expectation, in the log of the sd
    assert abs(float(gradient[:, place].mean()) + slope) < 5 * float(error) + 1e-9
    if gain is not None:
        assert float(value.mean()) == pytest.approx(-gain, abs=5 * float(value.detach().std()) / 200_000**0.5)
        assert gain > 0  # above the log evidence, which is zero: no bound


def test_only_the_draw_with_the_largest_ratio_is_differentiated(tools):
    family = tools.gaussian([0.2, -0.3], [0.9, 0.8])
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = family(noise)
    best = int((REGRESSION.model.log_joint(draw.z) - draw.log_q).argmax())
    alone = Elbo("reparameterised").loss(family, REGRESSION.model, noise[best : best + 1])
    ours, upper = (o.loss(family, REGRESSION.model, noise) for o in (VrMax(), Renyi(-math.inf)))
    assert ours.value.item() == pytest.approx(alone.value.item(), rel=1e-12) == -upper.value.item()
    gradient = flat_gradient(ours, family)
    assert torch.allclose(gradient, flat_gradient(alone, family), rtol=1e-12)
    assert torch.allclose(gradient, -flat_gradient(upper, family), rtol=1e-12)
    with pytest.raises(IncompatibleError, match="reparameterised"):
        VrMax().resolve(REGRESSION.model, NarrowFamily(family, frozenset({Capability.LOG_Q, Capability.DRAWS})))


# --- black-box alpha energies ---
Y = torch.tensor([-1.0, 0.4, 1.9, 2.5, 0.2], dtype=torch.float64)


def location():
    return LikelihoodModel((0.5, 1.5), lambda z, y: -0.5 * (y - z) ** 2 - 0.5 * math.log(2 * math.pi), data=Y, dim=1)


def energy_by_quadrature(alpha, form, mean, sd):
    z = mean + sd * torch.linspace(-14, 14, 8001, dtype=torch.float64)
    q, prior = torch.distributions.Normal(mean, sd), torch.distributions.Normal(0.5, 1.5)
    step = math.log(float(z[1] - z[0]))
    log_q, share = q.log_prob(z), (prior.log_prob(z) - q.log_prob(z)) / len(Y)
    likelihood = torch.distributions.Normal(z[:, None], 1.0).log_prob(Y)
    if form == "simplified":
        kl = float(torch.exp(log_q + step) @ (log_q - prior.log_prob(z)))
        return kl - float(torch.logsumexp(log_q[:, None] + alpha * likelihood + step, 0).sum()) / alpha
    return -float(torch.logsumexp(log_q[:, None] + alpha * (likelihood + share[:, None]) + step, 0).sum()) / alpha


@pytest.mark.parametrize("form", ["tied", "simplified"])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_energy_and_its_optimum_by_quadrature(form, alpha, tools):
    best = minimize(
        lambda x: energy_by_quadrature(alpha, form, x[0], math.exp(x[1])),
        (0.7, -0.7),
        method="Nelder-Mead",
        options={"xatol": 1e-6, "fatol": 1e-10},
    )
    objective = BbAlpha(alpha, form, "reparameterised")
    family = Weighted.grid(tools.gaussian(0.3, 0.6), reach=9.0, per_axis=801)
    mean, sd, value = tools.minimum(objective, location(), family, torch.zeros(1), rounds=3)
    assert (mean, sd) == pytest.approx((best.x[0], math.exp(best.x[1])), rel=3e-3)
    assert value == pytest.approx(best.fun, abs=1e-5)


def test_forms_differ_with_few_data_and_posteriors_are_met_at_small_alpha_only():
    found = {}
    for form in ("tied", "simplified"):
        for alpha in (1e-3, 0.8):
            best = minimize(
                lambda x, a=alpha, f=form: energy_by_quadrature(a, f, x[0], math.exp(x[1])),
                (0.7, -0.7),
                method="Nelder-Mead",
            )
            found[form, alpha] = math.exp(best.x[1])
    exact = (len(Y) + 1.5**-2) ** -0.5
    assert found["tied", 1e-3] == pytest.approx(exact, rel=5e-3) == found["simplified", 1e-3]
    assert abs(found["tied", 0.8] / found["simplified", 0.8] - 1) > 0.02
    assert min(found["tied", 0.8], found["simplified", 0.8]) > 1.1 * exact


def test_of_one_datum_the_tied_energy_is_the_renyi_bound_of_the_other_convention(tools):
    model = LikelihoodModel((0.5, 1.5), lambda z, y: -0.5 * (y - z) ** 2, data=Y[:1], dim=1)
    family, noise = tools.gaussian(0.3, 0.6), grid_noise(tools.gaussian(0.3, 0.6).noise_spec, 30)
    for alpha in (0.2, 0.7, 1.0):
        ours = BbAlpha(alpha, estimator="reparameterised").loss(family, model, noise)
        other = Renyi(1 - alpha, "reparameterised").loss(family, model, noise)
        assert ours.value.item() == pytest.approx(other.value.item(), rel=1e-12)
        assert torch.allclose(flat_gradient(ours, family), flat_gradient(other, family), rtol=1e-10)


@pytest.mark.parametrize("form", ["tied", "simplified"])
def test_terms_add_up_and_small_alpha_is_the_elbo(form, tools):
    family = tools.gaussian([0.2, -0.3], [0.5, 0.7])
    noise = torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for alpha in (0.0, 1e-9, 0.4, 1.0):
        loss = BbAlpha(alpha, form, "reparameterised").loss(family, REGRESSION.model, noise)
        assert sum(loss.terms.values()).item() == pytest.approx(loss.value.item(), rel=1e-12)
        if alpha < 0.1:
            elbo = Elbo("reparameterised").loss(family, REGRESSION.model, noise)
            assert loss.value.item() == pytest.approx(elbo.value.item(), rel=1e-8)
            assert torch.allclose(flat_gradient(loss, family), flat_gradient(elbo, family), rtol=1e-6)


def test_simplified_form_is_the_per_datum_objective(tools):
    family = tools.gaussian([0.2, -0.3], [0.5, 0.7])
    noise = torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name in ("entropy", "reparameterised"):
        ours = BbAlpha(0.6, "simplified", name).loss(family, REGRESSION.model, noise)
        other = RenyiPredictive(0.6, estimator=name).loss(family, REGRESSION.model, noise)
        assert ours.value.item() == other.value.item()


def test_energies_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="tied"):
        BbAlpha(form="loose")
    with pytest.raises(ConfigError, match=r"bb_alpha\(alpha="):
        BbAlpha(alpha=-0.5)
    points = registry.build("families", "ensemble").build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
    with pytest.raises(IncompatibleError, match="log density"):
        BbAlpha().resolve(REGRESSION.model, points)
