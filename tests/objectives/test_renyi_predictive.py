"""The per-datum Rényi objective: known spreads, outliers, identical members, limits, units, ramp, weights."""

import math

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, DataError, IncompatibleError, NotAvailableError
from vifamily.models import LikelihoodModel
from vifamily.objectives import Elbo, RenyiPredictive
from vifamily.testing import targets
from vifamily.testing._tools import flat_gradient, grid_noise
from vifamily.types import Capability, LatentSpec

ENTROPY = 0.5 * math.log(2 * math.pi) + 0.5
"""Mean negative log likelihood of a member at the centre of data of variance one."""
NOISE = torch.zeros(1, 0, dtype=torch.float64)
REGRESSION = targets.linear_regression()


def normal_data(size, variance, mean=0.0):
    """Quantiles of a normal law, with exactly this variance."""
    y = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size)
    return mean + y * (variance / y.square().mean()).sqrt()


def location(y, groups=None, prior_sd=1e3):
    """The model y ~ N(theta, 1)."""

    def log_likelihood(z, y):
        return -0.5 * (y - z) ** 2 - 0.5 * math.log(2 * math.pi)

    return LikelihoodModel((0.0, prior_sd), log_likelihood, data=y, dim=1, groups=groups)


def ensemble(size, spread=0.5, seed=0):
    family = registry.build("families", f"ensemble(size={size})").build(
        LatentSpec(1), generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        family.points.mul_(spread)
    return family


def minimise(objective, model, family, *, parameters=None, noise=NOISE):
    """Minimise on fixed noise by L-BFGS; returns weights and places of the draws."""
    objective = objective.resolve(model, family)
    parameters = list(family.parameters()) if parameters is None else parameters
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-14
    )

    def closure():
        optimiser.zero_grad()
        loss = objective.loss(family, model, noise).surrogate
        loss.backward()
        return loss.detach()

    optimiser.step(closure)
    with torch.no_grad():
        draw = family(noise)
    return draw.log_weight.exp(), draw.z[:, 0]


def mixture_nll(model, weight, z):
    """Log score of the mixture, per datum."""
    return -torch.logsumexp(weight.log()[:, None] + model.log_likelihood(z[:, None]), 0)


# --- known optima -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.3, 0.45, 0.55, 0.8, 1.0])
def test_variance_of_members_on_overdispersed_data(alpha):
    # model N(theta, 1), data variance 2: members spread by 2 - 1/alpha, and coincide for alpha below 1/2
    family = ensemble(8)
    _, z = minimise(RenyiPredictive(alpha=alpha), location(normal_data(1000, 2.0)), family, parameters=[family.points])
    wanted = max(0.0, 2.0 - 1 / alpha)
    assert float(z.var(unbiased=False)) == pytest.approx(wanted, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_gaussian_inflation_of_a_well_specified_model(alpha):
    # data as spread as the model says: the posterior variance 1/n is inflated by 1/(1 - alpha)
    n = 4000
    family = registry.build("families", "full_rank").build(LatentSpec(1), generator=torch.Generator().manual_seed(0))
    family.precondition(torch.zeros(1), torch.full((1,), n**-0.5, dtype=torch.float64))
    family.start_at(torch.tensor([0.3]).double(), torch.tensor([[1.3]]).double())
    model = location(normal_data(n, 1.0))
    minimise(RenyiPredictive(alpha=alpha), model, family, noise=grid_noise(family.noise_spec, 200))
    mean, covariance = (part.detach() for part in family.moments())
    # to the next order in 1/n the variance solves n (1/u - alpha/u^2) = 1/v with u = 1 + alpha v
    assert float(covariance) * n * (1 - alpha) == pytest.approx(1, abs=0.01)
    assert abs(float(mean)) < 0.01 * n**-0.5


@pytest.mark.parametrize(("alpha", "split"), [(0.0, False), (0.02, False), (0.05, False), (0.3, True), (0.8, True)])
def test_outliers_are_left_to_one_member(alpha, split):
    # 10 % of the data at 10: below alpha = 0.099 every member sits at the biased mean, above it one takes the outliers
    clean = normal_data(450, 1.0)
    model = location(torch.cat([clean, normal_data(50, 1.0, 10.0)]))
    family = ensemble(8, spread=2.0)
    weight, z = minimise(RenyiPredictive(alpha=alpha), model, family, parameters=[family.points])
    at_zero, at_ten = (z.abs() < 0.1).sum().item(), ((z - 10).abs() < 0.1).sum().item()
    nll = float(mixture_nll(model, weight, z)[:450].mean())
    if split:
        assert (at_zero, at_ten) == (7, 1)
        assert nll == pytest.approx(ENTROPY + math.log(8 / 7), abs=2e-3)
    else:
        assert torch.allclose(z, torch.ones(8, dtype=torch.float64), atol=1e-4)
        assert nll == pytest.approx(ENTROPY + 0.5, abs=1e-3)


def test_learned_weights_find_the_shares_of_an_uneven_mixture():
    # two members on a 90/10 mixture: above one member's, the log score is the entropy of the shares, or ln 2
    model = location(torch.cat([normal_data(450, 1.0), normal_data(50, 1.0, 10.0)]))
    scores = {}
    for name in ("equal", "learned"):
        family = ensemble(2, spread=3.0, seed=1)
        parameters = [family.points] if name == "equal" else None
        weight, z = minimise(RenyiPredictive(alpha=1.0), model, family, parameters=parameters)
        scores[name] = float(mixture_nll(model, weight, z).mean())
    assert scores["equal"] == pytest.approx(ENTROPY + math.log(2), abs=2e-3)
    assert scores["learned"] == pytest.approx(ENTROPY - 0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=2e-3)
    assert sorted(weight.tolist()) == pytest.approx([0.1, 0.9], abs=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.0])
def test_identical_members_stay_identical(alpha):
    # a saddle at every alpha: the same place, the same gradient, to the last bit
    model, family = location(normal_data(100, 4.0)), ensemble(8)
    with torch.no_grad():
        family.points.fill_(0.7)
    objective = RenyiPredictive(alpha=alpha).resolve(model, family)
    optimiser = torch.optim.Adam(family.parameters(), lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        objective.loss(family, model, NOISE).surrogate.backward()
        optimiser.step()
    assert abs(float(family.points.detach()[0])) < 0.6
    for part in (family.points, family.logits):
        assert len(set(part.detach().flatten().tolist())) == 1


# --- what it is -------------------------------------------------------------------------------------------------------
FAMILIES = {
    "full_rank": "entropy",
    "mean_field": "entropy",
    "mixture(components=2)": "reparameterised",
    "ensemble(size=4, jitter=0.3)": "reparameterised",
    "ensemble(size=4)": "cross",
}


def built(spec, seed=3):
    source = torch.Generator().manual_seed(seed)
    family = registry.build("families", spec).build(LatentSpec(2), generator=source)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return family, torch.randn(6, *family.noise_spec.shape, generator=source, dtype=torch.float64)


@pytest.mark.parametrize(("spec", "estimator"), FAMILIES.items())
@pytest.mark.parametrize("alpha", [0.0, 1e-7, 0.4, 1.0, 2.0])
def test_value_terms_and_gradient_on_every_kind_of_family(spec, estimator, alpha):
    family, noise = built(spec)
    objective = RenyiPredictive(alpha=alpha).resolve(REGRESSION.model, family)
    assert objective.estimator == estimator
    loss, draw = objective.loss(family, REGRESSION.model, noise), family(noise)
    # written out: one power mean per datum, and the divergence from the prior or its cross term
    likelihood = REGRESSION.model.log_likelihood(draw.z)
    if alpha >= 0.1:
        fit = -torch.logsumexp(draw.log_weight[:, None] + alpha * likelihood, 0).sum() / alpha
    else:
        mean = (draw.log_weight.exp()[:, None] * likelihood).sum(0)
        spread = (draw.log_weight.exp()[:, None] * (likelihood - mean) ** 2).sum(0)
        fit = -(mean + alpha / 2 * spread).sum()
    prior = -(draw.log_weight.exp() * REGRESSION.model.log_prior(draw.z)).sum()
    if estimator == "entropy":
        prior = prior - family.entropy()
    elif estimator == "reparameterised":
        prior = prior + (draw.log_weight.exp() * draw.log_q).sum()
    assert loss.value.item() == pytest.approx((fit + prior).item(), rel=1e-9)
    assert sum(loss.terms.values()).item() == pytest.approx(loss.value.item(), rel=1e-12)
    assert set(loss.terms) == {"routed_fit", "routing_cost", "prior"}
    assert loss.terms["prior"].item() == pytest.approx(prior.item(), rel=1e-9)
    assert loss.terms["routing_cost"].item() >= 0
    check_gradient(objective, family, noise)


def check_gradient(objective, family, noise, model=REGRESSION.model):
    """Against central differences of the value, component by component."""
    got, wanted = flat_gradient(objective.loss(family, model, noise), family), []
    with torch.no_grad():
        for parameter in family.parameters():
            for entry in parameter.data.view(-1):
                kept, sides = entry.clone(), []
                for sign in (1, -1):
                    entry.copy_(kept + sign * 1e-5)
                    sides.append(objective.loss(family, model, noise).value.item())
                entry.copy_(kept)
                wanted.append((sides[0] - sides[1]) / 2e-5)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert float((got - wanted).abs().max()) < 1e-6 * (1 + float(wanted.abs().max()))


def test_alpha_zero_is_the_elbo_with_the_same_noise():
    family, noise = built("full_rank")
    zero = RenyiPredictive(alpha=0).resolve(REGRESSION.model, family)
    for name in ("entropy", "reparameterised"):
        ours = RenyiPredictive(alpha=0, estimator=name).loss(family, REGRESSION.model, noise)
        elbo = Elbo(name).loss(family, REGRESSION.model, noise)
        assert ours.value.item() == pytest.approx(elbo.value.item(), rel=1e-13)
        assert torch.allclose(flat_gradient(ours, family), flat_gradient(elbo, family), rtol=1e-12)
    assert zero.value_kind == "lower_bound" and zero.renyi_order == 1 and zero.linear_in_draws
    assert RenyiPredictive().renyi_order is None and not RenyiPredictive().linear_in_draws


def test_it_is_not_the_other_renyi_objective():
    # at the exact posterior the one is stationary at every order, the other not
    family, _ = built("full_rank")
    family.start_at(REGRESSION.mean, torch.linalg.cholesky(REGRESSION.covariance))
    noise = grid_noise(family.noise_spec, 40)
    size = {}
    for spec in ("renyi(alpha=0.5, estimator=reparameterised)", "renyi_predictive(alpha=0.5)"):
        objective = registry.build("objectives", spec).resolve(REGRESSION.model, family)
        size[spec] = float(flat_gradient(objective.loss(family, REGRESSION.model, noise), family).abs().max())
    other, ours = size.values()
    assert other < 0.02 < 0.2 < ours


def test_estimators_of_the_prior_part_agree_in_the_mean(tools):
    family, _ = built("full_rank")
    objectives = [RenyiPredictive(alpha=0.6, estimator=name) for name in ("entropy", "reparameterised")]
    found = [
        tools.replicated_gradient(objective, REGRESSION.model, family, 4, 4000, seed)[0]
        for seed, objective in enumerate(objectives)
    ]
    assert tools.same_mean(*found)
    assert float(found[0].mean(0).abs().max()) > 0.1


@pytest.mark.parametrize(("alpha", "draws"), [(0.1, 8), (0.1, 32), (0.5, 32)])
def test_bias_over_draws_is_about_what_is_said(alpha, draws, generator):
    # a datum whose log likelihood under q is normal with sd one: the bias is alpha / 2K to first order
    a = torch.randn(20_000, draws, 1, generator=generator, dtype=torch.float64)
    from vifamily.numerics.soft_routing import power_value

    value = power_value(a, torch.zeros(draws, dtype=torch.float64), alpha)[:, 0]
    bias, error = float(value.mean()) + alpha / 2, float(value.std()) / math.sqrt(20_000)
    assert bias == pytest.approx(alpha / (2 * draws), abs=5 * error + 0.4 * alpha**2 / draws)
    assert bias > -5 * error


def test_families_without_density_are_refused_unless_they_are_points():
    for spec in ("implicit",):
        family = registry.build("families", spec).build(LatentSpec(2), generator=torch.Generator().manual_seed(0))
        with pytest.raises(IncompatibleError, match="log density|entropy|finite"):
            RenyiPredictive().resolve(REGRESSION.model, family)
    with pytest.raises(IncompatibleError, match="log likelihood per datum"):
        RenyiPredictive().resolve(targets.correlated_normal().model, built("mean_field")[0])


def test_one_draw_of_a_continuous_family_is_refused():
    family, noise = built("mean_field")
    with pytest.raises(ConfigError, match="draws=2"):
        RenyiPredictive(estimator="entropy").loss(family, REGRESSION.model, noise[:1])
    with pytest.raises(NotAvailableError, match="resolve"):
        RenyiPredictive().loss(built("ensemble(size=3)")[0], REGRESSION.model, NOISE)


BAD = {
    "negative": {"alpha": -0.1},
    "infinite": {"alpha": math.inf},
    "no number": {"alpha": "half"},
    "truth": {"alpha": True},
    "unit": {"unit": "token"},
    "warmup": {"warmup": -1, "start": 0.1},
    "warmup alone": {"warmup": 10},
    "start alone": {"start": 0.1},
    "start": {"start": -1.0, "warmup": 10},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_refused(name):
    with pytest.raises(ConfigError, match=r"renyi_predictive\(|ramp of alpha"):
        RenyiPredictive(**BAD[name])


# --- units ------------------------------------------------------------------------------------------------------------
IDS = torch.tensor([3, 1, 3, 7, 1, 1, 7, 3])
Y = torch.tensor([0.5, -1.0, 0.2, 2.0, -0.5, -1.5, 1.0, 0.9], dtype=torch.float64)


def grouped_by_hand(z, alpha, members):
    likelihood = location(Y).log_likelihood(z)
    out = 0.0
    for id_ in (1, 3, 7):
        out += -(torch.logsumexp(alpha * likelihood[:, id_ == IDS].sum(1), 0) - math.log(members)) / alpha
    return out


def test_a_group_is_one_unit():
    model, family = location(Y, IDS, prior_sd=2.0), ensemble(4)
    objective = RenyiPredictive(alpha=0.6, unit="group").resolve(model, family)
    loss, z = objective.loss(family, model, NOISE), family(NOISE).z
    prior = -torch.distributions.Normal(0.0, 2.0).log_prob(z.double()).mean()
    assert loss.value.item() == pytest.approx((grouped_by_hand(z, 0.6, 4) + prior).item(), rel=1e-9)
    per_datum = RenyiPredictive(alpha=0.6).resolve(model, family).loss(family, model, NOISE)
    assert abs(per_datum.value.item() - loss.value.item()) > 0.01
    check_gradient(objective, family, NOISE, model)


def test_texts_name_groups_too_and_order_is_that_of_the_sorted_ids():
    names = {1: "a", 3: "b", 7: "c"}
    model = location(Y, [names[i] for i in IDS.tolist()])
    assert model.group_names == ("a", "b", "c") and model.num_groups == 3
    assert model.groups_of(None)[0].tolist() == [1, 0, 1, 2, 0, 0, 2, 1]
    assert Capability.GROUPS in model.capabilities


@pytest.mark.parametrize("unit", ["datum", "group"])
def test_minibatches_of_whole_groups_are_unbiased(unit):
    # groups of unequal size: each is as likely in a batch, so sums are scaled by numbers of groups
    model, family = location(Y, IDS), ensemble(3)
    objective = RenyiPredictive(alpha=0.7, unit=unit).resolve(model, family)
    source = model.batches(3, seed=4)
    batches = [source.at(step) for step in range(3)]
    assert sorted(batch.size for batch in batches) == [2, 3, 3]
    assert all(batch.num_groups == 1 and model.scale(batch) == 3.0 for batch in batches)
    parts = [objective.loss(family, model, NOISE, batch) for batch in batches]
    whole = objective.loss(family, model, NOISE)
    assert torch.stack([p.value for p in parts]).mean().item() == pytest.approx(whole.value.item(), rel=1e-12)
    gradient = torch.stack([flat_gradient(p, family) for p in parts]).mean(0)
    assert torch.allclose(gradient, flat_gradient(whole, family), rtol=1e-10)


def test_batches_that_cut_groups_are_told_apart():
    model = location(Y, IDS)
    whole, cut = model.batch_at(torch.tensor([3, 6])), model.batch_at(torch.tensor([0, 1, 2, 3]))
    assert whole.num_groups == 1 and model.scale(whole) == 3.0
    assert cut.num_groups is None and model.scale(cut) == 2.0
    with pytest.raises(NotAvailableError, match="cuts a group"):
        model.groups_of(cut)
    with pytest.raises(NotAvailableError, match=r"LikelihoodModel\(\.\.\., groups=ids\)"):
        location(Y).groups_of(None)


def test_groups_that_cannot_be_read_are_refused():
    with pytest.raises(DataError, match="8 data, got 3 ids"):
        location(Y, IDS[:3])
    with pytest.raises(DataError, match="one integer or text per datum"):
        location(Y, IDS / 2)
    with pytest.raises(ConfigError, match="batch_size=1 holds none"):
        location(Y, IDS).batches(1, seed=0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(Y), batch_size=2)
    with pytest.raises(ConfigError, match="DataLoader"):
        location(loader, IDS)


def test_groups_are_needed_for_units_of_groups():
    family = ensemble(3)
    with pytest.raises(IncompatibleError, match=r"data in groups \(groups=\)"):
        RenyiPredictive(unit="group").resolve(location(Y), family)


@pytest.mark.parametrize(("unit", "alpha"), [("datum", 0.8), ("group", 0.4), ("group", 0.5), ("group", 0.8)])
def test_conflict_between_groups_is_routed_by_group_only(unit, alpha):
    # half of the groups of 25 lie at 0.3 and half at -0.3, and all data have variance one: per datum nothing to
    # route. Two members at plus and minus t: t = 0.3 tanh(alpha 25 0.3 t), which is zero below alpha = 0.444
    ids = torch.arange(40).repeat_interleave(25)
    y = normal_data(25, 0.91).repeat(40) + 0.3 * (1 - 2 * (ids % 2).double())
    family = ensemble(2, spread=0.3)
    _, z = minimise(RenyiPredictive(alpha=alpha, unit=unit), location(y, ids), family, parameters=[family.points])
    wanted = 0.3 if unit == "group" else 0.0
    for _ in range(500):
        wanted = 0.3 * math.tanh(alpha * 25 * 0.3 * wanted)
    assert abs(float(z[0] - z[1])) / 2 == pytest.approx(wanted, abs=1e-3)
    assert (wanted > 0.1) == (unit == "group" and alpha > 0.444)


def test_a_grouped_model_moves_and_fits_with_minibatches():
    model = location(Y, IDS)
    moved = model.moved(device=torch.device("cpu"), dtype=torch.float32)
    assert moved.groups_of(None)[1] == 3 and moved.num_groups == 3
    posterior = vf.fit(
        model, "ensemble(size=2)", "renyi_predictive(alpha=0.5, unit=group)", batch_size=3, steps=20, seed=0
    )
    assert posterior.record.steps == 20


# --- ramp -------------------------------------------------------------------------------------------------------------
def test_ramp_counts_steps_in_its_state(generator):
    model, family = location(Y), ensemble(3)
    ramp = RenyiPredictive(alpha=0.8, start=0.05, warmup=4).resolve(model, family)
    state, seen = ramp.init_state(model, family, generator=generator), []
    for _ in range(6):
        loss = ramp.loss(family, model, NOISE, None, state)
        seen.append(loss.value.item())
        state = loss.state
    wanted = [0.05, 0.05 * 16**0.25, 0.2, 0.05 * 16**0.75, 0.8, 0.8]
    still = [RenyiPredictive(alpha=a).resolve(model, family).loss(family, model, NOISE).value.item() for a in wanted]
    assert seen == pytest.approx(still, rel=1e-12) and int(state) == 6
    assert ramp.loss(family, model, NOISE).value.item() == pytest.approx(still[-1], rel=1e-12)
    assert RenyiPredictive(alpha=1.0, start=0.0, warmup=4).alpha_at(1) == 0.25
    assert RenyiPredictive().init_state(model, family, generator=generator) is None


def test_no_fit_is_judged_before_the_ramp_is_over(tmp_path):
    model, phases = location(normal_data(50, 2.0)), []
    spec = "renyi_predictive(alpha=1.0, start=0.0, warmup=300)"
    options = {"family": "ensemble(size=4)", "objective": spec, "seed": 0}
    posterior = vf.fit(model, **options, steps=600, callbacks=lambda report: phases.append(report.phase))
    assert phases[:300] == ["warm-up"] * 300 and phases[300:400] == ["stage 1"] * 100
    short = vf.fit(model, **options, steps=100)
    assert any("200 steps before the end of the objective's warm-up" in note for note in short.record.notes)
    # a ramp is taken up where it was left
    folder = tmp_path / "ramp"
    vf.fit(model, **options, steps=200, checkpoint=folder, checkpoint_every=200)
    resumed = vf.fit(model, **options, steps=600, checkpoint=folder)
    assert torch.equal(resumed.family.points, posterior.family.points)


def test_members_that_meet_end_a_fit():
    # at alpha = 0 all members go to one point, and how close they are is nothing to wait for
    posterior = vf.fit(location(normal_data(50, 2.0)), "ensemble(size=4)", "renyi_predictive(alpha=0)", seed=0)
    assert posterior.record.converged and posterior.record.steps < 2000
    assert float(posterior.family.points.detach().std()) < 1e-3
