"""The kernel Stein discrepancy: known optima, both statistics, families without density."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density
from vifamily.objectives import Ksd
from vifamily.testing import targets
from vifamily.testing._narrow import QuadratureFamily
from vifamily.testing._tools import normal_quadrature, seeded
from vifamily.types import LatentSpec


def minimum(objective, model, family, noise):
    """Minimise by L-BFGS; returns mean, sd and value."""
    optimiser = torch.optim.LBFGS(
        list(family.parameters()), max_iter=50, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0
    )

    def closure():
        optimiser.zero_grad()
        loss = objective.loss(family, model, noise)
        loss.surrogate.backward()
        return loss.surrogate.detach()

    for _ in range(4):
        optimiser.step(closure)
    return float(objective.loss(family, model, noise).value)


OPTIMA = {
    "imq, at a mode": ("imq", (2.0, 1.2), (2.99, 1.00, 1e-4)),
    "imq, over both": ("imq", (0.0, 3.0), (0.0, 3.29, 0.1793)),
    "rbf, at a mode": ("rbf", (2.0, 1.2), (3.00, 1.00, 1e-4)),
    "rbf, over both": ("rbf", (0.0, 3.0), (0.0, 3.58, 0.267)),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_optima_on_two_normals(name, tools):
    """By quadrature with weights; the reference is a table made with other code."""
    kernel, start, (mean, sd, value) = OPTIMA[name]
    inner = tools.gaussian(*start)
    noise, weights = normal_quadrature(1, spacing=0.06, radius=8)
    family = QuadratureFamily(inner, weights)
    found = minimum(Ksd(kernel, 1.0).on_quadrature(), targets.two_normals().model, family, noise)
    at, covariance = (part.detach() for part in inner.moments())
    assert abs(abs(float(at)) - mean) < 0.02
    assert abs(float(covariance) ** 0.5 - sd) < 0.02
    assert found == pytest.approx(value, abs=2e-3)


def test_stochastic_fit_ends_near_the_wide_optimum():
    """Fresh draws and the unbiased statistic, within 0.1 of the table."""
    posterior = vf.fit(targets.two_normals().model, "mean_field", "ksd(bandwidth=1.0)", "adam", seed=0, draws=128,
                       init=torch.zeros(1, dtype=torch.float64), steps=1500)  # fmt: skip
    sd = float(posterior.family.moments()[1]) ** 0.5
    assert abs(sd - 3.29) < 0.1 and abs(float(posterior.family.moments()[0])) < 0.1


def linear_case():
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.5]], dtype=torch.float64)
    model = Density(lambda z: -0.5 * ((z @ precision) * z).sum(-1), dim=2)
    inner = registry.build("families", "mean_field").build(LatentSpec(2), generator=seeded(0))
    noise, weights = normal_quadrature(2)
    variance = precision.diagonal() / (precision @ precision).diagonal()
    least = float((torch.eye(2) - precision @ torch.diag(variance)).square().sum())
    return model, inner, QuadratureFamily(inner, weights), noise, variance, least


def test_mean_field_on_a_correlated_normal_lands_on_its_closed_form():
    """With k(x, y) = x.y + 1 on N(0, S), at mean 0: |I - S^-1 V|^2, least at v_i = L_ii / (L^2)_ii, L = S^-1."""
    model, inner, family, noise, variance, least = linear_case()
    inner.start_at(torch.zeros(2).double(), torch.tensor([1.0, 0.7]).double())
    value = minimum(Ksd("linear", 1.0, "v"), model, family, noise)
    torch.testing.assert_close(inner.moments()[1].detach().diagonal(), variance, rtol=5e-3, atol=0)
    assert value == pytest.approx(least, rel=1e-3)


def test_a_linear_kernel_may_move_the_mean_of_a_family_that_is_too_simple():
    """What the docstring says: second moments without correlation are mended by a mean that is off."""
    model, inner, family, noise, _, least = linear_case()
    inner.start_at(torch.tensor([0.5, -0.2]).double(), torch.tensor([1.0, 0.7]).double())
    assert minimum(Ksd("linear", 1.0, "v"), model, family, noise) < 0.95 * least
    assert inner.moments()[0].abs().min() > 0.2


def values(objective, tools, sd, draws, copies=4000):
    family, model = tools.gaussian(0.0, sd), Density(lambda z: -0.5 * z.square().sum(-1), dim=1)
    return tools.replicated_gradient(objective.resolve(model, family), model, family, draws, copies)


@pytest.mark.parametrize("draws", [2, 8])
def test_the_unbiased_statistic_is_unbiased(draws, tools):
    """Against quadrature where q is not the posterior, in value and gradient; zero where it is."""
    objective = Ksd("imq", 1.0, "u")
    for sd in (1.0, 1.6):
        family, model = tools.gaussian(0.0, sd), Density(lambda z: -0.5 * z.square().sum(-1), dim=1)
        noise, weights = normal_quadrature(1, spacing=0.05, radius=9)
        exact = objective.on_quadrature().loss(QuadratureFamily(family, weights), model, noise)
        wanted = torch.autograd.grad(exact.surrogate, list(family.parameters()))
        gradient, value = values(objective, tools, sd, draws)
        error = value.std() / value.shape[0] ** 0.5
        assert abs(float(value.mean() - exact.value)) < 5 * float(error)
        error = gradient.std(0) / gradient.shape[0] ** 0.5
        flat = torch.cat([part.reshape(-1) for part in wanted])
        assert bool(((gradient.mean(0) - flat).abs() < 5 * error + 1e-9).all())


def test_the_other_statistic_is_positive_and_exceeds_by_its_diagonal(tools):
    _, u = values(Ksd("imq", 1.0, "u"), tools, 1.0, 8)
    _, v = values(Ksd("imq", 1.0, "v"), tools, 1.0, 8)
    assert bool((v > 0).all()) and bool((u < 0).any())
    # at q = p the mean of the diagonal is E[s^2] + 1 = 2, an eighth of it
    assert float(v.mean()) == pytest.approx(2 / 8, abs=5 * float(v.std()) / 4000**0.5)


def test_statistics_follow_the_weights_of_draws():
    model = targets.two_normals().model
    ensemble = registry.build("families", "ensemble(size=3)").build(LatentSpec(1), generator=seeded(0))
    gaussian = registry.build("families", "mean_field").build(LatentSpec(1), generator=seeded(0))
    assert Ksd().resolve(model, ensemble).statistic == "v"
    assert Ksd().resolve(model, gaussian).statistic == "u"
    with torch.no_grad():
        ensemble.logits.copy_(torch.tensor([3.0, 0.0, -50.0]))
        ensemble.points.copy_(torch.tensor([[1.0], [-2.0], [100.0]]))
    got = float(Ksd("imq", 1.0).loss(ensemble, model, torch.zeros(1, 0)).value)
    with torch.no_grad():
        ensemble.points[2] = -7.0  # of no weight
    assert got == pytest.approx(float(Ksd("imq", 1.0).loss(ensemble, model, torch.zeros(1, 0)).value), rel=1e-9)


def test_members_descend_on_fixed_draws():
    """KSD descent: deterministic, restarts agree, members approach a normal law."""
    model = Density(lambda z: -0.5 * z.square().sum(-1), dim=2)
    posterior = vf.fit(model, "ensemble(size=20)", "ksd(bandwidth=1.0, statistic=v)", "lbfgs", seed=0, restarts=2)
    assert posterior.record.stop_reason == "converged"
    first, second = posterior.record.restart_losses
    assert 0 < first < 0.02 and second == pytest.approx(first, abs=1e-4)
    mean, covariance = posterior.family.moments()
    assert mean.abs().max() < 0.05 and (covariance.diagonal() - 1).abs().max() < 0.2


def test_members_on_a_line_of_symmetry_stay_there():
    """The saddle that the docstring warns of: no member leaves the valley between two modes."""
    modes = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    model = Density(lambda z: torch.logsumexp(-0.5 * (z.unsqueeze(-2) - modes).square().sum(-1), -1), dim=2)
    family = registry.build("families", "ensemble(size=5)").build(LatentSpec(2), generator=seeded(0))
    with torch.no_grad():
        family.points[:, 0] = 0.0
    minimum(Ksd("rbf", 1.0, "v"), model, family, torch.zeros(1, 0))
    assert family.points[:, 0].abs().max() < 1e-8
    assert family.points[:, 1].abs().max() > 0.1


def test_a_family_without_density_is_fitted():
    """Implicit families are allowed, and their diagnosis has a Stein test in place of k-hat."""
    model = Density(lambda z: -0.5 * (z - 1.0).square().sum(-1) / 0.25, dim=1)
    posterior = vf.fit(model, "implicit", "ksd", seed=0, steps=600)
    draws = posterior.draws(4000)
    assert abs(float(draws.mean()) - 1.0) < 0.1 and abs(float(draws.std()) - 0.5) < 0.1
    found = posterior.diagnose()
    assert found.k_hat is None and "implicit" in found.k_hat_note and found.stein is not None


def test_mode_weights_hardly_count():
    """The numbers of the docstring: 1e-4 against a standard deviation of 6e-4 from 1500 draws."""
    from vifamily.numerics.kernels import named_kernel, stein_kernel

    x = torch.linspace(-10, 10, 1001, dtype=torch.float64)
    score = -x + 3 * torch.tanh(3 * x)
    stein = stein_kernel(named_kernel("imq"), x[:, None], score[:, None])

    def law(w):
        both = torch.stack([math.log(w) - 0.5 * (x + 3) ** 2, math.log(1 - w) - 0.5 * (x - 3) ** 2])
        return both.logsumexp(0).softmax(0)

    assert float(law(0.95) @ stein @ law(0.95)) == pytest.approx(1.1e-4, rel=0.05)
    spread = math.sqrt(2 * float(law(0.5) @ stein.square() @ law(0.5))) / 1500
    assert spread == pytest.approx(6.3e-4, rel=0.05)


@pytest.mark.parametrize(
    "options", [{"kernel": "gauss"}, {"bandwidth": 0.0}, {"bandwidth": "mean"}, {"bandwidth": True}, {"statistic": "w"}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError):
        Ksd(**options)


def test_refusals():
    model = targets.two_normals().model
    with pytest.raises(IncompatibleError, match="unequal weights"):
        vf.plan(model, "ensemble", "ksd(statistic=u)")
    for spec in ("ksd", "ksd(bandwidth=1.0)", "ksd(statistic=v)"):
        with pytest.raises(IncompatibleError, match="on fixed draws"):
            vf.plan(model, "mean_field", spec, "lbfgs")
    with pytest.raises(ConfigError, match="at least 2 draws"):
        vf.plan(model, "mean_field", "ksd", draws=1)
    with pytest.raises(IncompatibleError, match="not a sum over data"):
        vf.plan(targets.linear_regression().model, "full_rank", "ksd", batch_size=4)
    assert vf.plan(model, "mean_field", "ksd").solver.__class__.__name__ == "Adam"


def test_the_model_is_frozen():
    model = Density(lambda z: -0.5 * z.square().sum(-1), dim=1)
    model.free = torch.nn.Parameter(torch.zeros(()).double())
    assert any("stay as they are" in note for note in vf.plan(model, "mean_field", "ksd").notes)
