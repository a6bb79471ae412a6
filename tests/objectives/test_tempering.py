"""Annealed and tempered targets: what is aimed at, at which step, and that no fit ends on the way."""

import pytest
import torch

import vifamily as vf
from vifamily import registry
from vifamily.errors import ConfigError, IncompatibleError, SpecError
from vifamily.objectives import Annealed, Elbo, Renyi, RocArc, Tempered
from vifamily.objectives._tempering import TemperedModel, packed, unpacked
from vifamily.solvers._adam_run import AdamRun
from vifamily.testing import targets
from vifamily.testing._tools import descend, flat_gradient, grid_noise
from vifamily.types import Capability

TARGET = targets.linear_regression()
NOISE = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_at_temperature_one_it_is_the_objective_itself(tools):
    family = tools.gaussian([0.2, -0.3], [0.5, 0.7])
    for part in ("joint", "likelihood"):
        ours = Tempered("elbo", part=part, estimator="stl").loss(family, TARGET.model, NOISE)
        theirs = Elbo("stl").loss(family, TARGET.model, NOISE)
        assert torch.allclose(ours.value, theirs.value, rtol=1e-12)
        assert torch.allclose(flat_gradient(ours, family), flat_gradient(theirs, family), atol=1e-11)


@pytest.mark.parametrize("part", ["joint", "likelihood"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_tempered_answer_on_a_normal_posterior(part, temperature, tools):
    # joint: T times the covariance; likelihood: precision of the prior plus that of the data over T
    prior_mean, prior_sd = TARGET.model.gaussian_prior()
    prior_precision = torch.diag(prior_sd**-2)
    data_precision = torch.linalg.inv(TARGET.covariance) - prior_precision
    if part == "joint":
        covariance, mean = temperature * TARGET.covariance, TARGET.mean
    else:
        covariance = torch.linalg.inv(prior_precision + data_precision / temperature)
        pull = torch.linalg.inv(TARGET.covariance) @ TARGET.mean - prior_precision @ prior_mean
        mean = covariance @ (prior_precision @ prior_mean + pull / temperature)
    family = tools.gaussian(TARGET.mean, [1.0, 1.0], "full_rank")
    objective = Tempered("elbo", temperature, part, "entropy")
    descend(objective, family, TARGET.model, grid_noise(family.noise_spec, 12), steps=400)
    found_mean, found_covariance = (part.detach() for part in family.moments())
    assert torch.allclose(found_mean, mean, atol=0.02)
    assert torch.allclose(found_covariance, covariance, rtol=0.03, atol=0.01)
    assert not objective.targets_posterior and f"temperature {temperature:g}" in objective.notes[-1]


def test_tempered_likelihood_is_the_beta_elbo(tools):
    family, beta = tools.gaussian([0.2, -0.3], [0.5, 0.7]), 4.0
    loss = Tempered("elbo", beta, "likelihood", "analytic_kl").loss(family, TARGET.model, NOISE)
    draw = family(NOISE)
    likelihood = TARGET.model.log_likelihood(draw.z).sum(-1).mean()
    prior = torch.distributions.Independent(torch.distributions.Normal(*TARGET.model.gaussian_prior()), 1)
    mean, covariance = family.moments()
    own = torch.distributions.Independent(torch.distributions.Normal(mean, covariance.diagonal().sqrt()), 1)
    kl = torch.distributions.kl_divergence(own, prior)
    assert float(beta * loss.value) == pytest.approx((beta * kl - likelihood).item(), abs=1e-9)


@pytest.mark.parametrize("part", ["joint", "likelihood"])
def test_the_wrapper_tempers_every_way_to_the_joint(part):
    model, z = TARGET.model, NOISE
    tempered = TemperedModel(model, 0.3, part)
    batch = model.batches(4, seed=0).at(0)
    for which in (None, batch):
        parts = tempered.log_prior(z) + tempered.scale(which) * tempered.log_likelihood(z, which).sum(-1)
        assert torch.allclose(parts, tempered.log_joint(z, which))
    assert (Capability.GAUSSIAN_PRIOR in tempered.capabilities) == (part == "likelihood")
    assert tempered.dim == model.dim and tempered.num_data == model.num_data


# --- the schedule ---
def test_schedule():
    for schedule, middle in (("linear", 0.52), ("geometric", 0.2)):
        objective = Annealed(start=0.04, steps=10, schedule=schedule)
        assert [objective.beta(t) for t in (0, 5, 10, 99)] == pytest.approx([0.04, middle, 1, 1])
        assert objective.warmup_steps == 10


def test_the_state_carries_the_step_and_what_is_inside(tools):
    objective = Annealed(RocArc(estimator="dreg"), start=0.5, steps=4)
    family = tools.gaussian([0.2, -0.3], [0.5, 0.7])
    state = objective.init_state(TARGET.model, family, generator=torch.Generator())
    seen = []
    for _ in range(6):
        loss = objective.loss(family, TARGET.model, NOISE, None, state)
        seen.append(float(loss.terms["inverse_temperature"]))
        state = loss.state
    assert seen == pytest.approx([0.5, 0.625, 0.75, 0.875, 1, 1])
    step, inner = unpacked(state)
    assert step == 6 and inner.shape == () and torch.isfinite(inner)
    # from the end of the schedule on it is the objective itself
    own = RocArc(estimator="dreg").loss(family, TARGET.model, NOISE, None, inner)
    assert torch.allclose(objective.loss(family, TARGET.model, NOISE, None, state).value, own.value)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (1,)])
def test_states_of_any_shape_are_packed(shape):
    inner = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step, back = unpacked(packed(17, inner))
    assert step == 17 and torch.equal(back, inner)
    assert unpacked(packed(3, None)) == (3, None)


# --- fits ---
def test_no_fit_is_judged_before_the_schedule_ends():
    posterior = vf.fit("correlated_normal", "mean_field", "annealed(steps=700, start=0.2)", seed=0)
    assert posterior.record.solver == "adam" and posterior.record.converged
    assert posterior.record.steps >= 700 + 3 * 200
    assert posterior.sd().tolist() == pytest.approx([targets.mean_field_sd(1, 0.9)] * 2, rel=0.05)
    betas = posterior.record.trace["term:inverse_temperature"]
    assert betas[0] < 0.3 and betas[-1] == 1


def test_a_fit_that_ends_on_the_way_says_so():
    posterior = vf.fit("correlated_normal", "mean_field", "annealed(steps=500)", seed=0, steps=100)
    assert not posterior.record.converged
    assert any("400 steps before the end" in note for note in posterior.record.notes)
    assert any("tempered during the first 500 steps" in note for note in posterior.record.notes)


def test_a_fit_that_is_taken_up_again_goes_on_along_the_schedule(tmp_path):
    options = {"seed": 0, "family": "mean_field", "objective": "annealed(steps=60, start=0.2)"}
    whole = vf.fit("correlated_normal", **options, steps=100)
    vf.fit("correlated_normal", **options, steps=40, checkpoint=tmp_path, checkpoint_every=20)
    again = vf.fit("correlated_normal", **options, steps=100, checkpoint=tmp_path, checkpoint_every=20)
    assert torch.equal(whole.sd(), again.sd()) and torch.equal(whole.mean(), again.mean())


def test_stages_begin_after_the_warm_up():
    planned = vf.plan("correlated_normal", "mean_field", "annealed(steps=50)")
    from vifamily.loop import FitLoop

    loop = FitLoop(planned, seed=0, most_steps=400, restarts=1, init="auto", folder=None, every=1000, encoder=None,
                   local_family=None)  # fmt: skip
    run = loop.runs[0]
    assert isinstance(run, AdamRun) and run.monitor.first_step == 50 and not run.compiled
    phases = [run.step().phase for _ in range(60)]
    assert phases[:49] == ["warm-up"] * 49 and phases[50].startswith("stage 1")
    assert len(run.monitor.rows) == 2 and run.snapshots[0][0] == 50


def test_annealing_finds_both_modes_that_a_direct_descent_loses(tools):
    # a start on one side of two normals, where reverse KL alone stays
    model, source = targets.two_normals().model, torch.Generator().manual_seed(0)
    found = []
    for objective in (Elbo("stl"), Annealed("elbo", start=0.05, steps=600, estimator="stl")):
        family = tools.gaussian(2.0, 0.7)
        optimiser = torch.optim.Adam(family.parameters(), lr=0.02)
        state = objective.init_state(model, family, generator=source)
        for _ in range(900):
            optimiser.zero_grad()
            noise = torch.randn(16, 1, generator=source, dtype=torch.float64)
            loss = objective.loss(family, model, noise, None, state)
            loss.surrogate.backward()
            optimiser.step()
            state = loss.state
        found.append(float(family.moments()[1].detach().sqrt()))
    assert found[0] == pytest.approx(1.02, abs=0.15) and found[1] == pytest.approx(2.74, abs=0.3)


# --- refusals ---
BAD = [
    ("tempered(temperature=0)", SpecError, "positive number"),
    ("tempered(temperature=inf)", SpecError, "positive number"),
    ("tempered(part=prior)", SpecError, "part must be"),
    ("tempered(estimator=nothing)", SpecError, "no estimator"),
    ("tempered(of=elbo(estimator=stl), estimator=score)", SpecError, "no estimator"),
    ("annealed(start=0)", SpecError, "inverse temperature"),
    ("annealed(steps=0)", SpecError, "positive integer"),
    ("annealed(schedule=cosine)", SpecError, "schedule must be"),
    ("annealed(of=batch_and_match)", IncompatibleError, "descent of a loss"),
    ("annealed(of=3)", ConfigError, "must be an objective"),
]


@pytest.mark.parametrize(("spec", "error", "words"), BAD)
def test_wrong_options_are_refused(spec, error, words):
    with pytest.raises(error, match=words):
        registry.build("objectives", spec)


def test_what_each_takes_over_and_refuses():
    compound = Annealed(Renyi(-1.0))
    assert compound.value_kind == "upper_bound" and compound.renyi_order == -1.0 and compound.min_draws == 2
    assert list(Tempered(Elbo("stl")).estimators) == ["stl"]
    with pytest.raises(IncompatibleError, match="changes from step to step"):
        Annealed().for_fixed_draws("lbfgs")
    local = targets.local_normal().model
    lacking = Tempered(part="likelihood").missing(frozenset(local.capabilities), frozenset(Capability))
    assert "local latents" in lacking[0]
    narrow = frozenset({Capability.LOG_JOINT, Capability.SCORE})
    assert any("log prior" in part for part in Tempered(part="likelihood").missing(narrow, frozenset(Capability)))


def test_tempered_runs_on_fixed_draws_where_its_objective_does(tools):
    planned = vf.plan("correlated_normal", "full_rank", "tempered(temperature=2)")
    assert type(planned.solver).__name__ == "Lbfgs"
    posterior = vf.fit("correlated_normal", "full_rank", "tempered(temperature=2)", seed=0)
    assert posterior.covariance().flatten().tolist() == pytest.approx([2, 1.8, 1.8, 2], rel=0.03)
