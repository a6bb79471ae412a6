"""A fit killed at any step and taken up in a new process ends where it would have ended: the same bits."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from vifamily import checkpoint
from vifamily.errors import CheckpointError
from vifamily.fit import fit as any_fit
from vifamily.models import Density, LikelihoodModel
from vifamily.trackers import CsvTracker

# the loop is tried with the solver that takes many small steps
fit = functools.partial(any_fit, solver="adam")

ROOT = Path(__file__).resolve().parents[1]
DOUBLE = torch.float64

# Runs a fit of some kind; kills itself after a step, or says what came out to the last bit.
SCRIPT = textwrap.dedent(
    """
    import hashlib, json, os, signal, sys, time, warnings
    warnings.filterwarnings("ignore", message=r"\\s*ArviZ")
    import torch, vifamily as vf

    def run(kind, options, checkpoint=None, kill=None):
        def callback(report):
            if report.step == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if kill == -1:
                print(report.step, flush=True)
                time.sleep(0.05)  # the parent must be able to kill before the end, however busy the machine
        posterior = vf.fit(kind, solver="adam", callbacks=callback, checkpoint=checkpoint, **options)
        record = posterior.record
        digest = hashlib.sha256()
        for family in posterior.restarts or (posterior.family,):
            for name, value in family.state_dict().items():
                digest.update(name.encode() + value.numpy().tobytes())
        digest.update(b"".join(column.tobytes() for _, column in sorted(record.trace.items())))
        digest.update(posterior.draws(50).numpy().tobytes())
        return {"digest": digest.hexdigest(), "steps": record.steps, "reason": record.stop_reason,
                "losses": record.restart_losses, "best": record.best_restart, "snr": record.gradient_snr,
                "rhat": record.rhat_iterates, "mcse": record.mcse_iterates}

    kind, options, folder, kill = json.loads(sys.argv[1])
    if kill is not None:
        run(kind, options, folder, kill)
    else:
        print(json.dumps([run(kind, options, folder), run(kind, options)]))
    """
)


def process(kind, options, folder, kill):
    return [sys.executable, "-c", SCRIPT, json.dumps([kind, options, str(folder), kill])]


CASES = {
    "one": ("banana", {"family": "full_rank", "draws": 2, "seed": 3, "steps": 340}, 300),
    "three restarts": ("banana", {"family": "mean_field", "draws": 4, "seed": 4, "restarts": 3, "steps": 240}, 200),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_is_the_uninterrupted_fit(name, tmp_path):
    kind, options, last = CASES[name]
    options = {**options, "checkpoint_every": 20}
    at = random.Random(name).randrange(25, last)
    killed = subprocess.run(process(kind, options, tmp_path, at), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    _, meta = checkpoint.read(tmp_path)
    assert meta["runs"][0]["step"] == (at - 1) // 20 * 20
    out = subprocess.run(process(kind, options, tmp_path, None), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    resumed, whole = json.loads(out.stdout)
    assert resumed == whole
    assert resumed["steps"] == options["steps"]


def test_killed_from_outside_while_it_writes_all_the_time(tmp_path):
    options = {"family": "mean_field", "seed": 1, "steps": 40, "checkpoint_every": 1}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(process("banana", options, tmp_path, -1), cwd=ROOT, **pipes) as running:
        for line in running.stdout:
            if line.strip() == "12":
                time.sleep(random.Random(0).uniform(0.0, 0.05))
                running.kill()
                break
        running.stdout.read()
    assert running.returncode == -signal.SIGKILL
    out = subprocess.run(
        process("banana", options, tmp_path, None), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    resumed, whole = json.loads(out.stdout)
    assert resumed == whole


# --- in one process ---


def target(offset=0.0):
    return Density(lambda z: -0.5 * ((z - offset) ** 2).sum(-1), dim=2)


def state(posterior):
    return torch.cat([v.reshape(-1) for v in posterior.family.state_dict().values()])


def begin(folder, **options):
    settings = {"family": "mean_field", "seed": 2, "steps": 40, "draws": 3, **options}
    return fit(settings.pop("model", None) or target(), settings.pop("family"), checkpoint=folder, **settings)


def test_more_steps_go_on_from_fewer(tmp_path):
    begin(tmp_path)
    assert torch.equal(state(begin(tmp_path, steps=90)), state(begin(None, steps=90)))


def test_a_resumed_fit_sees_the_minibatches_it_would_have_seen(tmp_path):
    def log_likelihood(theta, y):
        sigma = theta["sigma"].unsqueeze(-1)
        return -0.5 * ((y - theta["mu"].unsqueeze(-1)) / sigma) ** 2 - sigma.log()

    def run(folder, **options):
        data = torch.linspace(-1.0, 3.0, 23, dtype=DOUBLE)
        parameters = {"mu": "real", "sigma": "positive"}
        model = LikelihoodModel(
            lambda t: -0.5 * t["mu"] ** 2 - t["sigma"], log_likelihood, data=data, parameters=parameters
        )
        return fit(model, "mean_field", seed=5, batch_size=5, checkpoint=folder, **options)

    run(tmp_path, steps=37)
    assert torch.equal(state(run(tmp_path, steps=70)), state(run(None, steps=70)))


def test_a_finished_fit_is_read_back_without_a_step(tmp_path):
    first = fit(target(), "full_rank", seed=0, checkpoint=tmp_path)
    steps = []
    again = fit(target(), "full_rank", seed=0, checkpoint=tmp_path, callbacks=steps.append)
    assert steps == []
    assert first.record.stop_reason == again.record.stop_reason == "converged"
    assert torch.equal(state(first), state(again))
    assert again.record.steps == first.record.steps
    assert again.record.seconds >= first.record.seconds


def test_the_time_limit_is_that_of_each_call(tmp_path):
    begin(tmp_path, steps=None, time_limit=0.2, compile=False)
    steps = []
    record = begin(tmp_path, steps=None, time_limit=0.2, callbacks=lambda r: steps.append(r.step)).record
    assert len(steps) > 1
    assert record.stop_reason in ("time_limit", "converged")


def test_restarts_that_follow_one_another_resume_too(tmp_path):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_tau = torch.nn.Parameter(torch.zeros((), dtype=DOUBLE))

        def forward(self, z):
            return -0.5 * (z[:, 0] / self.log_tau.exp()) ** 2 - self.log_tau - 0.5 * (3.0 - z[:, 0]) ** 2

    def run(folder, **options):
        return fit(Density(Scaled(), dim=1), "mean_field", seed=0, restarts=2, checkpoint=folder, steps=50, **options)

    calls = []

    def stop(report):
        calls.append(report.step)
        return len(calls) == 70  # step 20 of the second restart

    assert run(tmp_path, callbacks=stop).record.stop_reason == "callback"
    resumed, whole = run(tmp_path), run(None)
    assert torch.equal(state(resumed), state(whole))
    assert resumed.record.restart_losses == whole.record.restart_losses
    assert torch.equal(resumed.model.function.log_tau, whole.model.function.log_tau)


def test_the_tracker_file_has_every_step_once(tmp_path):
    begin(tmp_path / "saved", steps=30, tracker=CsvTracker(tmp_path / "a.csv"))
    begin(tmp_path / "saved", steps=55, tracker=CsvTracker(tmp_path / "a.csv"))
    begin(None, steps=55, tracker=CsvTracker(tmp_path / "b.csv"))
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


OTHERS = {
    "seed": {"seed": 3},
    "family": {"family": "full_rank"},
    "objective": {"objective": "renyi(alpha=0.5)"},
    "solver": {"solver": "adam(step_size=0.3)"},
    "restarts": {"restarts": 2},
    "draws": {"draws": 4},
    "dtype": {"dtype": torch.float32},
    "dim": {"model": Density(lambda z: -(z**2).sum(-1), dim=3)},
    "model": {"model": LikelihoodModel((torch.zeros(2, dtype=DOUBLE), 1.0), lambda z, y: -(y - z[:, :1]) ** 2,
                                       data=torch.zeros(3, dtype=DOUBLE), dim=2)},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_fit_is_refused_by_what_differs(name, tmp_path):
    begin(tmp_path)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=rf"belongs to another fit \(.*{name}: .* there, .* here"):
        begin(tmp_path, **OTHERS[name])
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "change",
    [{"model": target(1.0)}, {"init": torch.ones(2)}, {"init": "prior", "model": None}][:2],
    ids=["data", "init"],
)
def test_another_start_is_noticed(change, tmp_path):
    begin(tmp_path)
    with pytest.raises(CheckpointError, match="started from another point: the model or the data have changed"):
        begin(tmp_path, **change)


def test_a_folder_with_something_else_is_refused(tmp_path):
    checkpoint.write(tmp_path, {"a": torch.zeros(2)}, {"kind": "posterior"})
    with pytest.raises(CheckpointError, match="belongs to another fit"):
        begin(tmp_path)


@pytest.mark.parametrize("damage", ["runs", "tensors", "value", "seconds"])
def test_a_checkpoint_that_lacks_what_is_needed_is_refused(damage, tmp_path):
    begin(tmp_path)
    tensors, meta = checkpoint.read(tmp_path)
    if damage == "runs":
        meta["runs"] = []
    elif damage == "seconds":
        del meta["seconds"]
    elif damage == "tensors":
        tensors = {k: v for k, v in tensors.items() if not k.endswith("sum/0")}
    else:
        tensors["run/0/value/0"] = tensors["run/0/value/0"][:, :1].contiguous()
    checkpoint.write(tmp_path, tensors, meta)
    with pytest.raises(CheckpointError, match="lacks what this fit needs"):
        begin(tmp_path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    begin(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated or changed"):
        begin(tmp_path)
