"""The adversarial arc length: its value and gradients at known critics, and fits from draws alone."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry, testing
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.models import Density
from vifamily.numerics.arctangent_ratio import logit_terms
from vifamily.objectives._ratio_critic import LogRatio
from vifamily.rng import draw_noise, generator

DOUBLE = torch.float64


def one_normal(size=20_000, seed=0):
    """The model N(0, 1), by its draws alone: the quantiles of the normal at evenly spaced levels."""
    level = (torch.arange(size, dtype=DOUBLE) + 0.5) / size
    draws = math.sqrt(2) * torch.erfinv(2 * level - 1)
    order = torch.randperm(size, generator=generator(seed, "order"))
    return Density(lambda z: -0.5 * z[:, 0] ** 2, dim=1).with_reference_draws(draws[order, None])


def exact_critic(shift, sd):
    """The log ratio of N(0, 1) and N(shift, sd^2), a quadratic form: no part of a network is needed."""
    critic = LogRatio(torch.zeros(1).double(), torch.ones(1).double(), [4], generator(0, "critic"), ())
    with torch.no_grad():
        critic.weights[-1].zero_()
        critic.biases[-1].fill_(math.log(sd) + 0.5 * shift**2 / sd**2)
        critic.linear.fill_(-shift / sd**2)
        critic.quadratic.fill_(0.5 / sd**2 - 0.5)
    return critic


def length_by_quadrature(shift, sd):
    x = torch.linspace(-14, 14, 200_001, dtype=DOUBLE)
    p = (-0.5 * x**2).exp() / math.sqrt(2 * math.pi)
    q = (-0.5 * ((x - shift) / sd) ** 2).exp() / (sd * math.sqrt(2 * math.pi))
    return float(torch.trapezoid(torch.hypot(p, q), x))


def value_at(objective, critic, shift, sd, size=4000, seed=0, model=None):
    model = one_normal() if model is None else model
    family = vf.fit(model, "mean_field", "energy_distance", steps=1, seed=0, progress=False).family.copy()
    family.start_at(torch.tensor([shift], dtype=DOUBLE), torch.tensor([sd], dtype=DOUBLE))
    family.requires_grad_(requires_grad=True)
    state = objective.init_state(model, family, generator=generator(seed, "state"))
    state = type(state)(critic, state.seed, state.step)
    return family, objective.loss(family, model, draw_noise(family.noise_spec, (size,), generator(seed, "noise")), None,
                                  state)  # fmt: skip


@pytest.mark.parametrize(("shift", "sd"), [(0.0, 1.0), (1.0, 1.0), (0.3, 1.4), (2.0, 0.5)])
def test_value_at_the_best_critic_is_the_length(seed, shift, sd):
    objective = registry.build("objectives", "roc_arc_critic(reference_batch=None)")
    _, loss = value_at(objective, exact_critic(shift, sd), shift, sd, seed=seed)
    # the reference draws are a rule of 20,000 points, so that the error is that of the draws of q, 1 at most in size
    assert abs(float(loss.value) + math.sqrt(2) - length_by_quadrature(shift, sd)) < 5 * 0.5 / math.sqrt(4000)
    assert float(loss.terms["sine"] + loss.terms["cosine"]) == pytest.approx(float(loss.value) + math.sqrt(2))


def test_value_at_another_critic_is_below(seed):
    objective = registry.build("objectives", "roc_arc_critic(reference_batch=None)")
    best = float(value_at(objective, exact_critic(1.0, 1.0), 1.0, 1.0, seed=seed)[1].value)
    for shift, sd in ((0.5, 1.0), (1.5, 1.0), (1.0, 1.4)):
        assert float(value_at(objective, exact_critic(shift, sd), 1.0, 1.0, seed=seed)[1].value) < best


@pytest.mark.parametrize("form", ["non_saturating", "log_ratio"])
def test_other_losses_of_the_family_and_one_of_the_critic(seed, form):
    """The critic's gradient is that of minimax; the family's is that of the loss named, at the critic held."""
    critic = exact_critic(0.7, 1.2)
    plain = registry.build("objectives", "roc_arc_critic(reference_batch=None)")
    other = registry.build("objectives", f"roc_arc_critic(family_loss={form}, reference_batch=None)")
    model = one_normal(2000)
    rows = []
    for objective in (plain, other):
        family, loss = value_at(objective, critic, 1.0, 0.8, size=50, seed=seed, model=model)
        rows.append((loss, torch.autograd.grad(loss.surrogate, list(critic.parameters()), retain_graph=True), family))
    for a, b in zip(rows[0][1], rows[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    loss, _, family = rows[1]
    own = [p for p in family.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss.surrogate, own)
    z = family(draw_noise(family.noise_spec, (50,), generator(seed, "noise"))).z
    log_ratio = critic(z)
    wanted = torch.autograd.grad(-(log_ratio if form == "log_ratio" else logit_terms(log_ratio)[0]).mean(), own)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_restarts_have_critics_of_their_own(seed):
    critic = LogRatio(torch.zeros(2), torch.ones(2), [3], generator(seed, "critic"), (3,))
    z = torch.randn(3, 5, 2, generator=generator(seed, "z"))
    together = critic(z)
    for r in range(3):
        alone = LogRatio(torch.zeros(2), torch.ones(2), [3], generator(seed, "critic"), ())
        torch.testing.assert_close(together[r], alone(z[r]))
    before = together.detach()
    with torch.no_grad():
        critic.quadratic[1] += 1
    changed = (critic(z) - before).abs().amax(-1) > 0
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("form", ["non_saturating", "log_ratio"])
def test_contracts_of_the_other_losses(form):
    assert "players" in testing.check_objective(f"roc_arc_critic(family_loss={form})").passed


def test_sampler_from_draws_sees_the_weights_of_modes(seed):
    """What score-based objectives cannot see: an implicit family finds the weights 0.2 and 0.8 of two far modes."""
    source = generator(seed, "modes")
    size = 4000
    low = torch.rand(size, generator=source) < 0.2
    draws = torch.where(low, -3.0, 3.0) + 0.7 * torch.randn(size, generator=source)
    model = Density(lambda z: -0.5 * z[:, 0] ** 2, dim=1).with_reference_draws(draws[:, None].double())
    posterior = vf.fit(
        model, "implicit(hidden=[16, 16])", "roc_arc_critic(family_loss=non_saturating)", steps=1500, seed=seed,
        progress=False,
    )  # fmt: skip
    found = posterior.draws(4000)[:, 0]
    assert abs(float((found < 0).double().mean()) - 0.2) < 0.07


def test_refusals():
    with pytest.raises(ConfigError, match="family_loss"):
        registry.build("objectives", "roc_arc_critic(family_loss=wasserstein)")
    with pytest.raises(ConfigError, match="hidden"):
        registry.build("objectives", "roc_arc_critic(hidden=[0])")
    with pytest.raises(ConfigError, match="reference_batch"):
        registry.build("objectives", "roc_arc_critic(reference_batch=1)")
    with pytest.raises(IncompatibleError, match="reference draws"):
        vf.fit(Density(lambda z: -0.5 * (z**2).sum(-1), dim=1), "mean_field", "roc_arc_critic", steps=1)
