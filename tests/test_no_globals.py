"""Importing the package, or using it, leaves the globals of torch as they were.

Each check runs in a process of its own, from two starting states: torch's defaults, and everything set otherwise, since
code that sets a default to its usual value shows only in the second.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

HEAD = """
import hashlib, json, sys, warnings
import numpy, torch
warnings.filterwarnings("ignore", message=r"\\s*ArviZ is undergoing a major refactor", category=FutureWarning)

def state():
    random = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    legacy = numpy.random.get_state(legacy=True)
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "grad mode": torch.is_grad_enabled(),
        "distribution validation": torch.distributions.Distribution._validate_args,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "random state": random,
        "numpy random state": hashlib.sha256(legacy[1].tobytes() + str(legacy[2:]).encode()).hexdigest(),
    }

if sys.argv[1] == "otherwise":
    torch.set_default_dtype(torch.float16)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.manual_seed(987)
    torch.randn(3)
    numpy.random.seed(654)
before = state()
"""
TAIL = """
after = state()
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
import vifamily
names = [info.name for info in pkgutil.walk_packages(vifamily.__path__, "vifamily.")]
assert len(names) > 5, names
for name in names:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ImportError as error:  # an extra that is not installed, said by name
            if "vifamily[" not in str(error):
                raise
"""

USE = {
    "fit, summary, diagnosis": """
import vifamily as vf
model = vf.models.Density(lambda z: -0.5 * z.square().sum(-1) - 0.25 * (z[..., 0] * z[..., 1]), dim=2)
posterior = vf.fit(model, family="full_rank", objective="elbo", seed=0, steps=60, progress=False)
posterior.sample(20), posterior.draws(20), posterior.summary(), posterior.diagnose()
""",
    "flow and renyi": """
import vifamily as vf
posterior = vf.fit("banana", family="flow(kind='nsf')", objective="renyi(alpha=0.5)", seed=0, steps=5, progress=False)
posterior.sample(10)
""",
    "a Pyro program": """
import vifamily as vf
from vifamily.models import _pyro  # Pyro's own import switches distribution validation on, and is the user's business
import pyro, pyro.distributions as dist

def program(y):
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(centre, scale), obs=y)

model = vf.models.PyroModel(program, torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64))
posterior = vf.fit(model, family="mean_field", objective="elbo", seed=0, steps=30, progress=False)
posterior.sample(10)
""",
    "a model that raises": """
import vifamily as vf

def broken(z):
    raise KeyError("not there")

try:
    vf.fit(vf.models.Density(broken, dim=2), family="mean_field", objective="elbo", seed=0, steps=5, progress=False)
except Exception:
    pass
else:
    raise AssertionError("the model's error was swallowed")
""",
}


def changes(code: str, start: str) -> dict[str, list[object]]:
    """Run code in a fresh process; return the globals that it changed, as [before, after]."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code + TAIL, start], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("start", ["default", "otherwise"])
def test_import_changes_no_global(start: str) -> None:
    assert changes(IMPORT_EVERYTHING, start) == {}


@pytest.mark.parametrize("start", ["default", "otherwise"])
@pytest.mark.parametrize("what", USE)
def test_use_changes_no_global(what: str, start: str) -> None:
    assert changes(USE[what], start) == {}


def test_the_check_can_fail() -> None:
    planted = "torch.distributions.Distribution.set_default_validate_args(False); torch.randn(1)"
    assert set(changes(planted, "default")) == {"distribution validation", "random state"}
    assert set(changes("torch.set_default_dtype(torch.float32)", "otherwise")) == {"default dtype"}
