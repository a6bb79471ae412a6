"""The loop: restarts, limits, interruptions, failures, what is reported, and what reaches trackers and terminals."""

import csv
import functools
import importlib
import io
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from vifamily import registry
from vifamily.errors import ConvergenceWarning, ModelError, NonFiniteLossError
from vifamily.fit import fit as any_fit
from vifamily.models import Density, LikelihoodModel
from vifamily.posterior import trace_of
from vifamily.trackers import CsvTracker

# the loop is tried with the solver that takes many small steps
fit = functools.partial(any_fit, solver="adam")

loop = importlib.import_module("vifamily.fit")  # the facade's `fit` hides the module
ROOT = Path(__file__).resolve().parents[1]
DOUBLE = torch.float64
CORRELATED = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=DOUBLE)
PRECISION = torch.linalg.inv(CORRELATED)
Y = torch.tensor([1.2, 0.7, 2.9, 1.4, 0.1, 2.2, 1.7, 0.6, 1.1, 2.0, 0.4, 1.9], dtype=DOUBLE)


def log_prob(z):
    return -0.5 * ((z @ PRECISION.to(z)) * z).sum(-1)


def target(**options):
    return Density(log_prob, dim=2, **options)


def regression():
    """Normal likelihood with unknown mean and sd."""

    def log_likelihood(theta, y):
        mu, sigma = theta["mu"].unsqueeze(-1), theta["sigma"].unsqueeze(-1)
        return -0.5 * ((y - mu) / sigma) ** 2 - sigma.log()

    def log_prior(theta):
        return -0.5 * (theta["mu"] / 10) ** 2 - theta["sigma"]

    return LikelihoodModel(log_prior, log_likelihood, data=Y, parameters={"mu": "real", "sigma": "positive"})


def state(family):
    return torch.cat([v.reshape(-1) for v in family.state_dict().values()])


def stop_after(step):
    return lambda report: report.step >= step


# --- the record ---


def test_the_record_says_what_was_done():
    posterior = fit(target(), "mean_field", "elbo", seed=3, steps=30, draws=4)
    record = posterior.record
    assert (record.objective, record.family, record.solver) == ("elbo(estimator=stl)", "mean_field", "adam")
    assert (record.estimator, record.seed, record.steps, record.draws_per_step) == ("stl", 3, 30, 4)
    assert (record.stop_reason, record.converged, record.non_finite) == ("max_steps", False, 0)
    assert record.seconds > 0
    assert record.versions["torch"] == torch.__version__.split("+")[0] or record.versions["torch"] == torch.__version__
    assert any("started at a Gaussian approximation" in note for note in record.notes)
    assert posterior.config["seed"] == 3
    assert not any(p.requires_grad for p in posterior.family.parameters())


def test_the_trace_has_a_row_for_each_step_of_a_short_fit():
    reports = []
    record = fit(target(), "mean_field", seed=0, steps=25, callbacks=reports.append).record
    assert record.trace["step"].tolist() == list(range(1, 26))
    assert record.trace["loss"].tolist() == [report.loss[0] for report in reports]
    assert record.trace["term:log_q"].tolist() == [report.terms["log_q"] for report in reports]
    assert {len(column) for column in record.trace.values()} == {25}
    assert bool((record.trace["loss_error"] >= 0).all())


def test_a_long_trace_is_thinned_to_means_of_blocks():
    class Steps:
        losses = torch.arange(4500.0, dtype=DOUBLE).unsqueeze(-1)
        step_sizes = torch.full((4500,), 0.5, dtype=DOUBLE)
        terms = {"a": 2 * torch.arange(4500.0, dtype=DOUBLE)}

    trace = trace_of(Steps(), 0)
    assert len(trace["step"]) == 1500 <= 2000
    assert trace["step"][:2].tolist() == [3, 6]
    assert trace["step"][-1] == 4500
    assert trace["loss"][:2].tolist() == [1.0, 4.0]
    assert trace["term:a"][:2].tolist() == [2.0, 8.0]


def test_the_loss_is_the_negative_bound():
    # exact evidence of a normalised Gaussian is one; full rank reaches it
    model = Density(lambda z: log_prob(z) - 0.5 * math.log(4 * math.pi**2 * 0.64), dim=2)
    record = fit(model, "full_rank", seed=0).record
    assert record.stop_reason == "converged"
    assert record.converged
    assert record.restart_losses[0] == pytest.approx(0, abs=1e-3)
    assert record.rhat_iterates < 1.1


def test_auto_takes_a_family_by_size_and_says_so():
    record = fit(target(), seed=0, steps=2).record
    assert record.family == "full_rank"
    assert any("full_rank chosen" in note for note in record.notes)
    wide = Density(lambda z: -0.5 * (z**2).sum(-1), dim=101)
    assert fit(wide, seed=0, steps=2, init=torch.zeros(101)).record.family == "mean_field"


def test_a_fit_repeats_and_seeds_differ():
    first, again, other = (fit(target(), "mean_field", seed=s, steps=40, init="auto") for s in (1, 1, 2))
    assert torch.equal(state(first.family), state(again.family))
    assert not torch.equal(state(first.family), state(other.family))


def test_the_grad_mode_of_the_caller_does_not_matter():
    usual = fit(target(), "mean_field", seed=1, steps=20)
    with torch.no_grad():
        without = fit(target(), "mean_field", seed=1, steps=20)
    assert torch.equal(state(usual.family), state(without.family))


def test_a_problem_may_be_named_or_given():
    named = fit("banana", "mean_field", seed=0, steps=5)
    given = fit(registry.build("problems", "banana"), "mean_field", seed=0, steps=5)
    assert named.problem.name == given.problem.name == "banana"
    assert torch.equal(state(named.family), state(given.family))


# --- restarts ---


class OneByOne(loop.FitLoop):
    """Runs every restart as a fit of its own, with the streams it has among the others."""

    def _groups(self):
        return [[r] for r in range(self.restarts)]


@pytest.mark.parametrize("family", ["mean_field", "full_rank", "mixture(components=2)"])
def test_restarts_run_together_are_the_fits_they_would_be_alone(family, monkeypatch):
    options = {"seed": 5, "restarts": 3, "steps": 40, "draws": 3}
    together = fit("banana", family, **options)
    monkeypatch.setattr(loop, "FitLoop", OneByOne)
    apart = fit("banana", family, **options)
    for a, b in zip(together.restarts, apart.restarts, strict=True):
        assert torch.allclose(state(a), state(b), atol=1e-8, rtol=1e-8)
    np.testing.assert_allclose(together.record.restart_losses, apart.record.restart_losses, atol=1e-8)
    assert together.record.best_restart == apart.record.best_restart


def test_the_best_restart_is_returned():
    # two far modes, one of them holding e^4 as much: a mean-field fit sits on one
    def two_modes(z):
        return torch.logsumexp(torch.stack([-0.5 * (z[:, 0] - 20) ** 2 + 4, -0.5 * (z[:, 0] + 20) ** 2]), 0)

    def sample_prior(n, generator):
        return 20 * torch.sign(torch.randn(n, 1, generator=generator, dtype=DOUBLE))

    model = Density(two_modes, dim=1, sample_prior=sample_prior)
    posterior = fit(model, "mean_field", seed=1, restarts=6, steps=150)
    losses = posterior.record.restart_losses
    means = [float(f.moments()[0]) for f in posterior.restarts]
    assert {round(m / 20) for m in means} == {-1, 1}
    assert posterior.record.best_restart == int(np.argmin(losses))
    assert float(posterior.family.moments()[0]) == pytest.approx(20, abs=0.2)
    assert max(losses) - min(losses) == pytest.approx(4, abs=0.2)
    assert posterior.record.trace["loss"][-1] == pytest.approx(min(losses), abs=0.5)
    assert len(posterior.restarts) == posterior.record.num_restarts == 6


def test_restarts_with_parameters_of_the_model_do_not_share_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_tau = nn.Parameter(torch.zeros((), dtype=DOUBLE))

        def forward(self, z):
            prior = -0.5 * (z[:, 0] / self.log_tau.exp()) ** 2 - self.log_tau
            return prior - 0.5 * (3.0 - z[:, 0]) ** 2

    def tau(**options):
        posterior = fit(Density(Scaled(), dim=1), "mean_field", seed=2, steps=80, **options)
        return float(posterior.model.function.log_tau.detach()), posterior.record

    first, _ = tau()
    best, record = tau(restarts=3)
    assert record.steps == 80
    assert len(set(record.restart_losses)) == 3
    assert all(math.isfinite(loss) for loss in record.restart_losses)
    if record.best_restart == 0:
        assert best == pytest.approx(first, abs=1e-8)
    assert best != 0.0


# --- limits ---


def test_a_step_cap_is_kept_without_a_warning():
    record = fit(target(), "mean_field", seed=0, steps=7).record
    assert (record.steps, record.stop_reason, record.converged) == (7, "max_steps", False)


def test_a_fit_that_nobody_capped_warns_when_it_does_not_converge(monkeypatch):
    monkeypatch.setattr(loop, "_MOST_STEPS", 12)
    with pytest.warns(ConvergenceWarning, match=r"stopped after 12 steps \(max_steps\)") as caught:
        fit(target(), "mean_field", seed=0)
    assert caught[0].filename == __file__


def test_a_callback_ends_the_fit():
    seen = []
    record = fit(target(), "mean_field", seed=0, callbacks=[seen.append, stop_after(9)]).record
    assert (record.steps, record.stop_reason, record.converged) == (9, "callback", False)
    assert [report.step for report in seen] == list(range(1, 10))


def test_a_time_limit_ends_the_fit():
    record = fit(target(), "mean_field", seed=0, time_limit=1e-4).record
    assert record.stop_reason == "time_limit"
    assert record.steps >= 1


# --- interruptions ---


def test_an_interruption_in_a_callback_returns_the_posterior_so_far():
    def interrupt(report):
        if report.step == 40:
            raise KeyboardInterrupt

    interrupted = fit(target(), "mean_field", seed=0, callbacks=interrupt)
    capped = fit(target(), "mean_field", seed=0, steps=40)
    assert interrupted.record.stop_reason == "interrupted"
    assert interrupted.record.steps == 40
    assert torch.equal(state(interrupted.family), state(capped.family))
    assert interrupted.sample(10)["z"].shape == (10, 2)


class Pressing:
    """A density inside which Ctrl-C is pressed, once a callback has seen a step."""

    def __init__(self, step, times):
        self.step, self.times = step, times
        self.last = 0

    def __call__(self, z):
        if self.last == self.step:
            while self.times:
                self.times -= 1
                signal.raise_signal(signal.SIGINT)
        return log_prob(z)

    def watch(self, report):
        self.last = report.step


@pytest.mark.parametrize(("times", "steps"), [(1, 16), (2, 15)], ids=["finishes the step", "cuts the step short"])
def test_ctrl_c_in_the_middle_of_a_step(times, steps, tmp_path):
    density = Pressing(15, times)
    options = {"seed": 0, "checkpoint": tmp_path}
    record = fit(Density(density, dim=2), "mean_field", callbacks=density.watch, **options).record
    assert (record.stop_reason, record.steps) == ("interrupted", steps)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # a step cut in two is in no checkpoint; a whole one is, and the fit goes on from it
    assert (tmp_path / "checkpoint.json").exists() is (times == 1)
    resumed = fit(target(), "mean_field", steps=25, **options)
    assert torch.equal(state(resumed.family), state(fit(target(), "mean_field", seed=0, steps=25).family))


def test_a_real_signal_from_outside(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time, warnings
        warnings.filterwarnings("ignore", message=r"\\s*ArviZ")
        import torch, vifamily as vf
        model = vf.models.Density(lambda z: -0.5 * (z**2).sum(-1), dim=2)
        def slow(report):
            print(report.step, flush=True)
            time.sleep(0.02)
        posterior = vf.fit(model, "mean_field", solver="adam", seed=0, callbacks=slow, checkpoint=sys.argv[1])
        record, draws = posterior.record, posterior.sample(5)["z"]
        print("done", record.stop_reason, record.steps, len(draws), flush=True)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "saved")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    lines = []
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        for line in process.stdout:
            lines.append(line.split())
            if line.strip() == "10":
                process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    _, reason, steps, draws = lines[-1]
    assert (reason, draws) == ("interrupted", "5")
    assert 10 <= int(steps) < 100
    assert int(steps) == int(lines[-2][0])
    assert (tmp_path / "saved" / "checkpoint.json").exists()


# --- failures ---


def test_a_non_finite_loss_gives_the_last_finite_posterior():
    def wall(z):
        return z[:, 0] + torch.where(z[:, 0] > 6, torch.nan, 1.0) * z[:, 0]

    model = Density(wall, dim=1)
    with pytest.raises(NonFiniteLossError) as caught:
        fit(model, "mean_field", seed=0, init=torch.zeros(1), solver="adam(step_size=0.2)")
    error = caught.value
    assert error.step > 0
    assert error.term == "log_joint"
    assert error.parameter in {"loc", "log_scale"}
    posterior = error.posterior
    assert posterior.record.stop_reason == "non_finite"
    assert (posterior.record.non_finite, posterior.record.steps) == (1, error.step)
    assert bool(torch.isfinite(posterior.draws(50)).all())
    assert len(posterior.record.trace["loss"]) == error.step


def test_a_failing_model_keeps_its_cause_and_the_state_before(tmp_path):
    calls = []

    def breaks(z):
        calls.append(1)
        if len(calls) > 30:
            raise ZeroDivisionError("a bug of the user's")
        return log_prob(z)

    with pytest.raises(ModelError, match="ZeroDivisionError: a bug of the user's") as caught:
        fit(
            Density(breaks, dim=2),
            "mean_field",
            seed=0,
            init=torch.zeros(2),
            checkpoint=tmp_path,
            checkpoint_every=1000,
            compile=False,
        )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert any(str(tmp_path) in note for note in caught.value.__notes__)
    assert (tmp_path / "checkpoint.json").exists()


def test_a_failing_callback_keeps_the_state_too(tmp_path):
    def breaks(report):
        if report.step == 20:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(target(), "mean_field", seed=0, callbacks=breaks, checkpoint=tmp_path)
    resumed = fit(target(), "mean_field", seed=0, steps=30, checkpoint=tmp_path)
    whole = fit(target(), "mean_field", seed=0, steps=30)
    assert torch.equal(state(resumed.family), state(whole.family))


# --- what is told to others ---


def test_the_csv_tracker_gets_every_step(tmp_path):
    path = tmp_path / "trace.csv"
    record = fit(target(), "mean_field", seed=0, steps=20, tracker=CsvTracker(path, every=2)).record
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(2, 21, 2))
    assert [float(row["loss"]) for row in rows] == record.trace["loss"][1::2].tolist()
    assert set(rows[0]) == {"step", "loss", "step_size", "log_joint", "log_q"}


def test_a_tracker_is_told_the_configuration_and_always_closed():
    class Mine:
        def __init__(self):
            self.seen, self.closed = [], 0

        def start(self, config):
            self.config = dict(config)

        def log(self, step, values):
            self.seen.append(step)

        def finish(self):
            self.closed += 1

    def breaks(report):
        if report.step == 3:
            raise ZeroDivisionError

    mine = Mine()
    with pytest.raises(ZeroDivisionError):
        fit(target(), "mean_field", seed=8, tracker=mine, callbacks=breaks)
    assert mine.config["seed"] == 8
    assert mine.config["family"] == "mean_field"
    assert (mine.seen, mine.closed) == ([1, 2, 3], 1)


def test_the_progress_line_on_a_terminal(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=150, color_system=None, _environ={})
    real = loop.FitProgress
    monkeypatch.setattr(loop, "FitProgress", lambda **options: real(console=screen, **options))
    fit(target(), "mean_field", seed=0, steps=30)
    shown = screen.file.getvalue()
    assert "30/30 at most" in shown
    assert "stage 1" in shown
    assert "step size 0.0" in shown
    assert " +- " in shown


def test_no_progress_line_off_a_terminal(capsys):
    fit(target(), "mean_field", seed=0, steps=3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# --- precision, devices, data ---


@pytest.mark.parametrize("restarts", [1, 2])
def test_single_precision(restarts):
    posterior = fit(
        target(dtype=torch.float32), "full_rank", seed=0, restarts=restarts, steps=None if restarts == 1 else 60
    )
    assert posterior.record.converged is (restarts == 1)
    assert posterior.draws(3).dtype == torch.float32
    _, covariance = posterior.family.moments()
    assert torch.allclose(covariance.double(), CORRELATED, atol=0.02)


@pytest.mark.parametrize("model", [target, regression], ids=["density", "likelihood"])
def test_a_model_is_moved_to_the_precision_asked_for(model):
    made = model()
    posterior = fit(made, "mean_field", seed=0, steps=5, dtype=torch.float32)
    assert posterior.draws(3).dtype == torch.float32
    assert made.dtype == torch.float64
    assert made.log_joint(torch.zeros(1, 2, dtype=DOUBLE)).dtype == torch.float64
    assert posterior.model.log_joint(posterior.draws(3)).dtype == torch.float32


def test_a_density_whose_function_cannot_follow_is_evaluated_where_it_was():
    model = Density(lambda z: -0.5 * ((z @ PRECISION) * z).sum(-1), dim=2)
    posterior = fit(model, "full_rank", seed=0, steps=20, dtype=torch.float32)
    z = posterior.draws(4)
    assert z.dtype == torch.float32
    assert torch.allclose(posterior.model.log_joint(z).double(), model.log_joint(z.double()), atol=1e-5)


def test_minibatches_reach_the_answer_of_all_data():
    whole = fit(regression(), "mean_field", seed=0)
    batches = fit(regression(), "mean_field", seed=0, batch_size=5, draws=8, steps=2000)
    (mean, covariance), (other, other_covariance) = whole.family.moments(), batches.family.moments()
    sd, other_sd = covariance.diagonal().sqrt(), other_covariance.diagonal().sqrt()
    assert whole.record.converged
    assert batches.record.dropped_per_epoch == 2
    assert float(((other - mean) / sd).abs().max()) < 0.1
    assert float((other_sd / sd).log().abs().max()) < 0.1


# --- local latents ---

GROUPS = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0, 2.5, -0.5], dtype=DOUBLE)


def random_effects():
    """mu ~ normal(0, 5), a_i ~ normal(mu, 1), y_i ~ normal(a_i, 1): everything is Gaussian."""

    def log_local(theta, local, y):
        a = local["a"]
        return -0.5 * (a - theta["mu"].unsqueeze(-1)) ** 2 - 0.5 * (y - a) ** 2 - math.log(2 * math.pi)

    return LikelihoodModel(
        (0.0, 5.0), data=GROUPS, parameters={"mu": "real"}, local={"a": ((), "real")}, log_local=log_local
    )


def best_mean_field():
    """Mean of mu, sd of mu, means of a and their sd at the best mean-field Gaussian: means exact, sds conditional."""
    n = len(GROUPS)
    mean = float(GROUPS.sum() / 2) / (n / 2 + 1 / 25)
    return mean, (n + 1 / 25) ** -0.5, (mean + GROUPS) / 2, 0.5**0.5


@pytest.mark.parametrize("batch_size", [None, 4])
def test_local_latents_reach_the_best_mean_field_fit(batch_size):
    options = {} if batch_size is None else {"batch_size": batch_size}
    posterior = fit(random_effects(), "mean_field", seed=0, draws=8, steps=2000, **options)
    mean, sd, local_mean, local_sd = best_mean_field()
    shared, covariance = posterior.family.moments()
    assert float(shared[0]) == pytest.approx(mean, abs=0.1 * sd)
    assert float(covariance[0, 0].sqrt()) == pytest.approx(sd, rel=0.05)
    index = torch.arange(len(GROUPS))
    noise = torch.zeros(1, len(GROUPS), 1, dtype=DOUBLE)
    centre = posterior.family.per_datum(noise, index).z[0, :, 0]
    step = posterior.family.per_datum(noise + 1, index).z[0, :, 0]
    assert torch.allclose(centre, local_mean, atol=0.1 * local_sd)
    assert torch.allclose((step - centre).abs(), torch.full_like(centre, local_sd), rtol=0.1)


def test_an_encoder_amortises_local_latents():
    class Encoder(nn.Module):
        def forward(self, y):
            return y.unsqueeze(-1)

    posterior = fit(
        random_effects(), "mean_field", seed=0, draws=8, steps=1500, batch_size=4, encoder=Encoder(),
        local_family="mean_field",
    )  # fmt: skip
    mean, sd, local_mean, local_sd = best_mean_field()
    assert float(posterior.family.moments()[0][0]) == pytest.approx(mean, abs=0.3 * sd)
    noise = torch.zeros(1, len(GROUPS), 1, dtype=DOUBLE)
    # the best local mean is affine in y, which the encoder's head can say
    centre = posterior.family.per_datum(noise, GROUPS.unsqueeze(-1)).z[0, :, 0]
    assert torch.allclose(centre, local_mean, atol=0.3 * local_sd)
