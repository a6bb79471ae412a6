"""An objective from another package: found through its entry point, held to the same contracts, refused on a clash."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vifamily as vf
from vifamily import registry, testing
from vifamily.errors import RegistryError, UnknownNameError, VifamilyWarning

ROOT = Path(__file__).resolve().parents[2]

RIGHT = '''
"""An objective of another package."""

import dataclasses

from vifamily.objectives import Objective
from vifamily.registry import register
from vifamily.types import Capability, Loss


@register("objectives", "log_variance")
@dataclasses.dataclass(frozen=True)
class LogVariance(Objective):
    """Half the variance of the log ratio over draws that are held fixed: its gradient is that of reverse KL."""

    needs_model = frozenset({Capability.LOG_JOINT})
    needs_family = frozenset({Capability.DRAWS, Capability.LOG_Q})
    value_kind = "surrogate"
    min_draws = 2

    @property
    def renyi_order(self):
        return 1.0

    def loss(self, family, model, noise, batch=None, state=None):
        draw = family(noise)
        z = draw.z.detach()
        weight = draw.log_weight.detach().exp()
        ratio = family.log_prob(z) - model.log_joint(z, batch)
        mean = (weight * ratio).sum(-1, keepdim=True)
        value = SIGN * 0.5 * (weight * (ratio - mean) ** 2).sum(-1)
        return Loss(value, value.detach(), {"mean_log_ratio": mean.squeeze(-1).detach()})
'''.replace("SIGN * ", "")
WRONG = RIGHT.replace("value = 0.5", "value = -0.5")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out an installed distribution: a package, and metadata with its entry points."""
    made = []

    def make(package, source, entry_points, group="objectives"):
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "entry.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[vifamily.{group}]", *lines, ""]))
        made.append(package)
        importlib.invalidate_caches()
        registry.refresh()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield make
    monkeypatch.undo()
    for package in made:
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
    importlib.invalidate_caches()
    registry.refresh()


def test_a_third_party_objective_is_found_and_passes(install):
    assert "log_variance" not in registry.names("objectives")
    install("their_package", RIGHT, {"log_variance": "their_package.entry:LogVariance"})
    assert "log_variance" in registry.names("objectives")
    assert registry.describe("objectives", "log_variance").startswith("Half the variance of the log ratio")
    report = testing.check_objective("log_variance")
    assert {"misspecified", "conjugate", "zero_at_posterior", "restarts"} <= set(report.passed)
    assert "gradient" in report.skipped


def test_a_third_party_objective_fits_by_name(install):
    install("their_package", RIGHT, {"log_variance": "their_package.entry:LogVariance"})
    posterior = vf.fit("correlated_normal", family="full_rank", objective="log_variance", steps=50, progress=False)
    assert posterior.record.objective == "log_variance"
    assert posterior.draws(3).shape == (3, 2)


def test_a_wrong_third_party_objective_fails_the_kit(install):
    install("their_package", WRONG, {"log_variance": "their_package.entry:LogVariance"})
    with pytest.raises(testing.ContractError, match="log_variance") as caught:
        testing.check_objective("log_variance")
    assert caught.value.contract == "conjugate"


def test_a_name_that_is_taken_is_refused_naming_both_modules(install):
    install("their_package", RIGHT, {"elbo": "their_package.entry:LogVariance"})
    with pytest.raises(RegistryError) as caught:
        registry.names("objectives")
    assert "vifamily.objectives.elbo" in str(caught.value) and "their_package.entry" in str(caught.value)


def test_two_third_parties_that_claim_one_name_are_refused(install):
    install("one_package", RIGHT, {"log_variance": "one_package.entry:LogVariance"})
    install("other_package", RIGHT, {"log_variance": "other_package.entry:LogVariance"})
    with pytest.raises(RegistryError) as caught:
        registry.names("objectives")
    assert "one_package.entry" in str(caught.value) and "other_package.entry" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("import no_such_module_anywhere", "their_package.entry:LogVariance"),
        (RIGHT, "their_package.entry:NoSuchClass"),
        ("raise RuntimeError('broken on import')", "their_package.entry:LogVariance"),
    ],
)
def test_a_broken_plug_in_is_warned_about_and_skipped(install, source, target):
    install("their_package", source, {"log_variance": target})
    with pytest.warns(VifamilyWarning, match="log_variance.*could not be loaded"):
        names = registry.names("objectives")
    assert "elbo" in names and "log_variance" not in names
    with pytest.raises(UnknownNameError):
        registry.lookup("objectives", "log_variance")


def test_it_is_gone_once_its_package_is(install, tmp_path):
    install("their_package", RIGHT, {"log_variance": "their_package.entry:LogVariance"})
    assert "log_variance" in registry.names("objectives")
    (tmp_path / "their_package-1.0.dist-info" / "entry_points.txt").unlink()
    importlib.invalidate_caches()
    registry.refresh()
    assert "log_variance" not in registry.names("objectives")


def test_the_command_line_lists_it(install, tmp_path):
    install("their_package", RIGHT, {"log_variance": "their_package.entry:LogVariance"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "vifamily", "list", "objectives"],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "log_variance" in done.stdout
