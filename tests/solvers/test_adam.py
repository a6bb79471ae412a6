"""Adam without a step count: right answers from poor starts, honest stopping, and states that can be taken up again."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from vifamily import registry
from vifamily.errors import ConfigError, NonFiniteLossError
from vifamily.families._stack import StackedFamily
from vifamily.fit import fit
from vifamily.models import Density, LikelihoodModel
from vifamily.rng import NoiseStream, draw_noise, generator
from vifamily.solvers import Adam, Task
from vifamily.solvers._adam_run import AdamRun
from vifamily.solvers._stopping import StoppingRule
from vifamily.types import LatentSpec

DOUBLE = torch.float64
Y = torch.tensor([1.2, 0.7, 2.9, 1.4, 0.1, 2.2, 1.7, 0.6, 1.1, 2.0], dtype=DOUBLE)


def wide(dim, sd):
    """A prior much wider than the posterior, so that the start is poor."""
    sd = torch.as_tensor(sd, dtype=DOUBLE)
    return lambda n, generator: sd * torch.randn(n, dim, generator=generator, dtype=DOUBLE)


def conjugate_normal():
    def log_likelihood(theta, y):
        return -0.5 * (y - theta["mu"].unsqueeze(-1)) ** 2

    return LikelihoodModel((0.0, 1.0), log_likelihood, data=Y, parameters={"mu": "real"})


def moments(posterior):
    mean, covariance = posterior.family.moments()
    return mean, covariance.diagonal().sqrt()


# --- right answers ---


@pytest.mark.parametrize(("seed", "estimator"), [(0, "auto"), (1, "auto"), (2, "auto"), (3, "entropy")])
def test_one_draw_recovers_the_conjugate_normal(seed, estimator):
    posterior = fit(conjugate_normal(), "mean_field", f"elbo(estimator={estimator})", draws=1, seed=seed, init="prior")
    mean, sd = moments(posterior)
    exact_sd = (len(Y) + 1) ** -0.5
    assert posterior.record.converged
    assert float(sd) == pytest.approx(exact_sd, rel=0.02)
    assert float(mean) == pytest.approx(float(Y.sum()) * exact_sd**2, abs=0.02 * exact_sd)


def gaussian(mean, covariance):
    precision = torch.linalg.inv(covariance)
    return lambda z: -0.5 * (((z - mean) @ precision) * (z - mean)).sum(-1)


UNITS = torch.tensor([1e-4, 1.0, 1e4], dtype=DOUBLE)
CORRELATED = torch.tensor([[1.0, 0.95], [0.95, 1.0]], dtype=DOUBLE)
SHAPES = torch.tensor([0.7, 3.0, 20.0], dtype=DOUBLE)
# name: log density, start, family, optimal mean, optimal sd, posterior sd
TARGETS = {
    "badly scaled": (gaussian(UNITS, torch.diag(UNITS**2)), 3 * UNITS, "mean_field", UNITS, UNITS, UNITS),
    "correlated, mean field": (
        gaussian(torch.ones(2, dtype=DOUBLE), CORRELATED), 2.0, "mean_field",
        torch.ones(2, dtype=DOUBLE), torch.linalg.inv(CORRELATED).diagonal().rsqrt(), torch.ones(2),
    ),
    "correlated, full rank": (
        gaussian(torch.ones(2, dtype=DOUBLE), CORRELATED), 2.0, "full_rank", torch.ones(2, dtype=DOUBLE),
        torch.ones(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE),
    ),
    # E_q of a z - exp(z) is a m - exp(m + s^2 / 2): the best Gaussian has s^2 = 1 / a, m = log a - s^2 / 2
    "skewed": (lambda z: (SHAPES * z - z.exp()).sum(-1), 2.0, "mean_field", SHAPES.log() - 0.5 / SHAPES,
               SHAPES.rsqrt(), SHAPES.rsqrt()),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_converged_means_near_the_optimum(name):
    log_density, start, family, best_mean, best_sd, unit = TARGETS[name]
    model = Density(log_density, dim=len(best_mean), sample_prior=wide(len(best_mean), start))
    posterior = fit(model, family, solver="adam", draws=2, seed=4, init="prior", steps=8000)
    assert posterior.record.stop_reason == "converged"
    mean, sd = moments(posterior)
    assert float(((mean - best_mean) / unit).abs().max()) < 0.05
    assert float((sd / best_sd).log().abs().max()) < 0.05
    assert posterior.record.rhat_iterates < 1.1
    assert posterior.record.mcse_iterates < 0.02


def test_step_sizes_are_halved_from_the_first():
    posterior = fit(conjugate_normal(), "mean_field", "elbo", "adam(step_size=0.2)", draws=4, seed=0)
    sizes = list(dict.fromkeys(posterior.record.trace["step_size"].tolist()))
    # rows of the trace are means over several steps only in fits longer than the trace
    assert sizes[0] == 0.2
    assert len(sizes) >= 3
    assert all(b == a / 2 for a, b in zip(sizes, sizes[1:], strict=False))


def test_point_parameters_reach_maximum_likelihood():
    class Observed(nn.Module):
        """One y = 3 given z, with z ~ normal(0, tau): the evidence is largest at tau^2 = y^2 - 1."""

        def __init__(self):
            super().__init__()
            self.log_tau = nn.Parameter(torch.zeros((), dtype=DOUBLE))

        def forward(self, z):
            prior = -0.5 * (z[:, 0] / self.log_tau.exp()) ** 2 - self.log_tau
            return prior - 0.5 * (3.0 - z[:, 0]) ** 2

    model = Density(Observed(), dim=1)
    posterior = fit(model, "mean_field", solver="adam(model_step_size=1.0)", draws=8, seed=0, steps=4000)
    assert float(model.function.log_tau.detach().exp() ** 2) == pytest.approx(8.0, rel=0.1)
    mean, sd = moments(posterior)
    assert float(mean) == pytest.approx(3 * 8 / 9, rel=0.03)
    assert float(sd) == pytest.approx(math.sqrt(8 / 9), rel=0.05)


# --- a run on its own ---


def make_run(
    *, model=None, family="mean_field", objective="elbo", restarts=1, draws=2, seed=0, rule=None, step_size=0.05
):
    """A run of a small fit, made by hand."""
    model = Density(gaussian(torch.tensor([2.0, -1.0], dtype=DOUBLE), CORRELATED), dim=2) if model is None else model
    latent = LatentSpec(model.dim)
    entry = registry.build("families", family)
    members = [entry.build(latent, generator=generator(seed, "family", r)) for r in range(restarts)]
    held = members[0] if restarts == 1 else StackedFamily(members)
    loss = registry.build("objectives", objective).resolve(model, members[0])
    stream = NoiseStream(seed, held.noise_spec, draws=draws, restarts=restarts, balanced=loss.linear_in_draws)
    fixed = draw_noise(held.noise_spec, (32,), generator(seed, "monitor"))
    fixed = fixed.expand(restarts, *fixed.shape) if restarts > 1 else fixed
    task = Task(loss.loss, model, held, stream.at, lambda step: None, fixed, restarts, step_size)
    return AdamRun(task, rule or StoppingRule(), step_size, 0.2)


def test_the_average_is_the_mean_of_the_iterates_of_its_window():
    run = make_run(objective="elbo(estimator=entropy)", rule=StoppingRule(mcse=1e-9, rough=1e-9))
    iterates = []
    while run.monitor.stationary_from is None or run.step_count % 100 != 50:
        run.step()
        iterates.append(run.flat.value.clone())
    now, start = run.step_count, run.monitor.stationary_from
    assert run.stage == 0
    first = min((at for at, _ in run.snapshots), key=lambda at: abs(at - start))
    # iterates[i] is the state after step i + 1
    expected = torch.stack(iterates[first:now]).mean(0)
    assert now - first > 100
    assert torch.allclose(run.average()[0], expected, atol=1e-12)


def test_averages_are_much_closer_than_iterates():
    run = make_run(
        objective="elbo(estimator=entropy)", draws=1, rule=StoppingRule(stages=1, mcse=1e-9, rough=1e-9, stage=2500)
    )
    gaps = []
    while run.finished is None:
        run.step()
        gaps.append(run.flat.value.clone())
        if run.step_count == 2400:
            average = run.average()[0]
    last = torch.stack(gaps[1500:2400]).squeeze(1)
    # the family is exact in its mean: loc comes first among the parameters
    mean = torch.tensor([2.0, -1.0], dtype=DOUBLE)
    iterate_error = float((last[:, :2] - mean).square().mean().sqrt())
    assert float((average[0, :2] - mean).abs().max()) < 0.35 * iterate_error


def test_a_stage_that_takes_too_long_ends_with_a_note():
    rule = StoppingRule(stages=2, mcse=1e-9, rough=1e-9, stage=300)
    run = make_run(objective="elbo(estimator=entropy)", rule=rule, draws=1)
    while run.finished is None:
        report = run.step()
    assert report.finished == "smallest_step"
    assert run.step_count == 600
    assert len(run.notes) == 2
    for note, size in zip(run.notes, ("0.05", "0.025"), strict=True):
        assert f"step size {size}" in note
        assert "were not averaged well enough within 300 steps" in note or "did not become stationary" in note


def test_a_change_larger_than_the_tolerance_is_not_convergence():
    run = make_run(draws=8)
    run.stage, run.monitor.error, run.previous_error = 5, 0.001, 0.001
    run.previous = run.watch() + 1.0
    run._end_stage("done")
    assert run.finished is None
    assert run.change > 0.5
    run.previous, run.monitor.error = run.watch(), 0.001
    run._end_stage("done")
    assert run.finished == "converged"


def test_reports_count_steps_and_name_the_phase():
    run = make_run(restarts=2)
    for expected in (1, 2, 3):
        report = run.step()
        assert report.step == expected == run.step_count
        assert len(report.loss) == 2
        assert report.phase == "stage 1"
        assert report.step_size == 0.05
        assert {"log_joint", "log_q"} == set(report.terms)
        assert sum(report.terms.values()) == pytest.approx(sum(report.loss) / 2)
    assert run.losses.shape == (3, 2)
    assert {len(column) for column in run.terms.values()} == {3}


def test_restarts_are_the_fits_they_would_be_alone():
    together = make_run(restarts=3)
    members = together.task.family.members()
    for _ in range(60):
        together.step()
    for r in range(3):
        alone = make_run(restarts=1)
        task = alone.task
        stream = NoiseStream(0, task.family.noise_spec, draws=2, first_restart=r, balanced=True)
        single = AdamRun(dataclasses.replace(task, family=members[r], noise_at=stream.at), StoppingRule(), 0.05, 0.2)
        for _ in range(60):
            single.step()
        assert torch.allclose(single.flat.value[0], together.flat.value[r], atol=1e-10)
        assert torch.allclose(single.losses[:, 0], together.losses[:, r], atol=1e-10)


# --- states ---


def through_json(run):
    tensors, values = run.tensors()
    return {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(values, allow_nan=False))


def assert_same(a, b):
    first, second = a.tensors(), b.tensors()
    assert first[0].keys() == second[0].keys()
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    assert json.dumps(first[1]) == json.dumps(second[1])


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("at", [0, 37, 100, 260])
def test_a_state_taken_up_again_goes_on_bit_for_bit(restarts, at):
    # short stages, so that the last cut lies in the second one
    rule = StoppingRule(window=50, check=50, stage=200)
    whole, first = make_run(restarts=restarts, rule=rule), make_run(restarts=restarts, rule=rule)
    for _ in range(at):
        first.step()
    second = make_run(restarts=restarts, rule=rule)
    second.restore(*through_json(first))
    assert_same(second, first)
    for _ in range(at):
        whole.step()
    for _ in range(120):
        whole.step()
        second.step()
    assert_same(second, whole)
    if at == 260:
        assert second.stage >= 1
    first_out, second_out = whole.output(), second.output()
    assert json.dumps(first_out["losses"]) == json.dumps(second_out["losses"])
    assert first_out["gradient_snr"] == second_out["gradient_snr"]


def test_a_state_is_a_copy():
    run = make_run()
    run.step()
    kept, _ = run.tensors()
    before = {name: t.clone() for name, t in kept.items()}
    for _ in range(3):
        run.step()
    assert all(torch.equal(before[name], t) for name, t in kept.items())


def test_a_state_of_another_size_is_refused():
    tensors, values = make_run(restarts=2).tensors()
    with pytest.raises(ValueError, match="shape"):
        make_run().restore(tensors, values)


def test_output_leaves_the_run_where_it_was_when_nothing_was_done():
    run = make_run()
    before = run.flat.value.clone()
    out = run.output()
    assert torch.equal(run.flat.value, before)
    assert out["gradient_snr"] is None
    assert len(out["losses"]) == 1


# --- failures ---


def broken_after(limit):
    def log_prob(z):
        # a wall that the optimiser walks into, value and slope not finite beyond it
        return z[:, 0] + torch.where(z[:, 0] > limit, torch.nan, 1.0) * z[:, 0]

    return Density(log_prob, dim=1)


def test_a_non_finite_loss_stops_at_the_last_finite_state():
    run = make_run(model=broken_after(3.0), step_size=0.5)
    states = []
    with pytest.raises(NonFiniteLossError) as caught:
        while True:
            states.append(run.flat.value.clone())
            run.step()
    error = caught.value
    assert error.step == len(states) - 1 == run.step_count
    assert error.term == "log_joint"
    assert error.parameter in dict(run.task.family.named_parameters())
    assert torch.equal(run.flat.value, states[-1])
    assert run.losses.shape[0] == run.step_count
    assert bool(torch.isfinite(run.losses).all())
    assert f"step {error.step}: log_joint is not finite" in str(error)
    assert repr(error.parameter) in str(error)


def test_a_loss_whose_gradient_hides_the_fault_names_no_parameter():
    model = Density(lambda z: torch.where(z[:, 0] > -100, torch.nan, z[:, 0]), dim=1)
    with pytest.raises(NonFiniteLossError, match="log_joint is not finite; loss") as caught:
        make_run(model=model).step()
    assert caught.value.parameter is None


def test_a_gradient_that_is_not_finite_is_told_from_the_loss():
    # finite value, infinite slope
    model = Density(lambda z: z[:, 0] - (z[:, 0] - z[:, 0].detach()).abs().sqrt(), dim=1)
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite") as caught:
        make_run(model=model).step()
    assert (caught.value.step, caught.value.term) == (0, "the gradient")


def test_one_bad_restart_is_noticed():
    seen = []

    def log_prob(z):
        seen.append(1)
        out = -0.5 * (z**2).sum(-1)
        return torch.cat([out[:-1], out[-1:] * torch.nan]) if len(seen) > 3 else out

    run = make_run(model=Density(log_prob, dim=2), restarts=2)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        for _ in range(5):
            run.step()


def test_nothing_to_optimise_is_said():
    run = make_run()
    run.task.family.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to optimise"):
        AdamRun(run.task, StoppingRule(), 0.1, 0.2)


@pytest.mark.parametrize("name", ["step_size", "tolerance", "mcse", "model_step_size"])
@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, "x", True])
def test_settings_must_be_positive_numbers(name, value):
    with pytest.raises(ConfigError, match=rf"adam\({name}=\.\.\.\) must be a positive number"):
        Adam(**{name: value})
