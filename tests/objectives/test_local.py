"""Local latents: bounds per datum against exact evidence, minibatches, and a global latent above them."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError
from vifamily.families._local_view import LocalView, joint_noise_spec
from vifamily.families.local import LocalFamily
from vifamily.models import LikelihoodModel
from vifamily.objectives import Elbo, Iwae, Renyi
from vifamily.rng import draw_noise
from vifamily.testing import targets
from vifamily.types import LatentSpec

TARGET = targets.local_normal()
Y = torch.tensor([-1.2, 0.4, 2.0, -0.3, 0.9, 1.5], dtype=torch.float64)
EXACT_MEAN, EXACT_SD = Y / 1.49, math.sqrt(0.49 / 1.49)


def family_at(mean, sd, model=TARGET.model):
    """Mean field over each datum's code, at given means and standard deviations."""
    entry = registry.build("families", "mean_field")
    shared = entry.build(LatentSpec(model.dim), generator=torch.Generator().manual_seed(0))
    family = LocalFamily.from_entries(
        shared, entry, 1, generator=torch.Generator().manual_seed(0), num_data=model.num_data
    )
    with torch.no_grad():
        table = next(p for p in family.per_datum.head.parameters())
        table.copy_(torch.stack([mean, torch.full_like(mean, math.log(sd))], 1))
    return family


def loss_of(objective, family, noise, batch, model=TARGET.model):
    return objective.loss(LocalView(family, batch), model, noise, batch)


def noise_for(family, draws, size, seed=0):
    return draw_noise(joint_noise_spec(family, size), (draws,), torch.Generator().manual_seed(seed))


WHOLE = TARGET.model.batches(6, seed=0).at(0)


def evidence_per_datum():
    return torch.distributions.Normal(0.0, math.sqrt(1.49)).log_prob(Y)


@pytest.mark.parametrize(
    "objective",
    [Elbo("reparameterised"), Iwae("reparameterised"), Renyi(0.5, "reparameterised"), Renyi(-1.0, "reparameterised")],
)
def test_at_the_exact_local_posteriors_the_bound_is_the_evidence(objective):
    family = family_at(EXACT_MEAN, EXACT_SD)
    value = float(loss_of(objective, family, noise_for(family, 5, 6), WHOLE).value)
    assert (value if objective.value_kind == "upper_bound" else -value) == pytest.approx(TARGET.log_evidence, abs=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_the_bound_is_taken_per_datum_and_then_summed(alpha):
    family = family_at(EXACT_MEAN + 0.3, 0.8)
    noise = noise_for(family, 7, 6, seed=3)
    with torch.no_grad():
        draw = LocalView(family, WHOLE)(noise)
    ratio = TARGET.model.log_local(draw.z, draw.local, WHOLE) - draw.local_log_q
    each = [
        ratio[:, i].mean() if alpha == 1 else torch.logsumexp((1 - alpha) * ratio[:, i] - math.log(7), 0) / (1 - alpha)
        for i in range(6)
    ]
    found = loss_of(Renyi(alpha, "reparameterised"), family, noise, WHOLE)
    assert float(found.value) == pytest.approx(-float(sum(each)), abs=1e-10)
    # one bound over the joint ratio of all data is another, looser number
    joint = ratio.sum(-1)
    whole = joint.mean() if alpha == 1 else torch.logsumexp((1 - alpha) * joint - math.log(7), 0) / (1 - alpha)
    assert alpha == 1 or abs(float(whole) + float(found.value)) > 1e-3


def test_the_elbo_has_the_closed_form_per_datum():
    mean, sd = EXACT_MEAN + 0.3, 0.8
    family = family_at(mean, sd)
    q = torch.distributions.Normal(mean, sd)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(EXACT_MEAN, EXACT_SD)).sum()
    values = torch.stack(
        [loss_of(Elbo("reparameterised"), family, noise_for(family, 64, 6, seed=s), WHOLE).value for s in range(200)]
    )
    error = float(values.std()) / math.sqrt(200)
    assert abs(float(values.mean()) - (float(kl) - TARGET.log_evidence)) < 5 * error


def test_importance_weighted_bounds_per_datum_rise_to_the_evidence():
    family = family_at(EXACT_MEAN + 0.3, 0.8)
    means = []
    for draws in (2, 8, 64, 512):
        values = [
            loss_of(Iwae("reparameterised"), family, noise_for(family, draws, 6, seed=s), WHOLE).value
            for s in range(300)
        ]
        means.append(-float(torch.stack(values).mean()))
    assert all(b > a for a, b in zip(means, means[1:], strict=False))
    assert means[-1] == pytest.approx(TARGET.log_evidence, abs=0.01)


@pytest.mark.parametrize(
    "objective",
    [Elbo("reparameterised"), Iwae("reparameterised"), Renyi(0.5, "reparameterised"), Renyi(-1.0, "reparameterised")],
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_minibatches_of_local_latents_are_unbiased_on_the_same_noise(objective, size):
    family = family_at(EXACT_MEAN + 0.3, 0.8)
    noise = noise_for(family, 5, 6)
    columns = noise.reshape(5, 6, -1)
    source = TARGET.model.batches(size, seed=2)
    batches = [source.at(i) for i in range(6 // size)]
    parts = [loss_of(objective, family, columns[:, b.index].reshape(5, -1), b) for b in batches]
    ordered = columns[:, WHOLE.index].reshape(5, -1)
    whole = loss_of(objective, family, ordered, WHOLE)
    assert float(torch.stack([p.value for p in parts]).mean()) == pytest.approx(float(whole.value), abs=1e-10)
    parameters = [p for p in family.parameters() if p.numel()]
    wanted = torch.autograd.grad(whole.surrogate, parameters)
    found = [torch.autograd.grad(p.surrogate, parameters) for p in parts]
    for i, g in enumerate(wanted):
        assert torch.allclose(torch.stack([f[i] for f in found]).mean(0), g, atol=1e-10)


def test_a_bound_per_datum_needs_a_batch():
    family = family_at(EXACT_MEAN, EXACT_SD)
    view = LocalView(family, WHOLE)
    with pytest.raises(ConfigError, match="batch"):
        Iwae("reparameterised").loss(view, TARGET.model, noise_for(family, 3, 6), None)


@pytest.mark.parametrize("objective", [Elbo("stl"), Elbo("entropy"), Elbo("score"), Iwae("dreg"), Iwae("score")])
def test_estimators_that_ignore_local_densities_are_refused(objective):
    with pytest.raises(IncompatibleError, match="local latents|closed-form"):
        objective.resolve(TARGET.model, family_at(EXACT_MEAN, EXACT_SD))


# --- a global latent above the local ones ---
def hierarchical():
    """mu ~ N(0, 2), code_n ~ N(mu, 1), y_n ~ N(code_n, 0.7): conjugate at both levels."""

    def log_local(theta, local, y):
        mu, code = theta["mu"].unsqueeze(-1), local["code"]
        return -0.5 * (code - mu) ** 2 - 0.5 * ((y - code) / 0.7) ** 2 - math.log(0.7) - math.log(2 * math.pi)

    return LikelihoodModel(
        (0.0, 2.0), data=Y, parameters={"mu": "real"}, local={"code": ((), "real")}, log_local=log_local
    )


def test_elbo_of_global_and_local_latents_matches_the_closed_form():
    model = hierarchical()
    precision = 1 / 4 + 6 / 1.49
    mean = float(Y.sum()) / 1.49 / precision
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(6, dtype=torch.float64), 1.49 * torch.eye(6, dtype=torch.float64) + 4.0
    )
    # the best factorised q: variances 1 / (precision given all else), means exact
    code = (mean / 1 + Y / 0.49) / (1 + 1 / 0.49)
    family = family_at(code, math.sqrt(1 / (1 + 1 / 0.49)), model)
    family.start_at(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([math.sqrt(1 / (1 / 4 + 6))], dtype=torch.float64)
    )
    lam = torch.zeros(7, 7, dtype=torch.float64)
    lam[0, 0] = 1 / 4 + 6
    lam[0, 1:] = lam[1:, 0] = -1
    lam[1:, 1:] = torch.eye(6, dtype=torch.float64) * (1 + 1 / 0.49)
    # KL of the best factorised Gaussian: half of log prod diag(precision) - log det precision
    gap = 0.5 * (lam.diagonal().log().sum() - torch.logdet(lam))
    exact = float(gap) - float(marginal.log_prob(Y))
    batch = model.batches(6, seed=0).at(0)
    values = torch.stack(
        [
            loss_of(Elbo("reparameterised"), family, noise_for(family, 64, 6, seed=s), batch, model).value
            for s in range(200)
        ]
    )
    assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(200)


def test_minibatches_with_a_global_latent_are_unbiased_for_the_elbo_and_refused_for_joint_bounds():
    model = hierarchical()
    family = family_at(Y, 0.6, model)
    noise = noise_for(family, 4, 6)
    shared, columns = noise[:, :1], noise[:, 1:].reshape(4, 6, -1)
    source = model.batches(2, seed=0)
    batches = [source.at(i) for i in range(3)]
    parts = [
        loss_of(Elbo("reparameterised"), family, torch.cat([shared, columns[:, b.index].reshape(4, -1)], 1), b, model)
        for b in batches
    ]
    order = model.batches(6, seed=0).at(0)
    whole = loss_of(
        Elbo("reparameterised"), family, torch.cat([shared, columns[:, order.index].reshape(4, -1)], 1), order, model
    )
    assert float(torch.stack([p.value for p in parts]).mean()) == pytest.approx(float(whole.value), abs=1e-10)
    with pytest.raises(IncompatibleError, match="not a sum over data"):
        vf.plan(model, "mean_field", "iwae", batch_size=2)
    assert vf.plan(TARGET.model, "mean_field", "iwae", batch_size=2).estimator == "reparameterised"


def local_moments(family):
    """Mean and standard deviation of each datum's code under a fitted family."""
    with torch.no_grad():
        loc, log_scale = family.per_datum.values(torch.arange(6))
        return family.per_datum.to_latent(loc)[:, 0], (log_scale.exp() * family.per_datum.scale)[:, 0]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_fit_of_purely_local_latents_finds_their_posteriors(batch_size):
    posterior = vf.fit(TARGET.model, "mean_field", "elbo", draws=8, steps=1200, batch_size=batch_size, progress=False)
    assert isinstance(posterior.family, LocalFamily)
    mean, sd = local_moments(posterior.family)
    assert (mean - EXACT_MEAN).abs().max() < 0.15 * EXACT_SD
    assert (sd / EXACT_SD).log().abs().max() < 0.15


def test_a_fit_by_importance_weighted_bounds_per_datum_comes_near_the_posteriors():
    posterior = vf.fit(TARGET.model, "mean_field", "iwae", draws=8, steps=800, progress=False)
    exact = torch.distributions.Normal(EXACT_MEAN, EXACT_SD)

    def gap(mean, sd):
        return float(torch.distributions.kl_divergence(torch.distributions.Normal(mean, sd), exact).sum())

    assert gap(*local_moments(posterior.family)) < 0.25 * gap(torch.zeros_like(Y), torch.ones_like(Y))
