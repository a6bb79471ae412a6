"""The ELBO: every estimator against the others and the closed form, the baseline, exact enumeration, minibatches."""

import math

import pytest
import torch

from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, SpecError
from vifamily.objectives import Elbo
from vifamily.testing import targets
from vifamily.types import Capability, LatentSpec, Space

REGRESSION = targets.linear_regression()
PATHWISE = ("stl", "entropy", "analytic_kl", "reparameterised")


def exact_loss(family):
    """KL(q || p) minus the log evidence, closed form between Gaussians."""
    mean, covariance = family.moments()
    q = torch.distributions.MultivariateNormal(mean, covariance)
    p = torch.distributions.MultivariateNormal(REGRESSION.mean, REGRESSION.covariance)
    return torch.distributions.kl_divergence(q, p) - REGRESSION.log_evidence


@pytest.mark.parametrize("spec", ["mean_field", "full_rank", "low_rank(rank=1)"])
@pytest.mark.parametrize("name", [*PATHWISE, "score"])
def test_every_estimator_has_the_gradient_and_the_value_of_the_closed_form(name, spec, tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6], spec)
    parameters = [p for p in family.parameters() if p.numel()]
    exact = exact_loss(family)
    wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(exact, parameters)])
    found, value = tools.replicated_gradient(Elbo(name), REGRESSION.model, family, 4, 10_000)
    assert tools.same_mean(found, wanted.expand(2, -1))
    assert tools.same_mean(value[:, None], exact.detach().expand(2, 1))


def test_sticking_the_landing_has_no_noise_at_the_posterior(tools):
    family = tools.gaussian(REGRESSION.mean, REGRESSION.covariance.diagonal().sqrt(), "full_rank")
    family.start_at(REGRESSION.mean, torch.linalg.cholesky(REGRESSION.covariance))
    noise = {
        name: tools.replicated_gradient(Elbo(name), REGRESSION.model, family, 2, 50)[0].std(0).max()
        for name in (*PATHWISE, "score")
    }
    assert float(noise["stl"]) < 1e-10
    assert min(float(noise[name]) for name in ("entropy", "analytic_kl", "reparameterised")) > 0.1
    # at q = p the log ratio is constant, so the baseline takes all of the score function's noise
    assert float(noise["score"]) < 1e-10


def test_the_closed_entropy_is_less_noisy_than_sticking_the_landing_where_q_is_far_too_narrow(tools):
    family = tools.gaussian(REGRESSION.mean, 0.2 * REGRESSION.covariance.diagonal().sqrt())
    noise = {
        name: tools.replicated_gradient(Elbo(name), REGRESSION.model, family, 2, 2000)[0].std(0).mean()
        for name in ("entropy", "stl")
    }
    assert noise["entropy"] < 0.5 * noise["stl"]


def test_the_leave_one_out_baseline_takes_noise_and_leaves_the_mean(tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    found, _ = tools.replicated_gradient(Elbo("score"), REGRESSION.model, family, 4, 20_000)

    class Plain(Elbo):
        """The same without a baseline."""

        def loss(self, family, model, noise, batch=None, state=None):
            loss = super().loss(family, model, noise, batch, state)
            z = family(noise).z.detach()
            log_q = family.log_prob(z)
            ratio = (model.log_joint(z) - log_q).detach()
            from dataclasses import replace

            return replace(loss, surrogate=-(ratio * log_q).mean(-1))

    plain, _ = tools.replicated_gradient(Plain("score"), REGRESSION.model, family, 4, 20_000, seed=1)
    assert tools.same_mean(found, plain)
    assert (found.std(0) < 0.75 * plain.std(0)).all()


def test_the_score_estimator_needs_two_draws(tools):
    with pytest.raises(ConfigError, match="draws=2"):
        Elbo("score").loss(
            tools.gaussian([0.0, 0.0], [1.0, 1.0]), REGRESSION.model, torch.zeros(1, 2, dtype=torch.float64)
        )


# --- choice of the estimator ---
@pytest.mark.parametrize(
    ("family", "estimator"),
    [
        ("mean_field", "stl"),
        ("full_rank", "stl"),
        ("mixture", "stl"),
        ("flow(kind=nice)", "stl"),
        ("flow", "reparameterised"),
        ("semi_implicit", "reparameterised"),
        ("ensemble(jitter=0.5)", "stl"),
    ],
)
def test_automatic_choice_on_a_continuous_model(family, estimator):
    built = registry.build("families", family).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
    assert Elbo().resolve(REGRESSION.model, built).estimator == estimator


def test_families_without_a_density_are_refused():
    for family in ("implicit", "ensemble"):
        built = registry.build("families", family).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        with pytest.raises(IncompatibleError, match="log density") as caught:
            Elbo().resolve(REGRESSION.model, built)
        assert caught.value.missing == ("family: log density",)


def test_unknown_and_impossible_estimators_are_refused(tools):
    with pytest.raises(SpecError, match="no estimator 'dreg'"):
        Elbo("dreg")
    student = registry.build("families", "mean_field(student_t=5)").build(LatentSpec(2), generator=torch.Generator())
    with pytest.raises(IncompatibleError, match="closed-form Gaussian moments"):
        Elbo("analytic_kl").resolve(REGRESSION.model, student)
    with pytest.raises(IncompatibleError, match="no draws that carry unequal weights"):
        mixture = registry.build("families", "mixture").build(LatentSpec(2), generator=torch.Generator())
        Elbo("score").resolve(REGRESSION.model, mixture)


# --- discrete latents ---
def discrete_family(spec):
    latent = LatentSpec(2, Space.DISCRETE, (2, 3))
    family = registry.build("families", spec).build(latent, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        family.logits.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return family


def test_enumeration_is_exact():
    target, family = targets.discrete(), discrete_family("categorical")
    loss = Elbo().resolve(target.model, family)
    assert loss.estimator == "enumerated"
    out = loss.loss(family, target.model, torch.zeros(1, 0, dtype=torch.float64))
    log_q, log_p = family.log_prob(family.states), target.model.log_joint(family.states)
    exact = (log_q.exp() * (log_q - log_p)).sum()
    assert float(out.value) == pytest.approx(exact.item(), abs=1e-12)
    (found,), (wanted,) = (torch.autograd.grad(x, [family.logits]) for x in (out.surrogate, exact))
    assert torch.allclose(found, wanted, atol=1e-12)


def test_score_gradient_on_discrete_latents_agrees_with_enumeration(tools):
    target, exact_family, sampled = (
        targets.discrete(),
        discrete_family("categorical"),
        discrete_family("categorical(max_states=0)"),
    )
    out = Elbo("enumerated").loss(exact_family, target.model, torch.zeros(1, 0, dtype=torch.float64))
    (wanted,) = torch.autograd.grad(out.surrogate, [exact_family.logits])
    assert Elbo().resolve(target.model, sampled).estimator == "score"
    found, value = tools.replicated_gradient(Elbo("score"), target.model, sampled, 3, 20_000)
    assert tools.same_mean(found, wanted.reshape(1, -1).expand(2, -1))
    assert tools.same_mean(value[:, None], out.value.expand(2, 1))


# --- terms, minibatches, weights ---
@pytest.mark.parametrize("name", [*PATHWISE, "score"])
def test_terms_add_up_to_the_loss(name, tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = Elbo(name).loss(family, REGRESSION.model, noise)
    assert float(sum(loss.terms.values())) == pytest.approx(float(loss.value), abs=1e-10)


@pytest.mark.parametrize("name", [*PATHWISE, "score"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_minibatches_are_unbiased_on_the_same_noise(name, size, tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    model, objective = REGRESSION.model, Elbo(name)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    source = model.batches(size, seed=1)
    parts = [objective.loss(family, model, noise, source.at(i)) for i in range(12 // size)]
    whole = objective.loss(family, model, noise)
    assert float(torch.stack([p.value for p in parts]).mean()) == pytest.approx(float(whole.value), abs=1e-10)
    of_parts = [torch.autograd.grad(p.surrogate, list(family.parameters())) for p in parts]
    for i, g in enumerate(torch.autograd.grad(whole.surrogate, list(family.parameters()))):
        assert torch.allclose(torch.stack([p[i] for p in of_parts]).mean(0), g, atol=1e-9)


def test_a_mixture_descends_on_its_weights(tools):
    # two components fixed on the modes of an unequal mixture: only the weights are wrong
    from vifamily.models import Density

    def log_prob(z):
        each = torch.stack([-0.5 * (z[:, 0] - c) ** 2 + math.log(w) for c, w in ((-6.0, 0.2), (6.0, 0.8))])
        return torch.logsumexp(each, 0)

    model = Density(log_prob, dim=1)
    family = registry.build("families", "mixture(components=2)").build(
        LatentSpec(1), generator=torch.Generator().manual_seed(0)
    )
    family.parts[0].start_at(torch.tensor([-6.0]), torch.tensor([1.0]))
    family.parts[1].start_at(torch.tensor([6.0]), torch.tensor([1.0]))
    noise = tools.quadrature_noise(50)
    optimiser = torch.optim.Adam([family.logits], lr=0.1)
    for _ in range(300):
        loss = Elbo("stl").loss(family, model, noise)
        (family.logits.grad,) = torch.autograd.grad(loss.surrogate, [family.logits])
        optimiser.step()
    assert family.logits.softmax(-1).tolist() == pytest.approx([0.2, 0.8], abs=1e-3)


def test_a_model_that_declares_nothing_but_its_joint_is_enough(tools):
    family = tools.gaussian([0.3, -0.4], [0.5, 0.6])
    model = targets.correlated_normal(0.5).model
    assert Capability.PER_DATUM not in model.capabilities
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = Elbo("reparameterised").loss(family, model, noise)
    assert set(loss.terms) == {"log_joint", "log_q"}
