"""Compiled steps: the same numbers as torch's step by step, the same stops, and a reason where there are none."""

import subprocess
import sys

import pytest
import torch

from vifamily import checkpoint
from vifamily.errors import ConfigError, NonFiniteLossError
from vifamily.fit import fit, plan
from vifamily.models import Density, LikelihoodModel, Network, PyroModel
from vifamily.numerics import native
from vifamily.numerics.native import _library
from vifamily.numerics.threads import FEWEST_NUMBERS, few_threads
from vifamily.solvers import worth_compiling

DOUBLE = torch.float64
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
Y = (X @ torch.tensor([1.0, -1.0, 0.5], dtype=DOUBLE) > 0.2).to(DOUBLE)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def logistic():
    def log_likelihood(theta, data):
        logits = theta["w"] @ data["x"].T
        return data["y"] * logits - torch.nn.functional.softplus(logits)

    return LikelihoodModel((0.0, 2.0), log_likelihood, data={"x": X, "y": Y}, parameters={"w": ((3,), "real")})


def schools():
    import pyro
    import pyro.distributions as dist

    effect = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=DOUBLE)

    def program(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, 10.0), obs=y)

    return PyroModel(program, effect)


def network(weights="walsh_hadamard"):
    """A network whose diagonals, biases and noise are points of the model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    return Network(net, "gaussian", data=(X, Y[:, None]), weights=weights, include="*.weight")


def both(model, family="mean_field", objective="elbo", **options):
    out = []
    for compiled in (True, False):
        settings = {"draws": 2, "seed": 3, "steps": 260, **options}
        out.append(fit(model(), family, objective, "adam", compile=compiled, **settings))
    assert out[0].record.notes[-1] == "steps compiled"
    return out


CASES = {
    "likelihood": (logistic, "mean_field", {}),
    "minibatches": (logistic, "mean_field", {"batch_size": 8}),
    "restarts of full rank": (logistic, "full_rank", {"restarts": 2}),
    "low rank": (logistic, "low_rank(rank=1)", {}),
    "a Pyro program": (schools, "mean_field", {}),
    "point-estimated parameters": (network, "mean_field", {"batch_size": 8}),
    "several draws combined": (logistic, "mean_field", {"objective": "iwae", "draws": 4}),
    "a flow": (logistic, "flow(transforms=1, hidden=[4], bins=4)", {"steps": 60}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_losses_and_answer_as_torch(name):
    model, family, options = CASES[name]
    compiled, eager = both(model, family, **options)
    assert compiled.record.steps == eager.record.steps
    # the fit is stable, so that differences of rounding stay what they are
    for column, tolerance in (("loss", 1e-8), ("step_size", 0.0)):
        a, b = (torch.as_tensor(p.record.trace[column]) for p in (compiled, eager))
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())
    assert set(compiled.record.trace) == set(eager.record.trace)
    assert torch.allclose(compiled.draws(20), eager.draws(20), rtol=1e-6, atol=1e-8)
    assert compiled.record.gradient_snr == pytest.approx(eager.record.gradient_snr, rel=1e-6)


def test_it_converges_where_torch_does():
    compiled, eager = both(logistic, steps=None, draws=4)
    assert compiled.record.stop_reason == eager.record.stop_reason == "converged"
    assert compiled.record.steps == eager.record.steps
    assert compiled.record.rhat_iterates == pytest.approx(eager.record.rhat_iterates, rel=1e-4)
    assert compiled.record.mcse_iterates == pytest.approx(eager.record.mcse_iterates, rel=1e-4)


def breaking(z):
    # the gradient of the root is infinite at 0 and the root is NaN beyond: reached on the way to the mode at -3
    return -0.5 * (z[:, 0] + 3.0).square() + 0.0 * (z[:, 0] + 0.5).sqrt()


def test_a_loss_that_is_not_finite_stops_at_the_last_finite_step():
    errors = []
    for compiled in (True, False):
        model = Density(breaking, dim=1)
        start = torch.full((1,), 1.0, dtype=DOUBLE)
        with pytest.raises(NonFiniteLossError) as caught:
            fit(model, "mean_field", draws=1, seed=0, init=start, compile=compiled)
        errors.append(caught.value)
    assert errors[0].step == errors[1].step > 0
    assert errors[0].term == errors[1].term
    mean = [e.posterior.family.moments()[0] for e in errors]
    assert torch.isfinite(mean[0]).all()
    assert torch.allclose(mean[0], mean[1], rtol=1e-8)


def test_written_down_and_taken_up_again_it_goes_on_bit_for_bit(tmp_path):
    def run(folder, steps, **options):
        return fit(logistic(), "mean_field", draws=2, seed=1, steps=steps, checkpoint=folder, solver="adam", **options)

    run(tmp_path / "a", 130, compile=True, checkpoint_every=37)
    # the choice is that of the checkpoint, whatever would be chosen now
    taken_up = run(tmp_path / "a", 333)
    whole = run(tmp_path / "b", 333, compile=True)
    assert taken_up.record.notes[-1] == "steps compiled"
    assert taken_up.record.steps == 333
    assert torch.equal(taken_up.draws(9), whole.draws(9))
    assert checkpoint.read_if_any(tmp_path / "a")[1]["config"]["compile"] is True


def test_callbacks_see_blocks_and_checkpoints_keep_their_cadence(tmp_path):
    seen = []
    posterior = fit(logistic(), "mean_field", draws=1, seed=0, steps=250, compile=True, solver="adam",
                    callbacks=lambda r: seen.append(r.step), checkpoint=tmp_path, checkpoint_every=60)  # fmt: skip
    assert seen == [60, 100, 120, 180, 200, 240, 250]
    assert posterior.record.steps == 250
    assert len(posterior.record.trace["loss"]) == 250


# --- what is not compiled ---


def reason(model, **options):
    posterior = fit(model, "mean_field", draws=1, seed=0, steps=3, compile=True, solver="adam", **options)
    assert posterior.record.steps == 3
    (note,) = [n for n in posterior.record.notes if n.startswith("steps not compiled")]
    return note


def test_control_flow_that_depends_on_values_falls_back():
    def log_prob(z):
        return -0.5 * z.square().sum(-1) * (2.0 if bool(z[0, 0] > 0) else 1.0)

    assert "control flow" in reason(Density(log_prob, dim=2))


def test_an_operation_that_is_not_translated_falls_back():
    def log_prob(z):
        return -0.5 * z.square().sum(-1) + 0.0 * torch.special.i0(z).sum(-1)

    assert "aten.i0" in reason(Density(log_prob, dim=2))


@pytest.mark.parametrize("weights", ["dense", "walsh_hadamard"])
def test_points_of_a_network_are_still_fitted_where_it_falls_back(weights):
    # a layer of a network is registered under two names: both must hold the parameter again after the attempt
    model = network(weights)

    def likelihood(outputs, y):
        return -0.5 * (outputs - y).square().sum(-1) + 0.0 * torch.special.i0(outputs).sum(-1)

    model.likelihood = type(model)(model.weights.net, likelihood, (X, Y[:, None])).likelihood
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert "aten.i0" in reason(model)
    z = torch.zeros(1, model.dim, dtype=DOUBLE)
    for name, parameter in model.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name
    bias = dict(model.named_parameters())["weights.net.2.bias"]
    (gradient,) = torch.autograd.grad(model.log_joint(z, None).sum(), bias)
    assert float(gradient.abs()) > 0


def test_a_function_that_changes_from_call_to_call_is_not_believed():
    calls = [0.0]

    def log_prob(z):
        calls[0] += 1
        return -0.5 * z.square().sum(-1) * calls[0]

    assert "differs from torch's" in reason(Density(log_prob, dim=2))


def test_without_a_compiler_it_falls_back(monkeypatch, tmp_path):
    monkeypatch.setattr(_library.shutil, "which", lambda name: None)
    monkeypatch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path))
    assert "no C compiler" in reason(logistic())


def test_a_compiler_that_fails_falls_back(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "FLAGS", ("--no-such-option",))
    monkeypatch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path))
    assert "the C compiler failed" in reason(logistic())


def test_without_the_tracer_it_falls_back(monkeypatch):
    from torch.fx.experimental import proxy_tensor

    monkeypatch.delattr(proxy_tensor, "make_fx")
    assert "cannot be traced" in reason(logistic())


def test_another_solver_says_that_it_has_none():
    posterior = fit(logistic(), "mean_field", solver="lbfgs", seed=0, compile=True)
    assert "steps not compiled: this solver has no compiled steps" in posterior.record.notes


# --- the choice ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, True), ({"steps": 1499}, False), ({"steps": 1500}, True), ({"numbers": 200_001}, False),
     ({"parameters": 20_001}, False), ({"device": "cuda"}, False)],
)  # fmt: skip
def test_the_choice_follows_from_the_problem(change, expected):
    pays, why = worth_compiling(**{"numbers": 1000, "parameters": 50, "steps": None, **change})
    assert pays is expected
    assert why


def test_the_choice_is_told():
    short = fit(logistic(), "mean_field", solver="adam", seed=0, steps=20)
    assert "steps not compiled: 20 steps take less time than compiling" in short.record.notes
    watched = fit(logistic(), "mean_field", solver="adam", seed=0, steps=2000, callbacks=lambda report: True)
    assert watched.record.steps == 1
    assert any("every step" in note for note in watched.record.notes)
    assert "compiled   yes" in str(plan(logistic(), "mean_field", solver="adam"))
    assert "compiled   no: as asked" in str(plan(logistic(), "mean_field", solver="adam", compile=False))
    with pytest.raises(ConfigError, match="compile must be"):
        plan(logistic(), "mean_field", compile="yes")


# --- the cache ---

PROCESS = """
import subprocess, sys, torch
from vifamily.numerics import native
calls = []
real = subprocess.Popen
subprocess.Popen = lambda *a, **k: (calls.append(1), real(*a, **k))[1]
x = torch.ones(3, dtype=torch.float64)
loop = native.compile_loop(lambda a, e: ((a + e.exp(),), (a.sum(),)), carried=[x], sliced=[x])
assert not isinstance(loop, str), loop
print(len(calls), loop([x], [torch.zeros(2, 3, dtype=torch.float64)], count=2)[1][0].tolist())
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path))
    said = [
        subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert [s[0] for s in said] == ["1", "0"]
    assert said[0][1:] == said[1][1:] == ["[3.0,", "6.0]"]


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("VIFAMILY_CACHE_DIR", str(tmp_path))
    x = torch.ones(2, dtype=DOUBLE)
    loop = native.compile_loop(lambda a: ((2 * a,), ()), carried=[x], sliced=[])
    assert isinstance(loop, native.CompiledLoop)
    assert not list(tmp_path.glob("*.so"))


# --- threads ---


def test_threads_are_put_back_also_after_an_error():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="inside"), few_threads(10):
            assert torch.get_num_threads() == 1
            raise ValueError("inside")
        assert torch.get_num_threads() == 2
        with few_threads(FEWEST_NUMBERS):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
