"""Stability of collapsed ensembles: three routes to one answer, and the closed forms."""

import math

import matplotlib
import pytest
import torch
from scipy import integrate, optimize

import vifamily as vf
from vifamily import registry
from vifamily.diagnostics import Labelled, stability, unit_stability
from vifamily.errors import ConfigError, NotAvailableError, ShapeError
from vifamily.types import Batch, LatentSpec

EXACT = 1e-10
F64 = torch.float64
# six equally likely points with the first five moments of a standard normal
NORMAL_POINTS = torch.tensor([-math.sqrt(3), 0, 0, 0, 0, math.sqrt(3)], dtype=F64)


def factorial(*axes):
    return [part.reshape(-1) for part in torch.meshgrid(*axes, indexing="ij")]


def location(y, sd=1.0):
    """Independent unit-variance normal data about an unknown mean, ``y`` of (datum, dim)."""

    def log_likelihood(theta, y):
        return -0.5 * ((y - theta[:, None]) / sd).square().sum(-1)

    return vf.models.LikelihoodModel((0.0, 100.0), log_likelihood, data=y, dim=y.shape[1])


def contradictory(k):
    """Regression through the origin on two groups with slopes k and -k, with exact moments."""
    x, e, sign = factorial(NORMAL_POINTS, NORMAL_POINTS, torch.tensor([-1.0, 1.0], dtype=F64))

    def log_likelihood(theta, data):
        x, y = data
        return -0.5 * (y - theta * x).square() - 0.5 * math.log(2 * math.pi)

    return vf.models.LikelihoodModel((0.0, 100.0), log_likelihood, data=(x, sign * k * x + e), dim=1)


def logistic(x, y):
    """Logistic regression, labels 0 and 1."""

    def log_likelihood(theta, data):
        x, y = data
        return torch.nn.functional.logsigmoid((2 * y - 1) * (theta @ x.T))

    def simulate(theta, generator):
        p = torch.sigmoid(theta @ x.T)
        return torch.bernoulli(p, generator=generator)

    return vf.models.LikelihoodModel((0.0, 100.0), log_likelihood, data=(x, y), dim=x.shape[1], simulate=simulate)


def noisy_labels(generator, n, dim, noise):
    x = torch.randn(n, dim, generator=generator, dtype=F64)
    y = torch.bernoulli(torch.sigmoid(3 * x[:, 0]), generator=generator)
    flipped = torch.rand(n, generator=generator, dtype=F64) < noise
    return x, torch.where(flipped, 1 - y, y)


def top(model, start=0.0):
    """Maximum of the mean log likelihood, by Newton's method."""
    z = torch.full((model.dim,), start, dtype=F64)

    def mean(point):
        return model.log_likelihood(point[None])[0].mean()

    for _ in range(50):
        slope = torch.autograd.functional.jacobian(mean, z)
        z = z - torch.linalg.solve(torch.autograd.functional.hessian(mean, z), slope)
        if float(slope.norm()) < 1e-13:
            break
    return z


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.5, 1.0, 2.0, 4.0])
def test_location_has_the_variance_as_its_threshold(variance):
    model = location(math.sqrt(variance) * NORMAL_POINTS[:, None])
    found = stability(model, torch.zeros(1, dtype=F64), alpha=0.3)
    assert found.alpha_star == pytest.approx(1 / variance, rel=EXACT)
    assert found.smallest == pytest.approx(1 - 0.3 * variance, rel=EXACT)
    assert found.stable == (0.3 * variance < 1)
    assert found.drift == pytest.approx(0, abs=EXACT)


def test_two_dimensional_location_opens_along_the_larger_variance():
    angle = torch.tensor(0.6, dtype=F64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    a, b = factorial(2 * NORMAL_POINTS, math.sqrt(1.5) * NORMAL_POINTS)
    found = stability(location(torch.stack([a, b], -1) @ turn.T), torch.zeros(2, dtype=F64), alpha=0.7)
    assert found.alpha_star == pytest.approx(0.25, rel=EXACT)
    assert abs(float(found.direction @ turn[:, 0])) == pytest.approx(1, rel=EXACT)
    # across it the other threshold: with the first direction out of the way, 1/1.5
    other = location((b[:, None] * turn[:, 1]) @ turn[:, 1:])
    assert stability(other, torch.zeros(1, dtype=F64)).alpha_star == pytest.approx(1 / 1.5, rel=EXACT)


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0, 4.0])
def test_contradictory_groups(k):
    found = stability(contradictory(k), torch.zeros(1, dtype=F64))
    assert found.alpha_star == pytest.approx(1 / (1 + 3 * k**2), rel=EXACT)
    # units without an input pull nowhere, the others x y each way, and mirrored groups mirror each other
    torch.testing.assert_close(found.pull.sort().values, -found.pull.sort(descending=True).values, rtol=0, atol=EXACT)


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16])
def test_sequences_with_a_shared_sign(length, generator):
    """Units of T tokens that share a sign; the model knows tokens only. Mirrored data put the optimum at zero."""
    n, q = 4000, 1 / (1 + math.exp(-3))
    sign = torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    agree = torch.where(torch.rand(n, length, generator=generator) < q, 1.0, -1.0)
    y = torch.cat([sign * agree, -sign * agree]).double()

    def log_likelihood(theta, y):
        return torch.nn.functional.logsigmoid(theta * y)

    model = vf.models.LikelihoodModel((0.0, 10.0), log_likelihood, data=y.reshape(-1), dim=1)
    units = torch.arange(2 * n).repeat_interleave(length)
    found = stability(model, torch.zeros(1, dtype=F64), units=units)
    products = y.sum(1).square()
    rho = float((products.mean() - length) / (length * (length - 1))) if length > 1 else 0.0
    assert found.alpha_star == pytest.approx(1 / (1 + (length - 1) * rho), rel=EXACT)
    assert found.num_units == 2 * n and found.drift == pytest.approx(0, abs=EXACT)
    error = float(products.std()) / math.sqrt(n) / length  # of J / V, from n independent mirrored pairs
    population = 1 + (length - 1) * (2 * q - 1) ** 2
    assert abs(1 / found.alpha_star - population) <= 5 * error + EXACT


def population_threshold(noise):
    """Critical alpha of logistic regression on normal inputs with slope 3 and flipped labels, by quadrature."""

    def mean(function):
        weight = lambda x: math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)  # noqa: E731
        return integrate.quad(lambda x: function(x) * weight(x), -8, 8, epsabs=1e-12)[0]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def truth(x):
        return (1 - noise) * sigmoid(3 * x) + noise * (1 - sigmoid(3 * x))

    slope = optimize.brentq(lambda t: mean(lambda x: x * (truth(x) - sigmoid(t * x))), -0.5, 4, xtol=1e-12)
    v = mean(lambda x: x**2 * sigmoid(slope * x) * (1 - sigmoid(slope * x)))
    j = mean(lambda x: x**2 * (truth(x) * (1 - sigmoid(slope * x)) ** 2 + (1 - truth(x)) * sigmoid(slope * x) ** 2))
    return v / j


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1.0), (0.05, 0.757), (0.125, 0.755), (0.25, 0.866), (0.5, 1.0)])
def test_logistic_regression_with_flipped_labels(noise, expected, generator):
    """Noise of the labels as such (0.5) makes no specialists; noise that a straight logit cannot express does."""
    exact = population_threshold(noise)
    assert exact == pytest.approx(expected, abs=0.02)
    each = torch.tensor(
        [
            stability(m, top(m)).alpha_star
            for m in (logistic(*noisy_labels(generator, 20_000, 1, noise)) for _ in range(6))
        ]
    )
    assert abs(float(each.mean()) - exact) <= 5 * float(each.std()) / math.sqrt(6)


def test_saturated_models_have_threshold_one(generator):
    x = torch.where(torch.rand(400, 1, generator=generator) < 0.5, -1.0, 1.0).double()
    y = torch.bernoulli(torch.sigmoid(x[:, 0]), generator=generator)
    model = logistic(x, y)
    # one free logit through the origin: x y is a Bernoulli with a probability of its own
    assert stability(model, top(model)).alpha_star == pytest.approx(1, rel=1e-8)


# -- three routes ------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A small network whose parameters outnumber its data, as in adapters."""

    def __init__(self, generator, hidden=12):
        super().__init__()
        for name, shape in {"a": (hidden, 3), "b": (hidden,), "c": (2, hidden)}.items():
            value = torch.randn(shape, generator=generator, dtype=F64) / math.sqrt(shape[-1])
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, x):
        return torch.tanh(x @ self.a.T + self.b) @ self.c.T


@pytest.fixture
def network(generator):
    net = Net(generator)
    x = torch.randn(20, 3, generator=generator, dtype=F64)
    y = torch.randint(2, (20,), generator=generator)
    halves = [slice(0, 8), slice(8, 20)]

    def log_p(part, labels=None):
        labels = y if labels is None else labels
        return lambda: net(x[part]).log_softmax(-1).gather(1, labels[part, None]).squeeze(1)

    return {
        "net": net,
        "log_likelihood": [log_p(h) for h in halves],
        "outputs": [lambda h=h: net(x[h]) for h in halves],
        "of": [lambda o, h=h: o.log_softmax(-1).gather(1, y[h, None]).squeeze(1) for h in halves],
        "labelled": [
            Labelled([log_p(h, torch.full((20,), k)) for h in halves], net(x).softmax(-1).detach()[:, k])
            for k in range(2)
        ],
        "units": torch.arange(20) // 2,
    }


ROUTES = ("dense", "matrix_free", "gram")


@pytest.mark.parametrize("units", ["datum", "pairs"])
@pytest.mark.parametrize("curvature", ["fisher", "gauss_newton"])
def test_routes_agree(network, curvature, units):
    options = {
        "units": network["units"] if units == "pairs" else None,
        "curvature": curvature,
        "labelled": network["labelled"],
        "outputs": network["outputs"],
        "log_likelihood_of": network["of"],
        # of Gauss-Newton products alone the trace is estimated, so that relative damping would differ between routes
        "damping": 1e-2 if curvature == "fisher" else 0.0,
        "prior_precision": 1e-3,
        "sweep": (1e-4, 1e-2) if curvature == "fisher" else (),
        "tolerance": 1e-9,
    }
    found = {
        r: unit_stability(network["log_likelihood"], list(network["net"].parameters()), 0.4, route=r, **options)
        for r in ROUTES
    }
    first = found["dense"]
    assert len(first.direction) == 72 > first.num_units
    assert first.smallest < 0 < first.alpha_star < 0.4
    for other in (found["matrix_free"], found["gram"]):
        assert other.alpha_star == pytest.approx(first.alpha_star, rel=EXACT)
        assert other.smallest == pytest.approx(first.smallest, rel=EXACT)
        assert abs(float(other.direction @ first.direction)) == pytest.approx(1, rel=EXACT)
        assert abs(float(other.smallest_direction @ first.smallest_direction)) == pytest.approx(1, rel=EXACT)
        assert dict(other.sweep) == pytest.approx(dict(first.sweep), rel=1e-8)
        assert other.spread.gain == pytest.approx(first.spread.gain, rel=1e-6)
        assert other.spread.separation == pytest.approx(first.spread.separation, rel=1e-3)


def test_hessian_routes_agree_at_a_minimum(generator):
    x, y = noisy_labels(generator, 300, 8, 0.1)
    model = logistic(x, y)
    z = top(model)
    dense, free = (stability(model, z, 0.5, route=r, tolerance=1e-9, damping=0.0) for r in ("dense", "matrix_free"))
    assert free.alpha_star == pytest.approx(dense.alpha_star, rel=EXACT)
    assert free.smallest == pytest.approx(dense.smallest, rel=EXACT)
    assert abs(float(free.direction @ dense.direction)) == pytest.approx(1, rel=EXACT)


def test_definitions_by_brute_force(generator):
    """The smallest alpha at which V - alpha J is singular, with both matrices by automatic differentiation."""
    x, y = noisy_labels(generator, 60, 3, 0.2)
    model = logistic(x, y)
    z = top(model)
    units = torch.arange(60) // 3

    def summed(point):
        return torch.zeros(20, dtype=F64).index_add(0, units, model.log_likelihood(point[None])[0])

    scores = torch.autograd.functional.jacobian(summed, z)
    v = -torch.autograd.functional.hessian(lambda p: summed(p).mean(), z)
    j = scores.T @ scores / 20
    found = stability(model, z, 0.3, units=units)
    values = torch.linalg.eigvals(torch.linalg.solve(v, j)).real
    assert found.alpha_star == pytest.approx(1 / float(values.max()), rel=EXACT)
    assert found.smallest == pytest.approx(float(torch.linalg.eigvalsh(v - 0.3 * j)[0]), rel=EXACT)
    torch.testing.assert_close(found.pull, scores @ found.direction, rtol=EXACT, atol=EXACT)
    expected = torch.linalg.inv(v - 0.3 * j) / 20
    if found.stable:
        torch.testing.assert_close(found.spread.covariance, expected, rtol=1e-9, atol=0)


def test_exact_fisher_of_logistic_regression_is_its_hessian(generator):
    model = logistic(*noisy_labels(generator, 200, 3, 0.1))
    z = top(model)
    hessian = stability(model, z)
    fisher = stability(model, z, curvature="fisher", label_values=[0, 1], damping=0.0)
    newton = stability(
        model, z, curvature="gauss_newton", damping=0.0,
        outputs=lambda theta, data: (theta @ data[0].T).unsqueeze(-1),
        log_likelihood_of=lambda out, data: torch.nn.functional.logsigmoid((2 * data[1] - 1) * out[:, 0]),
    )  # fmt: skip
    assert fisher.alpha_star == pytest.approx(hessian.alpha_star, rel=EXACT)
    assert newton.alpha_star == pytest.approx(hessian.alpha_star, rel=EXACT)


def test_drawn_labels_come_near_the_exact_fisher(generator):
    model = logistic(*noisy_labels(generator, 400, 2, 0.1))
    z = top(model)
    exact = stability(model, z, curvature="fisher", label_values=[0, 1], damping=0.0).alpha_star
    drawn = torch.tensor(
        [
            stability(
                model, z, curvature="fisher", num_label_draws=32, generator=generator, damping=0.0, sweep=()
            ).alpha_star
            for _ in range(8)
        ]
    )
    # the largest eigenvalue of a noisy inverse is biased at order one over the number of labels
    assert abs(float(drawn.mean()) - exact) <= 5 * float(drawn.std()) / math.sqrt(8) + exact * 10 / (32 * 400)
    again = [
        stability(
            model, z, curvature="fisher", num_label_draws=2, generator=torch.Generator().manual_seed(1)
        ).alpha_star
        for _ in range(2)
    ]
    assert again[0] == again[1]


# -- predictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.45])
def test_gaussian_spread_below_the_threshold(alpha):
    """A normal q on normal data has a closed-form loss; its variance with weight 1/n on the divergence to the prior."""
    variance, n, prior = 2.0, 10_000, 0.01
    y = torch.tensor([-math.sqrt(variance), math.sqrt(variance)], dtype=F64).repeat(n // 2)
    found = stability(location(y[:, None]), torch.zeros(1, dtype=F64), alpha, prior_precision="model", search=False)
    predicted = float(found.spread.covariance)
    expected = 1 / (n * (1 - alpha * variance) + 1e-4)  # (V - alpha J + 1 / (n 100^2))^-1 / n
    assert predicted == pytest.approx(expected, rel=EXACT)
    assert found.spread.sd == pytest.approx(math.sqrt(expected), rel=EXACT)

    def loss(log_s2):
        s2 = math.exp(log_s2)
        a = max(alpha, 1e-9)
        fit = 0.5 * math.log1p(a * s2) / a + 0.5 * variance / (1 + a * s2)
        return fit + (0.5 * s2 * prior**2 - 0.5 * log_s2) / n

    exact = math.exp(optimize.minimize_scalar(loss, bounds=(-15, 3), method="bounded", options={"xatol": 1e-10}).x)
    assert predicted == pytest.approx(exact, rel=0.01)


def test_best_pair_finds_the_two_groups():
    k = 2.0
    found = stability(contradictory(k), torch.zeros(1, dtype=F64), 0.8)
    assert found.spread.sd == math.inf and found.spread.covariance is None
    assert found.spread.separation == pytest.approx(k, rel=0.05)
    assert found.spread.gain > 0.5
    below = stability(contradictory(k), torch.zeros(1, dtype=F64), 0.9 * found.alpha_star)
    assert below.spread.separation == 0 and below.spread.gain == 0


def test_a_far_pair_is_noticed_where_the_point_is_stable():
    """Cauchy errors, a few data at the point and two far clusters: locally stable, and two members far apart better."""
    y = torch.tensor([0.0] * 2 + [-6.0] * 9 + [6.0] * 9, dtype=F64)
    model = vf.models.LikelihoodModel((0.0, 100.0), lambda t, y: -torch.log1p((y - t).square()), data=y, dim=1)
    found = stability(model, torch.zeros(1, dtype=F64), 1.0)
    j, v = 0.9 * 4 * 36 / 37**2, 0.1 * 2 + 0.9 * 2 * (1 - 36) / 37**2
    assert found.alpha_star == pytest.approx(v / j, rel=EXACT) and found.stable
    # at +-6 the far data gain log 37 less log 2 or so, and those at zero lose log 37
    assert found.spread.separation == pytest.approx(6, rel=0.02)
    assert found.spread.gain == pytest.approx(0.9 * (math.log(37) - math.log(2)) - 0.1 * math.log(37), rel=0.02)
    assert any("far apart does better" in note for note in found.notes)


# -- honesty -----------------------------------------------------------------------------------------------------------


def test_away_from_the_minimum_it_says_so():
    found = stability(location(NORMAL_POINTS[:, None]), torch.tensor([2.0], dtype=F64))
    assert found.drift == pytest.approx(4 / 5, rel=EXACT) and found.alpha_star == pytest.approx(1 / 5, rel=EXACT)
    assert any("not a minimum" in note for note in found.notes)


@pytest.mark.parametrize("route", ["dense", "matrix_free"])
def test_a_saddle_has_threshold_zero(route):
    x = torch.tensor([1.0, 2.0], dtype=F64)

    def double_well():
        return -((theta[0] ** 2 - 1) ** 2 * x) - theta[1] ** 2 + 0.1 * x * theta.sum()

    theta = torch.zeros(2, dtype=F64, requires_grad=True)
    found = unit_stability(double_well, theta, route=route, damping=0.0, search=False)
    assert found.alpha_star == 0 and any("not positive definite" in note for note in found.notes)
    assert abs(float(found.direction[0])) > 0.9


def test_gauge_freedom_needs_damping_and_the_sweep_shows_it(generator):
    """A product of two factors: one direction changes nothing, so V is singular along it."""
    x = torch.randn(50, generator=generator, dtype=F64)
    y = 2 * x + torch.randn(50, generator=generator, dtype=F64)
    theta = torch.tensor([2.0, 1.0], dtype=F64)
    best = float((x * y).sum() / x.square().sum())
    theta[1] = best / 2
    theta.requires_grad_()
    found = unit_stability(lambda: -0.5 * (y - theta[0] * theta[1] * x) ** 2, theta, sweep=(1e-6, 1e-3))
    residual = y - best * x
    exact = float(x.square().mean() / (x * residual).square().mean())
    assert found.damping == 1e-3  # chosen, since V is singular
    assert dict(found.sweep)[1e-6] == pytest.approx(exact, rel=1e-5)
    assert found.alpha_star == pytest.approx(exact, rel=5e-3)


def test_parameters_are_put_back_exactly(network):
    before = [p.detach().clone() for p in network["net"].parameters()]
    unit_stability(network["log_likelihood"], list(network["net"].parameters()), 0.5, damping=0.1)
    assert all(torch.equal(b, p) for b, p in zip(before, network["net"].parameters(), strict=True))
    assert all(p.grad is None for p in network["net"].parameters())


def test_single_precision_networks_are_analysed_in_double():
    theta = torch.ones(1, requires_grad=True)
    y = torch.tensor([-2.0, 0.0, 2.0, 4.0])
    found = unit_stability(lambda: -0.5 * (y - theta) ** 2, [theta])
    assert found.direction.dtype == F64 and found.alpha_star == pytest.approx(0.2, rel=1e-6)


def test_held_out_data_and_the_posterior_method():
    y = 2 * NORMAL_POINTS[:, None]
    model = location(y)
    other = stability(model, torch.zeros(1, dtype=F64), batch=Batch(y / 2, len(y)))
    assert other.alpha_star == pytest.approx(1, rel=EXACT)
    posterior = vf.fit(model, solver="laplace", seed=0)
    assert posterior.stability().alpha_star == pytest.approx(0.25, rel=1e-6)
    assert posterior.stability(0.5, point=torch.zeros(1, dtype=F64)).stable is False


def test_single_precision_products_stop_at_their_rounding(generator):
    x = torch.randn(40, 30, generator=generator)
    y = torch.randn(40, generator=generator)
    theta = torch.zeros(30, requires_grad=True)

    def log_likelihood():
        return -0.5 * (y - x @ theta).square() - 0.05 * theta.square().sum()

    dense, free = (
        unit_stability(log_likelihood, theta, 0.1, route=r, damping=0.0, search=False, sweep=())
        for r in ("dense", "matrix_free")
    )
    assert free.alpha_star == pytest.approx(dense.alpha_star, rel=1e-3) and free.residual < 1e-4


def test_units_of_the_model_are_its_groups(generator):
    x, y = noisy_labels(generator, 60, 2, 0.2)
    ids = torch.arange(60) % 20
    plain = logistic(x, y)
    grouped = vf.models.LikelihoodModel(
        (0.0, 100.0), plain.likelihood_function, data=(x, y), dim=2, groups=[f"g{i:02d}" for i in ids.tolist()]
    )
    z = top(plain)
    found = stability(grouped, z, units="group")
    assert found.num_units == 20
    assert found.alpha_star == pytest.approx(stability(plain, z, units=ids).alpha_star, rel=EXACT)
    assert found.alpha_star != pytest.approx(stability(grouped, z).alpha_star, rel=1e-3)
    with pytest.raises(NotAvailableError, match="no groups"):
        stability(plain, z, units="group")


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_hessian_of_the_loss_at_collapsed_members(alpha, generator):
    """Eigenvalues of V / M once, those of (V - alpha J) / M for each of M - 1 contrasts, per unit."""
    size, n = 5, 80
    model = logistic(*noisy_labels(generator, n, 2, 0.2))
    z = top(model)
    found = stability(model, z, alpha)
    family = registry.build("families", f"ensemble(size={size})").build(
        LatentSpec(2), generator=torch.Generator().manual_seed(0)
    )
    objective = registry.build("objectives", f"renyi_predictive(alpha={alpha})").resolve(model, family)
    logits, noise = family.logits.detach(), torch.zeros(1, 0, dtype=F64)

    def loss(points):
        parts = {"points": points.reshape(size, 2), "logits": logits}
        return objective.loss(Called(family, parts), model, noise).surrogate / n

    hessian = torch.autograd.functional.hessian(loss, z.repeat(size))
    scores = torch.autograd.functional.jacobian(lambda p: model.log_likelihood(p[None])[0], z)
    v = -torch.autograd.functional.hessian(lambda p: model.log_likelihood(p[None])[0].mean(), z)
    both = torch.linalg.eigvalsh(v), torch.linalg.eigvalsh(v - alpha * scores.T @ scores / n)
    expected = torch.cat([both[0], both[1].repeat(size - 1)]).sort().values / size
    prior = 1 / 100.0**2 / n / size  # the cross term of the prior
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian), expected + prior, rtol=1e-9, atol=1e-11)
    assert found.smallest == pytest.approx(float(both[1][0]), rel=1e-9, abs=1e-11)


class Called:
    """A family with other parameters, differentiable in them."""

    def __init__(self, family, parameters):
        self.family, self.parameters, self.capabilities = family, parameters, family.capabilities

    def __call__(self, noise, context=None):
        return torch.func.functional_call(self.family, self.parameters, (noise,))


def test_the_report_prints_and_draws():
    found = stability(contradictory(2.0), torch.zeros(1, dtype=F64), 0.8, sweep=(1e-3, 1e-2))
    text = str(found)
    for words in ("critical alpha", "0.07692", "unstable: members move apart", "1e-03: 0.07", "nats a unit"):
        assert words in text
    assert found.to_dict()["spread"]["covariance"] is None and found.to_dict()["spread"]["sd"] == "inf"
    figure = found.plot(title="two groups")
    assert isinstance(figure, matplotlib.figure.Figure) and len(figure.axes) == 2


WRONG = {
    "point": (lambda m: stability(m, torch.zeros(2, dtype=F64)), ShapeError, "must have shape"),
    "alpha": (lambda m: stability(m, torch.zeros(1, dtype=F64), -1.0), ConfigError, "zero or above"),
    "curvature": (lambda m: stability(m, torch.zeros(1, dtype=F64), curvature="x"), ConfigError, "gauss_newton"),
    "route": (lambda m: stability(m, torch.zeros(1, dtype=F64), route="x"), ConfigError, "matrix_free"),
    "gaps": (lambda m: stability(m, torch.zeros(1, dtype=F64), units=[0, 2] * 3), ConfigError, "without gaps"),
    "length": (lambda m: stability(m, torch.zeros(1, dtype=F64), units=[0, 1]), ShapeError, "each of 6 data"),
    "gram": (lambda m: stability(m, torch.zeros(1, dtype=F64), route="gram"), NotAvailableError, "with a factor"),
    "generator": (lambda m: stability(m, torch.zeros(1, dtype=F64), curvature="fisher"), ConfigError, "generator="),
    "split": (
        lambda m: stability(m, torch.zeros(1, dtype=F64), curvature="gauss_newton"), ConfigError, "outputs="
    ),
    "values": (
        lambda m: stability(m, torch.zeros(1, dtype=F64), curvature="fisher", label_values=[0]),
        NotAvailableError, "one label per datum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments_are_named(name):
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        call(location(NORMAL_POINTS[:, None]))


def test_incomplete_label_values_are_refused(generator):
    model = logistic(*noisy_labels(generator, 10, 1, 0.1))
    with pytest.raises(ConfigError, match="sum to one"):
        stability(model, torch.zeros(1, dtype=F64), curvature="fisher", label_values=[0])


def test_a_model_without_a_likelihood_per_datum_is_refused():
    model = vf.models.Density(lambda z: -(z**2).sum(-1), dim=1)
    with pytest.raises(NotAvailableError, match="unit_stability"):
        stability(model, torch.zeros(1, dtype=F64))
