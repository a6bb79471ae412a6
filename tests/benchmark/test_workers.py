"""The protocol between the benchmark and its workers, with scripts that behave well, badly and worse."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vifamily.benchmark._environments import PEERS, interpreter
from vifamily.benchmark._judge import density_offset
from vifamily.benchmark._suite import SUITE, entry_named, problem_named
from vifamily.benchmark._workers import ask, read_answer
from vifamily.benchmark.peers._common import Clock, Trajectory, drive, step_counts
from vifamily.benchmark.peers.densities import density, numpy_ops
from vifamily.errors import BenchmarkError, ConfigError, ReferenceDataError, UnknownNameError

JOB = {"dim": 2, "settings": [{"name": "only"}]}
DATA = {"check_points": np.zeros((3, 2))}
GOOD = """
import json, sys, numpy as np
from pathlib import Path
place = Path(sys.argv[1]).parent
job = json.loads(Path(sys.argv[1]).read_text())
assert np.load(place / "data.npz")["check_points"].shape == (3, 2)
arrays = {"log_density": np.zeros(3), "0/points": np.array([[0.0, 0, 0, 0], [1, 1, 10, 80]]),
          "0/mean": np.zeros((2, 2)), "0/scale": np.ones((2, 2))}
content = {"runs": [{"setting": "only", "setup": [0.5, 0.4], "extra": 1}], "memory_mb": 1.0, "versions": {"a": "1"}}
#HERE
np.savez(place / "answer.npz", **arrays)
(place / "answer.json").write_text(json.dumps(content))
"""


def run(tmp_path: Path, change: str = "", limit: float = 60.0):
    script = tmp_path / "worker.py"
    script.write_text(GOOD.replace("#HERE", change), "utf-8")
    return ask(Path(sys.executable), str(script), JOB, DATA, limit=limit, folder=tmp_path)


def test_answer_of_a_fake_peer(tmp_path: Path) -> None:
    answer = run(tmp_path)
    (only,) = answer.runs
    assert (only.setting, only.setup, only.info) == ("only", (0.5, 0.4), {"extra": 1})
    assert only.points[1].tolist() == [1, 1, 10, 80]
    assert answer.versions == {"a": "1"}
    assert not list(tmp_path.glob("tmp*"))  # the scratch folder is gone


HOSTILE = {
    "raises": ("raise ValueError('no such thing')", "no such thing"),
    "objects in the file": ("arrays['0/mean'] = np.array([{}, {}], dtype=object)", "cannot be read"),
    "a wrong shape": ("arrays['0/mean'] = np.zeros((2, 3))", "mean must be"),
    "NaN": ("arrays['0/scale'][0, 0] = np.nan", "finite"),
    "time that runs back": ("arrays['0/points'][1, 0] = -1", "must not decrease"),
    "another number of settings": ("content['runs'] *= 2", "answered for 2 settings"),
    "no memory": ("del content['memory_mb']", "memory_mb"),
    "a list": ("content = []", "lacks or garbles"),
    "words for numbers": ("content['runs'][0]['setup'] = ['a', 'b']", "lacks or garbles"),
    "float32": ("arrays['log_density'] = np.zeros(3, dtype=np.float32)", "float64"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answer_is_refused(name: str, tmp_path: Path) -> None:
    change, expected = HOSTILE[name]
    with pytest.raises(BenchmarkError, match=expected):
        run(tmp_path, change)


def test_worker_that_hangs_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="stopped after"):
        run(tmp_path, "import time; time.sleep(60)", limit=1.5)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read_answer(tmp_path, dim=2, settings=1)
    (tmp_path / "answer.json").write_text(json.dumps({"runs": []}), "utf-8")
    (tmp_path / "answer.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read_answer(tmp_path, dim=2, settings=0)


def test_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cannot be started"):
        ask(tmp_path / "python", "worker.py", JOB, DATA, limit=5.0, folder=tmp_path)


# --- peers and suite ---


def test_peers_that_are_not_installed(tmp_path: Path) -> None:
    assert interpreter("numpyro", tmp_path) is None
    assert interpreter("pyro", tmp_path) == Path(sys.executable)
    with pytest.raises(ConfigError, match="no peer 'stan'"):
        interpreter("stan", tmp_path)


def test_another_version_counts_as_not_installed(tmp_path: Path) -> None:
    home = tmp_path / "pymc"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").write_text("", "utf-8")
    site = home / "lib" / "python3.11" / "site-packages"
    for package in PEERS["pymc"].packages:
        (site / (package.replace("==", "-") + ".dist-info")).mkdir(parents=True)
    assert interpreter("pymc", tmp_path) is not None
    (site / "pymc-5.28.5.dist-info").rename(site / "pymc-5.0.0.dist-info")
    assert interpreter("pymc", tmp_path) is None


@pytest.mark.parametrize("name", [n for n in SUITE if n != "logistic_100000_100"])
def test_densities_of_the_peers_are_ours(name: str) -> None:
    entry = entry_named(name)
    try:
        model, data = entry.problem().model, entry.arrays()
    except ReferenceDataError as error:
        pytest.skip(str(error))
    points = 0.3 * np.random.default_rng(0).standard_normal((4, model.dim))
    theirs = density(entry.density, numpy_ops(), data)
    ours = model.log_joint(torch.from_numpy(points)).detach().numpy()
    assert density_offset(ours, np.array([theirs(point) for point in points])) < 1e-12


def test_suite_makes_logistic_regressions_of_any_size() -> None:
    assert problem_named("logistic_50_4").model.dim == 4
    for name in ("logistic_50", "logistic_0_4", "logistic_a_b", "nothing"):
        with pytest.raises(UnknownNameError, match="no problem"):
            entry_named(name)


def test_density_without_the_operations_it_needs() -> None:
    with pytest.raises(LookupError, match="not written for this peer"):
        density("lotka_volterra", object(), {})


# --- what workers share ---


def test_step_counts_end_at_the_last_step() -> None:
    counts = step_counts(1000)
    assert counts[0] == 1
    assert counts[-1] == 1000
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("counts", ["wall", "cpu"])
def test_a_limit_is_about_what_the_clock_counts(counts: str) -> None:
    clock = Clock(counts)

    def advance(count: int) -> None:
        # a step takes a second by the one clock and next to none by the other
        if counts == "wall":
            clock.wall += count
        else:
            clock.cpu += count

    trajectory = Trajectory("only", clock)
    drive(trajectory, {"steps": 1000, "draws": 1}, 10.0, advance, lambda: (np.ones(1), np.ones(1)))
    assert 10 <= trajectory.points[-1][2] <= 12


def test_drive_ends_where_a_state_is_not_finite() -> None:
    done = [0]
    trajectory = Trajectory("only", Clock())

    def advance(count: int) -> None:
        done[0] += count

    drive(trajectory, {"steps": 100, "draws": 8}, 60.0, advance,
          lambda: (np.array([1.0 if done[0] < 10 else np.nan]), np.ones(1)))  # fmt: skip
    assert trajectory.info == {"ended": "not finite"}
    assert [point[2] for point in trajectory.points] == [n for n in step_counts(100) if n < 10]
    assert trajectory.points[-1][3] == 8 * trajectory.points[-1][2]
