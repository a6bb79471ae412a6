"""Importance-weighted and Rényi bounds: limits, weights of the path gradient, order in K, extremes."""

import math

import pytest
import torch

from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, SpecError
from vifamily.objectives import Elbo, Iwae, Renyi
from vifamily.objectives._power import power_bound
from vifamily.testing import targets
from vifamily.types import Capability, LatentSpec

REGRESSION = targets.linear_regression()
U = torch.full((4,), 0.25, dtype=torch.float64).log()
W = torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64)


# --- the bound as a function of log ratios ---
@pytest.mark.parametrize(
    ("alpha", "value"),
    [
        (0.0, math.log(sum(math.exp(w) for w in W.tolist()) / 4)),
        (0.5, 2 * math.log(sum(math.exp(0.5 * w) for w in W.tolist()) / 4)),
        (2.0, -math.log(sum(math.exp(-w) for w in W.tolist()) / 4)),
        (-1.0, 0.5 * math.log(sum(math.exp(2 * w) for w in W.tolist()) / 4)),
        (1.0, 1.625),
        (-math.inf, 3.0),
        (math.inf, 0.5),
    ],
)
def test_bound_is_the_power_mean_of_the_ratios(alpha, value):
    assert float(power_bound(W, U, alpha)) == pytest.approx(value, abs=1e-12)


def test_bound_falls_with_the_order():
    orders = [-math.inf, -100.0, -2.0, 0.0, 0.5, 1 - 1e-7, 1.0, 1 + 1e-7, 2.0, 100.0, math.inf]
    values = [float(power_bound(W, U, alpha)) for alpha in orders]
    assert all(a >= b - 1e-12 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1.1e-5, 0.9e-5, 1e-8, 1e-12, 1e-15, -1e-4, -1e-9])
def test_bound_tends_to_the_mean_without_losing_digits(gap):
    # L_alpha = mean + (1 - alpha) variance / 2 + ...
    mean, variance = float(W.mean()), float(W.var(unbiased=False))
    value = float(power_bound(W, U, 1 - gap))
    assert value == pytest.approx(mean + gap * variance / 2, abs=1e-11 + gap**2)


@pytest.mark.parametrize("alpha", [-1000.0, 1000.0])
def test_bound_tends_to_its_limits_of_infinite_order(alpha):
    assert float(power_bound(W, U, alpha)) == pytest.approx(
        float(power_bound(W, U, math.copysign(math.inf, alpha))), abs=2e-3
    )


@pytest.mark.parametrize("alpha", [-math.inf, -2.0, 0.0, 0.5, 1 - 1e-7, 1.0, 2.0, math.inf])
def test_extreme_ratios_stay_finite(alpha):
    ratio = torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=torch.float64, requires_grad=True)
    bound = power_bound(ratio, U, alpha)
    (gradient,) = torch.autograd.grad(bound, [ratio])
    assert torch.isfinite(bound) and torch.isfinite(gradient).all()
    assert float(gradient.sum()) == pytest.approx(1, abs=1e-9)


# --- limits of the objectives ---
def noise(draws, seed=0, lead=()):
    return torch.randn(*lead, draws, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(objective, family, draws=6):
    loss = objective.loss(family, REGRESSION.model, noise(draws))
    gradient = torch.autograd.grad(loss.surrogate, [p for p in family.parameters() if p.numel()])
    return torch.cat([loss.value.reshape(1), *(g.reshape(-1) for g in gradient)])


@pytest.mark.parametrize(("path", "same"), [("dreg", "stl"), ("reparameterised", "reparameterised")])
def test_order_one_is_the_elbo_and_order_zero_the_importance_weighted_bound(path, same, tools):
    family = tools.gaussian([0.2, -0.3], [0.5, 0.7], "full_rank")
    elbo, iwae = at(Elbo(same), family), at(Iwae(path), family)
    assert torch.allclose(at(Renyi(1.0, path), family), elbo, rtol=0, atol=1e-10)
    assert torch.allclose(at(Renyi(0.0, path), family), iwae, rtol=0, atol=1e-10)
    assert torch.allclose(at(Renyi(1 - 1e-7, path), family), elbo, rtol=0, atol=1e-4)
    assert not torch.allclose(at(Renyi(0.5, path), family), elbo, rtol=0, atol=1e-3)


@pytest.mark.parametrize("alpha", [-math.inf, math.inf])
def test_infinite_orders_have_no_doubly_reparameterised_gradient(alpha, tools):
    with pytest.raises(SpecError, match="no estimator 'dreg'"):
        Renyi(alpha, "dreg")
    family = tools.gaussian([0.2, -0.3], [0.5, 0.7], "full_rank")
    chosen = Renyi(alpha).resolve(REGRESSION.model, family)
    assert chosen.estimator == "reparameterised"
    ratio = REGRESSION.model.log_joint(family(noise(6)).z) - family(noise(6)).log_q
    extreme = ratio.max() if alpha < 0 else -ratio.min()
    assert float(chosen.loss(family, REGRESSION.model, noise(6)).value) == pytest.approx(extreme.item(), abs=1e-12)


@pytest.mark.parametrize("alpha", [math.nan, "half", True, None])
def test_an_order_must_be_a_number(alpha):
    with pytest.raises(SpecError, match="alpha must be a real number"):
        Renyi(alpha)


def test_negative_orders_are_upper_bounds_and_minimised():
    assert Renyi(0.5).value_kind == Iwae().value_kind == "lower_bound"
    assert Renyi(-0.5).value_kind == Renyi(-math.inf).value_kind == "upper_bound"


# --- weights of the doubly reparameterised gradient ---
class Fixed:
    """A family and a model whose log ratios are given numbers; the gradient to each shows its coefficient."""

    def __init__(self, ratio):
        self.ratio = ratio
        self.capabilities = frozenset(
            {Capability.REPARAMETERISED, Capability.LOG_Q, Capability.LOG_JOINT, Capability.SCORE}
        )

    def __call__(self, noise):
        from vifamily.types import Draw

        return Draw(
            self.ratio.unsqueeze(-1),
            torch.zeros_like(self.ratio),
            torch.full_like(self.ratio, -math.log(len(self.ratio))),
        )

    def log_prob(self, z, context=None, *, frozen=False):
        return torch.zeros_like(z[..., 0])

    def log_joint(self, z, batch=None):
        return z[..., 0]


# log ratios log(0.6), log(0.3), log(0.1): v = (0.6, 0.3, 0.1) at alpha = 0
COEFFICIENTS = [
    (0.0, [0.36, 0.09, 0.01]),
    (1.0, [1 / 3, 1 / 3, 1 / 3]),
    (0.5, None),
    (2.0, None),
    (-1.0, None),
]


@pytest.mark.parametrize(("alpha", "table"), COEFFICIENTS)
def test_coefficients_of_path_derivatives(alpha, table):
    ratio = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log().requires_grad_()
    fixed = Fixed(ratio)
    loss = Renyi(alpha, "dreg").loss(fixed, fixed, torch.zeros(3, 1))
    (found,) = torch.autograd.grad(loss.surrogate, [ratio])
    powers = [w ** (1 - alpha) for w in (0.6, 0.3, 0.1)]
    v = [p / sum(powers) for p in powers]
    wanted = table or [alpha * x + (1 - alpha) * x**2 for x in v]
    sign = 1 if alpha < 0 else -1
    assert torch.allclose(found, sign * torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


def test_coefficients_at_order_minus_one_are_those_of_the_chi_square_bound():
    # 2 v^2 - v with v proportional to w^2: hand-computed for w = (0.6, 0.3, 0.1), v = (36, 9, 1) / 46
    ratio = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log().requires_grad_()
    fixed = Fixed(ratio)
    (found,) = torch.autograd.grad(Renyi(-1.0, "dreg").loss(fixed, fixed, torch.zeros(3, 1)).surrogate, [ratio])
    wanted = [2 * (36 / 46) ** 2 - 36 / 46, 2 * (9 / 46) ** 2 - 9 / 46, 2 * (1 / 46) ** 2 - 1 / 46]
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


# --- estimators agree ---
@pytest.mark.parametrize("alpha", [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])
def test_estimators_agree_in_the_mean(alpha, tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    found = [
        tools.replicated_gradient(Renyi(alpha, name), REGRESSION.model, family, 4, 40_000, seed)[0]
        for seed, name in enumerate(("reparameterised", "dreg", "score"))
    ]
    assert tools.same_mean(found[0], found[1]) and tools.same_mean(found[0], found[2])
    # the doubly reparameterised one is the least noisy near the optimum, and every one of them says something
    assert float(found[0].mean(0).abs().max()) > 10 * float(found[0].std(0).max()) / 200


@pytest.mark.parametrize("alpha", [-math.inf, math.inf])
def test_estimators_of_infinite_order_agree_in_the_mean(alpha, tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    path, score = (
        tools.replicated_gradient(Renyi(alpha, name), REGRESSION.model, family, 4, 40_000, seed)[0]
        for seed, name in enumerate(("reparameterised", "score"))
    )
    assert tools.same_mean(path, score)


def test_doubly_reparameterised_gradient_is_less_noisy(tools):
    family = tools.gaussian(REGRESSION.mean + 0.05, REGRESSION.covariance.diagonal().sqrt() * 0.95)
    plain, path = (
        tools.replicated_gradient(Renyi(0.5, name), REGRESSION.model, family, 16, 2000)[0].std(0)
        for name in ("reparameterised", "dreg")
    )
    assert (path < plain).all()


@pytest.mark.parametrize("restarts", [2, 3, 4])
def test_score_gradient_of_restarts_is_that_of_each_alone(restarts, tools):
    # also with as many restarts as draws, where a wrong axis would broadcast
    from vifamily.families._stack import StackedFamily

    members = [tools.gaussian([0.1 * r, -0.2], [0.5, 0.4 + 0.1 * r]) for r in range(restarts)]
    stack, e = StackedFamily(members), noise(3, lead=(restarts,))
    for objective in (Renyi(0.5, "score"), Iwae("score"), Elbo("score")):
        together = objective.loss(stack, REGRESSION.model, e)
        gradient = torch.autograd.grad(together.surrogate.sum(), list(stack.parameters()))
        for r, member in enumerate(members):
            alone = objective.loss(member, REGRESSION.model, e[r])
            own = torch.autograd.grad(alone.surrogate, list(member.parameters()))
            assert torch.allclose(together.value[r], alone.value, rtol=1e-10)
            assert all(torch.allclose(g[r], o, rtol=1e-9, atol=1e-10) for g, o in zip(gradient, own, strict=True))


# --- the importance-weighted bound ---
def test_importance_weighted_bound_rises_with_draws_to_the_evidence(tools):
    family = tools.gaussian(REGRESSION.mean + 0.2, 1.3 * REGRESSION.covariance.diagonal().sqrt())
    means, errors = [], []
    for draws in (2, 4, 16, 64, 256):
        value = -tools.replicated_gradient(Iwae("reparameterised"), REGRESSION.model, family, draws, 2000, draws)[
            1
        ].detach()
        means.append(float(value.mean()))
        errors.append(float(value.std()) / math.sqrt(2000))
    assert all(b - a > 0 for a, b in zip(means, means[1:], strict=False))
    assert all(m < REGRESSION.log_evidence + 5 * e for m, e in zip(means, errors, strict=True))
    assert means[-1] == pytest.approx(REGRESSION.log_evidence, abs=0.01)
    assert means[0] < REGRESSION.log_evidence - 0.1


def test_one_draw_is_refused():
    family = registry.build("families", "mean_field").build(LatentSpec(2), generator=torch.Generator())
    with pytest.raises(ConfigError, match="draws=2"):
        Iwae("reparameterised").loss(family, REGRESSION.model, noise(1))


# --- discrete latents ---
def categorical(max_states):
    latent = LatentSpec(2, targets.discrete().model.space, (2, 3))
    family = registry.build("families", f"categorical(max_states={max_states})").build(
        latent, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        family.logits.add_(0.7 * torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return family


@pytest.mark.parametrize("alpha", [0.5, 2.0, -1.0])
def test_enumerated_bound_is_the_divergence_over_all_states(alpha):
    target, family = targets.discrete(), categorical(10)
    loss = Renyi(alpha).resolve(target.model, family)
    assert loss.estimator == "enumerated"
    value = loss.loss(family, target.model, torch.zeros(2, 0, dtype=torch.float64)).value
    log_q, log_p = family.log_prob(family.states), target.model.log_joint(family.states)
    exact = torch.logsumexp(alpha * log_q + (1 - alpha) * log_p, 0) / (1 - alpha)
    assert float(value) == pytest.approx((1 if alpha < 0 else -1) * exact.item(), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -1.0])
def test_score_gradient_on_discrete_latents_is_that_of_the_exact_expectation(alpha, tools):
    # the expectation over two draws of a bound, written out over all pairs of states
    target, family = targets.discrete(), categorical(0)
    states = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0)).double()
    log_q, log_p = family.log_prob(states), target.model.log_joint(states)
    pairs = torch.stack(torch.broadcast_tensors((log_p - log_q)[:, None], (log_p - log_q)[None]), -1)
    bound = power_bound(pairs, U[:2] + math.log(2), alpha)
    expected = (1 if alpha < 0 else -1) * (torch.exp(log_q[:, None] + log_q[None]) * bound).sum()
    (exact,) = torch.autograd.grad(expected, [family.logits])
    found, value = tools.replicated_gradient(Renyi(alpha, "score"), target.model, family, 2, 20_000)
    assert tools.same_mean(found, exact.reshape(1, -1).expand(2, -1))
    assert tools.same_mean(value[:, None], expected.detach().reshape(1, 1).expand(2, 1))


def test_a_bound_in_place_of_a_density_has_no_frozen_estimators():
    family = registry.build("families", "semi_implicit").build(
        LatentSpec(2), generator=torch.Generator().manual_seed(0)
    )
    for objective in (Elbo("stl"), Elbo("score"), Iwae("dreg"), Iwae("score")):
        with pytest.raises(IncompatibleError, match="bound in place of their log density"):
            objective.resolve(REGRESSION.model, family)
    assert Elbo().resolve(REGRESSION.model, family).estimator == "reparameterised"
    assert Iwae().resolve(REGRESSION.model, family).estimator == "reparameterised"
